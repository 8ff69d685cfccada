"""The page's style sheet: light, dark, phone and print, with the page's and the figures' colours."""

STYLE = """
:root { color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --paper: #ffffff; --ink: #17212b; --muted: #5b6875; --line: #dde3e9; --wash: #f4f6f8; --accent: #0067b8;
  --accent-wash: #e8f2fb; --alarm: #a8201a; --alarm-wash: #fdecea; --good: #17734a; --good-wash: #e8f5ee;
  --low: #eef4fa; --high: #0a4c8b; --on-high: #ffffff;
  --s1: #0072b2; --s2: #d55e00; --s3: #008f68; --s4: #b8558f; --s5: #a87a00; --s6: #3b9ad0; --s7: #7556b3;
  --s8: #6a737c; }
@media screen and (prefers-color-scheme: dark) { :root {
  --paper: #12181f; --ink: #e6ebf0; --muted: #9aa7b4; --line: #2b353f; --wash: #1a222b; --accent: #5cb3f5;
  --accent-wash: #15293b; --alarm: #ff8d85; --alarm-wash: #3a1a19; --good: #62cf9b; --good-wash: #14301f;
  --low: #1b2834; --high: #63b0ee; --on-high: #0c141b;
  --s1: #4ea9e6; --s2: #ff8a45; --s3: #35c796; --s4: #e59cc6; --s5: #e6b53c; --s6: #93d0f5; --s7: #b79df0;
  --s8: #a3adb7; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--sans); }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 64px; }
h1, h2, h3 { line-height: 1.25; margin: 0; text-wrap: balance; }
h1 { font-size: 1rem; font-weight: 600; color: var(--muted); overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin-bottom: 4px; }
h3 { font-size: 1rem; margin: 28px 0 4px; }
p { margin: 6px 0; max-width: 76ch; }
p, li, h2, h3, summary { overflow-wrap: anywhere; }
a { color: var(--accent); }
code, pre { font-family: var(--mono); font-size: 0.86em; overflow-wrap: anywhere; }
section { margin-top: 52px; padding-top: 20px; border-top: 1px solid var(--line); }
nav { margin: 28px 0 0; font-size: 0.9rem; }
nav a { display: inline-block; margin: 0 16px 4px 0; text-decoration: none; }
.lead { font-size: 1.55rem; line-height: 1.35; font-weight: 600; margin: 10px 0 14px; max-width: 46ch;
  text-wrap: pretty; }
.muted, .note { color: var(--muted); }
.note { font-size: 0.92rem; }
.remarks { margin: 0 0 24px; padding-left: 1.1em; }
.remarks li { margin: 3px 0; max-width: 84ch; }
.box { padding: 12px 16px; border-radius: 8px; background: var(--wash); margin: 14px 0; max-width: none; }
.box.alarm { background: var(--alarm-wash); color: var(--alarm); font-weight: 600; }
.box.clear { background: var(--good-wash); color: var(--good); font-weight: 600; }
.box .remarks { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 4px
  0; }
.tile { background: var(--wash); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--muted); font-size: 0.86rem; font-variant-numeric: tabular-nums; }
.tile.federated { background: var(--accent-wash); }
.tile.federated b, .tile.federated .title { color: var(--accent); }
.tile .title { font-size: 0.95rem; font-weight: 600; color: var(--ink); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(235px, 1fr)); gap: 14px 24px; margin:
  20px 0 0; }
dl.wide { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
dt { color: var(--muted); font-size: 0.84rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.94rem; min-width: 50%; }
th, td { text-align: right; padding: 7px 14px; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
tbody th { white-space: normal; min-width: 5.5em; max-width: 16em; overflow-wrap: break-word; }
thead th { color: var(--muted); font-size: 0.84rem; vertical-align: bottom; white-space: normal;
  overflow-wrap: break-word; max-width: 13em; }
th.l, td.l, tbody th { text-align: left; }
tr > th:first-child { padding-left: 0; }
table.wire tbody th { padding-left: 0; } table.wire th, table.wire td { padding-top: 4px; padding-bottom:
  4px; }
td { white-space: nowrap; } td.l, td.text { white-space: normal; }
td small { display: block; color: var(--muted); font-size: 0.78rem; white-space: nowrap; }
table.wire td.own { color: var(--accent); font-weight: 600; }
tr.sum > * { border-top: 2px solid var(--ink); border-bottom: 2px solid var(--line); font-weight: 600; }
tr.sum small { font-weight: 400; }
.tag { display: inline-block; border: 1px solid var(--line); border-radius: 99px; padding: 0 8px;
  font-size: 0.78rem;
  font-weight: 400; color: var(--muted); }
.bad, tr.alarm td { color: var(--alarm); font-weight: 600; }
.good { color: var(--good); }
td.text { max-width: 76ch; overflow-wrap: break-word; }
.share { display: flex; width: 210px; height: 14px; border-radius: 3px; overflow: hidden; margin-top: 5px;
  gap: 1px; }
.share i, .key i { background: var(--c); }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.86rem; color: var(--muted); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 18px
  26px; margin: 12px 0; }
.grid.long { grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { font-size: 0.88rem; font-weight: 600; margin-bottom: 2px; overflow-wrap: anywhere; }
figure .note { font-size: 0.84rem; margin: 2px 0 0; max-width: 48ch; }
svg { display: block; width: 100%; height: auto; max-width: 440px; font-family: var(--sans);
  stroke-linejoin: round; }
figure.picture { margin: 14px 0; }
figure.picture img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
table.heat td { min-width: 84px; text-align: center; border: 3px solid var(--paper); padding: 9px 10px;
  border-radius: 6px; }
table.heat th { border: 0; vertical-align: middle; }
table.heat thead th { text-align: center; }
table.heat td[style] { background: color-mix(in oklab, var(--high) var(--heat), var(--low)); }
table.heat td small { color: inherit; } table.heat td.strong { color: var(--on-high); }
table.heat td.own { outline: 2px solid var(--ink); outline-offset: -5px; }
table.small { min-width: 0; } table.small td { min-width: 64px; padding: 5px 8px; }
table.heat tr.first > * { border-top: 12px solid var(--paper); }
details { margin: 14px 0; }
summary { cursor: pointer; color: var(--accent); }
pre { background: var(--wash); border-radius: 8px; padding: 14px 16px; overflow-x: auto; white-space:
  pre-wrap; }
.names code { background: var(--wash); border-radius: 4px; padding: 1px 6px; margin: 0 4px 6px 0; display:
  inline-block; }
ul.limits li { margin: 5px 0; max-width: 84ch; }
@media (max-width: 640px) {
  main { padding: 18px 14px 48px; } .lead { font-size: 1.25rem; } section { margin-top: 38px; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile b { font-size: 1.5rem; } .opt { display: none; }
  dl { grid-template-columns: 1fr 1fr; } dl.wide { grid-template-columns: 1fr; } .share { width: 110px; }
  table { font-size: 0.82rem; } th, td { padding: 6px 4px; } thead th { font-size: 0.7rem; }
  td small { white-space: normal; font-size: 0.7rem; min-width: 46px; }
  .tag { display: table; padding: 0 4px; font-size: 0.62rem; }
  tbody th { position: sticky; left: 0; background: var(--paper); max-width: 9em; }
  thead th { min-width: 5em; max-width: 9em; }
  table.heat td { min-width: 60px; padding: 6px 4px; } svg { max-width: none; } }
@media print { html { font-size: 11px; } body { font-size: 1rem; } nav { display: none; }
  main { max-width: none; padding: 0; } section { margin-top: 22px; padding-top: 10px; } .scroll { overflow: visible; }
  .grid { grid-template-columns: repeat(3, 1fr); } .grid.long { grid-template-columns: 1fr; }
  table { font-size: 0.9em; } th, td small { white-space: normal; } th, td { padding: 3px 6px; }
  tr, figure, .tile, .box { break-inside: avoid; } h2, h3, summary, .note { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
  summary { list-style: none; color: var(--ink); font-weight: 600; } figure.picture img { max-height: 24cm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
