"""The page's HTML. A string, since only .py and .yaml files travel in the app bundle."""

from medfl.report.template_rounds import CODEBOOKS, COLLAPSE, REMARKS, TRAINING
from medfl.report.template_volumes import VOLUMES

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
<div class="scroll"><table>
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

ARMS = """
<section id="arms"><h2>Results by arm</h2>
{% if arms.rows %}
<p class="note">{{ arms.metric }} on each site's own test images, 95 % intervals. Benefit is federated minus
alone; it is coloured where its interval leaves out zero. Means are over {{ arms.over }}
site{{ "" if arms.over == 1 else "s" }}.</p>
<div class="scroll"><table><thead><tr><th class="l">Site</th><th class="opt">Test images</th>
{% for arm in arms.arms %}<th>{{ arm }}</th>{% endfor %}<th>Benefit</th></tr></thead><tbody>
{% for row in arms.rows %}
<tr><th>{{ row.name }}{% if row.note %} <span class="tag">{{ row.note }}</span>{% endif %}</th>
<td class="opt">{{ row.test }}</td>{% for cell in row.cells %}{{ number(cell) }}{% endfor %}{{ gain(row.gain) }}</tr>
{% endfor %}
{% if arms.mean %}
<tr class="sum"><th>Mean</th><td class="opt"></td>{% for cell in arms.mean %}{{ number(cell) }}{% endfor %}
{{ gain(arms.mean_gain) }}</tr>
{% endif %}
</tbody></table></div>
{{ grid(arms.figures) }}
{% else %}
{{ absent("No result yet: the evaluate stage has not been run, or has written nothing so far.") }}
{% endif %}
{% if arms.others %}
<h3>All scores, mean over sites</h3>
<div class="scroll"><table><thead><tr><th class="l">Score</th>
{% for arm in arms.titles %}<th>{{ arm }}</th>{% endfor %}<th class="opt">Sites</th></tr></thead><tbody>
{% for row in arms.others %}
<tr><th>{{ row.name }}</th>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}
<td class="opt">{{ row.over }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if arms.accuracy.rows %}
<h3>Accuracy beside the constant predictor</h3>
<p class="note">The constant predictor always names the most frequent class.
{{ "Marked: not above it." if arms.accuracy.any_low }}</p>
<div class="scroll"><table><thead><tr><th class="l">Site</th><th>Constant</th>
{% for arm in arms.accuracy.arms %}<th>{{ arm }}</th>{% endfor %}</tr></thead><tbody>
{% for row in arms.accuracy.rows %}
<tr><th>{{ row.name }}</th><td>{{ row.constant }}</td>
{% for cell, low in row.cells %}<td{% if low %} class="bad"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>
"""

TRANSFER = """
<section id="transfer"><h2>Transfer between sites</h2>
{% if transfer.rows %}
<p class="note">AUC of an encoder trained on one site's images (row), with a probe trained and tested at
another (column). Framed: the site's own encoder. Small print: 95 % intervals.</p>
<div class="scroll"><table class="heat"><thead><tr><th class="l">Trained on</th>
{% for name in transfer.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in transfer.rows %}
<tr{% if row.arm and (loop.first or not loop.previtem.arm) %} class="first"{% endif %}><th>{{ row.name }}</th>
{% for cell in row.cells %}
<td class="{{ cell.class }}"{% if cell.heat is not none %} style="--heat: {{ cell.heat }}%"{% endif %}>
{{- cell.value }}{% if cell.interval %}<small>{{ cell.interval }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{{ facts(transfer.facts, "wide") }}
{% else %}
{{ absent("No transfer matrix yet: the transfer stage has not been run.") }}
{% endif %}
</section>
"""

WIRE = """
<section id="wire"><h2>What left each site</h2>
<p class="box {{ wire.state }}">{{ wire.text }}</p>
{% if wire.rows %}
<p>In all, {{ wire.up }} left the sites and {{ wire.down }} arrived, over all stages of the federated arm. The
arms that it is compared with are trained inside the simulation and are not counted.</p>
<div class="scroll"><table class="wire"><thead><tr><th class="l">Site</th><th class="l">Direction</th>
<th class="l">Role</th><th class="l opt">What it is</th><th>Number</th><th>Per training round</th><th>Total</th>
</tr></thead><tbody>
{% for row in wire.rows %}
<tr{% if row.alarm %} class="alarm"{% endif %}>{% if row.height %}
<th rowspan="{{ row.height }}">{{ row.site }}</th>{% endif %}
<td class="l{{ " own" if row.up }}">{{ row.direction }}</td><td class="l">{{ row.role }}</td>
<td class="l muted opt">{{ row.words }}</td><td>{{ row.names }}</td><td>{{ row.per_round }}</td>
<td>{{ row.total }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if wire.metrics %}
<h3>Numbers that left, by name</h3>
<p class="names">{% for name in wire.metrics %}<code>{{ name }}</code>{% endfor %}</p>
{% endif %}
</section>
"""

CLOSING = """
<section id="refusals"><h2>Refusals and incidents</h2>
{% if refusals.rows %}
<div class="scroll"><table><thead><tr><th class="l">Round</th><th class="l">Stage</th><th class="l">Arm</th>
<th class="l">Site</th><th class="l">What</th><th class="l">Reason</th></tr></thead><tbody>
{% for row in refusals.rows %}
<tr>{% for cell in row %}<td class="l">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% elif refusals.rounds %}
<p>No reply was refused.</p>
{% endif %}
{% if refusals.rounds %}
<p class="note">Sites that counted in a federated round: {{ refusals.sites }}, over {{ refusals.rounds }}
round{{ "" if refusals.rounds == 1 else "s" }}.</p>
{% elif not refusals.rows %}
{{ absent("No federated round is recorded yet.") }}
{% endif %}
</section>

<section id="provenance"><h2>Provenance</h2>
{% if provenance.facts %}
{{ facts(provenance.facts, "wide") }}
{% else %}
{{ absent("Versions, command and start are not recorded (config.yaml).") }}
{% endif %}
<h3>Encoder</h3>
{% if provenance.encoder %}
{{ facts(provenance.encoder, "wide") }}
{% else %}
{{ absent("No encoder is exported yet (encoder.json).") }}
{% endif %}
<h3>Files that this page was made from, SHA-256</h3>
<div class="scroll"><table>{% for file, digest in provenance.hashes.items() %}
<tr><th class="l">{{ file }}</th><td class="l"><code>{{ digest }}</code></td></tr>{% endfor %}</table></div>
{% if provenance.config %}
<details><summary>The resolved study (config.yaml)</summary>
<pre>{{ provenance.config }}</pre></details>
{% endif %}
</section>

<section id="limits"><h2>What this page does not say</h2>
<ul class="limits">{% for text in limits %}<li>{{ text }}</li>{% endfor %}</ul></section>
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
    ("volumes", "Fusion and segmentation"),
    ("transfer", "Transfer"),
    ("training", "Training"),
    ("collapse", "Collapse monitors"),
    ("codebooks", "Codebooks"),
    ("remarks", "Remarks"),
    ("wire", "What left each site"),
    ("refusals", "Refusals"),
    ("provenance", "Provenance"),
    ("limits", "Limits"),
)
SECTIONS = (SITES, ARMS, VOLUMES, TRANSFER, TRAINING, COLLAPSE, CODEBOOKS, REMARKS, WIRE, CLOSING)
PAGE = "".join((MACROS, HEAD, CARD, *SECTIONS, "</main></body></html>\n"))
