"""The page of a check."""

STYLE = """
.chip { display: inline-block; min-width: 3.6em; text-align: center; padding: 1px 8px; border-radius: 999px;
  font-size: 0.8rem; font-weight: 600; }
.chip.pass { background: var(--good-wash); color: var(--good); }
.chip.warn { background: var(--warn-wash); color: var(--warn); }
.chip.fail { background: var(--alarm-wash); color: var(--alarm); }
:root { --warn: #7a5200; --warn-wash: #fdf3dc; }
@media screen and (prefers-color-scheme: dark) { :root { --warn: #f0c14b; --warn-wash: #33290f; } }
.stays { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; display: inline-block; }
.findings { list-style: none; margin: 12px 0 0; padding: 0; }
.findings > li { display: grid; grid-template-columns: 5.2em 11em minmax(0, 1fr); gap: 4px 12px; padding: 10px 0;
  border-bottom: 1px solid var(--line); }
.findings > li.pass { padding: 5px 0; }
.findings b { font-weight: 600; }
.findings p { margin: 2px 0; }
.findings .todo { font-weight: 600; }
.findings details ul { margin: 4px 0; padding-left: 1.1em; font-family: var(--mono); font-size: 0.82rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px; margin-top: 14px; }
.sheet.volumes { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.sheet img { width: 100%; border-radius: 4px; background: #000; display: block; }
.files th, .files td { text-align: left; font-size: 0.86rem; padding: 4px 10px; }
.files td:first-child { font-family: var(--mono); overflow-wrap: anywhere; }
@media (max-width: 640px) { .findings > li { grid-template-columns: 5.2em minmax(0, 1fr); }
  .findings > li > div { grid-column: 1 / -1; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>Check of {{ site }}</title><style>{{ style | safe }}</style></head>
<body><main>
<h1>Check of site {{ site }}, data set {{ data }}, for {{ study }}</h1>
<p class="lead">{{ summary }}</p>
<p class="box {{ 'alarm' if state == 'fail' else 'clear' }}">{{ next_step }}</p>
<div class="tiles">
{% for value, what in tiles %}
<div class="tile"><b>{{ value }}</b><span>{{ what }}</span></div>
{% endfor %}
</div>
<p class="note stays">This page names files of this site. It stays here; share.json beside it holds counts alone and can
be sent to the study lead.</p>
{% for group in groups %}
<section><h2>{{ group.title }}</h2>
<ul class="findings">
{% for one, items, more in group.rows %}
<li class="{{ one.state }}"><span><span class="chip {{ one.state }}">{{
  {"pass": "ok", "warn": "warning", "fail": "problem"}[one.state] }}</span></span><b>{{ one.name }}</b>
<div><p>{{ one.what }}</p>
{% if one.state != "pass" and one.why %}<p class="muted">{{ one.why }}</p>{% endif %}
{% if one.state != "pass" and one.fix %}<p class="todo">{{ one.fix }}</p>{% endif %}
{% if items %}
<details{{ " open" if one.state == "fail" and items | length < 6 }}>
<summary>{{ items | length + more }} in detail</summary>
<ul>{% for item in items %}<li>{{ item }}</li>{% endfor %}
{% if more %}<li>and {{ more }} more</li>{% endif %}</ul></details>
{% endif %}
</div></li>
{% endfor %}
{% if group.clean %}
<li class="pass"><span><span class="chip pass">ok</span></span><b>nothing found</b>
<div><p>{{ group.clean }}</p></div></li>
{% endif %}
</ul></section>
{% endfor %}
{% if pictures %}
<section><h2>What the training sees</h2>
<p class="note">{{ pictures | length }} training images after reading, bringing to the grid and one random view{{
" (middle slices: axial, coronal, sagittal)" if volumes }}. Does anything lie on its side, is anything cut away, is
there text in a picture?</p>
<div class="sheet{{ ' volumes' if volumes }}">
{% for picture in pictures %}<img src="{{ picture }}" alt="image {{ loop.index }} of the sample">{% endfor %}
</div></section>
{% endif %}
{% if files %}
<section><h2>Each image</h2>
<details><summary>{{ files | length }} images, those with a problem first</summary>
<div class="scroll"><table class="files">
<thead><tr><th>file</th><th>verdict</th><th>split</th><th>size</th><th>spacing (mm)</th><th>values</th></tr></thead>
<tbody>
{% for file in files %}
<tr><td>{{ file.name }}</td><td><span class="chip {{ file.state }}">{{
    "ok" if file.state == "pass" else "problem" }}</span> {{ file.text if file.state == "fail" }}</td>
<td>{{ file.split }}</td><td>{{ file.size }}</td><td>{{ file.spacing }}</td>
<td>{{ file["values"] }}</td></tr>
{% endfor %}
</tbody></table></div>
{% if left_out %}<p class="note">{{ left_out }} more are left out here.</p>{% endif %}
</details></section>
{% endif %}
</main></body></html>
"""
