"""The page's HTML. A string, since only .py and .yaml files travel in the app bundle."""

from medfl.report.template_closing import CLOSING, COMPUTE, WIRE
from medfl.report.template_privacy import PRIVACY
from medfl.report.template_results import ARMS, FINETUNED, PREDICTIONS, TRANSFER
from medfl.report.template_rounds import CODEBOOKS, COLLAPSE, REMARKS, TRAINING
from medfl.report.template_volumes import PICTURES, SYNTHETIC, VOLUMES

MACROS = """
{%- macro gallery(part) %}
<h3>{{ part.heading }}</h3>
{% if part.note %}<p class="note">{{ part.note }}</p>{% endif %}
{{ grid(part.figures) }}
{%- endmacro %}
{%- macro grid(figures) %}
<div class="grid">{% for drawn in figures %}
<figure><figcaption>{{ drawn.caption }}</figcaption>{{ drawn.svg | safe }}
{%- if drawn.note %}<p class="note">{{ drawn.note }}</p>{% endif %}</figure>{% endfor %}</div>
{%- endmacro %}
{%- macro number(cell, class="") -%}
<td class="{{ class }}">{{ cell.value }}
{%- if cell.interval %}<small>{{ cell.interval }}</small>{% endif %}</td>
{%- endmacro %}
{%- macro gain(cell) -%}
{% if cell %}{{ number(cell, "good" if cell.sign > 0 else "bad" if cell.sign < 0 else "") }}
{%- else %}<td>–</td>{% endif %}
{%- endmacro %}
{%- macro facts(pairs, class="") %}
<dl class="{{ class }}">{% for name, value in pairs %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{%- endmacro %}
{%- macro absent(text) %}<p class="box muted">{{ text }}</p>{% endmacro %}
{%- macro sites_of(number) %}{{ number }} site{{ "" if number == 1 else "s" }}{% endmacro %}
{%- macro named(row) -%}
{{ row.name }}{% if row.tag %} <span class="tag">{{ row.tag }}</span>{% endif %}
{%- endmacro %}
{%- macro scored(columns, first, rows) %}
<div class="scroll" tabindex="0"><table><thead><tr>{% for title in first %}<th class="l">{{ title }}</th>{% endfor %}
{% for title in columns %}<th>{{ title }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}
<tr{% if row.whole %} class="sum"{% endif %}>
{% if row.height %}<th rowspan="{{ row.height }}">{{ row.group or named(row) }}</th>{% endif %}
{% if row.group %}<td class="l">{{ named(row) }}</td>{% endif %}
{% for cell in row.cells %}{{ number(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{%- endmacro %}
"""

CARD = """
<header id="study">
<h1>medfl study report · {{ name }}</h1>
<p class="lead">{{ study.sentence }}</p>
{% for text in study.alarms %}<p class="box alarm" role="alert">{{ text }}</p>{% endfor %}
{% if study.remarks %}
<ul class="remarks">{% for text in study.remarks %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% if study.tiles %}
<div class="tiles">{% for tile in study.tiles %}
<div class="tile {{ tile.arm }}"><span class="title">{{ tile.title }}</span><b>{{ tile.value }}</b>
<span>{{ tile.interval or "no interval" }}</span></div>{% endfor %}</div>
<p class="note">{{ study.metric }} with its 95 % interval; the same sites are behind every number.</p>
{% endif %}
{{ facts(study.facts) }}
{% if study.notes %}
<div class="box"><b>Not complete.</b> This page shows what the run folder holds.
<ul class="remarks">{% for text in study.notes %}<li>{{ text }}</li>{% endfor %}</ul></div>
{% endif %}
<nav aria-label="Sections">{% for id, title in contents %}
<a href="#{{ id }}">{{ title }}</a>{% endfor %}</nav>
</header>
"""

SITES = """
<section id="sites"><h2>Sites</h2>
{% if sites.rows %}
<div class="scroll" tabindex="0"><table>
<thead><tr><th class="l">Site</th><th>Training images</th><th class="opt">Validation</th><th>Test</th>
<th class="l">Scanner profile</th>
{% if sites.classes %}<th class="l">Classes in training</th>{% endif %}</tr></thead>
<tbody>{% for row in sites.rows %}
<tr><th>{{ row.name }}{% if row.held_out %} <span class="tag">unseen</span>{% endif %}</th>
{% for count in row.splits %}<td{{ " class=opt" if loop.index == 2 }}>{{ count }}</td>{% endfor %}
<td class="l">{{ row.profile }}</td>
{% if sites.classes %}<td class="l"><span class="share">{% for index, name, count in row.shares %}
<i title="{{ name }}: {{ count }}" style="flex: {{ count }}; --c: var(--s{{ index % 8 + 1 }})"></i>
{% endfor %}</span></td>{% endif %}</tr>{% endfor %}</tbody></table></div>
<div class="key">{% for name in sites.classes %}
<span><i style="--c: var(--s{{ loop.index0 % 8 + 1 }})"></i>{{ name }}</span>{% endfor %}</div>
{% if sites.calibration %}
<h3>How different the sites are</h3>
<p class="note">Measured before training, on the images as each site sees them.</p>
{{ facts(sites.calibration) }}
{% endif %}
{% else %}
{{ absent("No description of the sites (sites.json): it is written for simulations only. Sites seen in the "
~ "other files: " ~ (sites.others | join(", ") or "none") ~ ".") }}
{% endif %}
</section>
"""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="referrer" content="no-referrer">
<title>medfl · {{ name }}</title>
<style>{{ style | safe }}</style></head>
<body><main>
"""

CONTENTS = (
    ("sites", "Sites"),
    ("arms", "Results by arm"),
    ("finetuned", "Fine-tuning"),
    ("predictions", "Predictions"),
    ("volumes", "Fusion and segmentation"),
    ("transfer", "Transfer"),
    ("pictures", "Pictures"),
    ("synthetic", "Synthetic images"),
    ("training", "Training"),
    ("collapse", "Collapse monitors"),
    ("codebooks", "Codebooks"),
    ("remarks", "Remarks"),
    ("compute", "Cost"),
    ("wire", "What left each site"),
    ("privacy", "Privacy"),
    ("refusals", "Refusals"),
    ("provenance", "Provenance"),
    ("limits", "Limits"),
)
RESULTS = (ARMS, FINETUNED, PREDICTIONS, VOLUMES, TRANSFER, PICTURES)
COURSE = (SYNTHETIC, TRAINING, COLLAPSE, CODEBOOKS, REMARKS, COMPUTE, WIRE, PRIVACY, CLOSING)
PAGE = "".join((MACROS, HEAD, CARD, SITES, *RESULTS, *COURSE, "</main></body></html>\n"))
