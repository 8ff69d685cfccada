"""The sections of the page on scores: arms, fine-tuning, predictions and transfer; the macros are the page's."""

ARMS = """
<section id="arms"><h2>Results by arm</h2>
{% if arms.rows %}
<p class="note">{{ arms.metric }} on each site's own test images, 95 % intervals. Benefit is federated minus
alone; it is coloured where its interval leaves out zero. Means are over {{ sites_of(arms.over) }}.</p>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Site</th><th class="opt">Test images</th>
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
<details><summary>All scores, mean over sites</summary>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Score</th>
{% for arm in arms.titles %}<th>{{ arm }}</th>{% endfor %}<th class="opt">Sites</th></tr></thead><tbody>
{% for row in arms.others %}
<tr><th>{{ row.name }}</th>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}
<td class="opt">{{ row.over }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
{% if arms.accuracy.rows %}
<h3>Accuracy beside the constant predictor</h3>
<p class="note">The constant predictor always names the most frequent class.
{{ "Marked: not above it." if arms.accuracy.any_low }}</p>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Site</th><th>Constant</th>
{% for arm in arms.accuracy.arms %}<th>{{ arm }}</th>{% endfor %}</tr></thead><tbody>
{% for row in arms.accuracy.rows %}
<tr><th>{{ row.name }}</th><td>{{ row.constant }}</td>
{% for cell, low in row.cells %}<td{% if low %} class="bad"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>
"""

FINETUNED = """
{% if finetuned %}
<section id="finetuned"><h2>Fine-tuning</h2>
{% if finetuned.tables %}
<p class="note">The encoder of each arm after training with labels, at each site or over all sites, beside what a frozen
encoder reaches. Every score is on a site's own test images, with its 95 % interval. An untrained encoder that is
fine-tuned is supervised training from scratch.</p>
{% for table in finetuned.tables %}
<h3>{{ table.metric }}, mean over sites</h3>
{{ scored(table.columns, ["Encoder"], table.rows) }}
{% endfor %}
{% if finetuned.gains %}
<h3>What federated pretraining adds to fine-tuning</h3>
<ul class="remarks">{% for part in finetuned.gains %}
<li><b>{{ part.heading }}</b>: {% for name, change in part.gains %}
<span class="{{ "good" if change.sign > 0 else "bad" if change.sign < 0 else "" }}">{{ change.text }}</span>
{{- " against " ~ name }}{{ ", " if not loop.last }}{% endfor %}.
{{ part.gap }}</li>{% endfor %}</ul>
{% endif %}
{% if finetuned.curves %}
<h3>Label efficiency</h3>
<p class="note">Each encoder with fewer labels: the share of each site's labelled training patients. The same sites are
behind every point of a panel.</p>
{{ grid(finetuned.curves | map(attribute="figure") | list) }}
<details><summary>The numbers of these panels</summary>
{% for part in finetuned.curves %}<h3>{{ part.heading }}</h3>
{{ scored(part.columns, ["Labels"], part.rows) }}{% endfor %}</details>
{% endif %}
{% if finetuned.accuracy %}
<h3>Accuracy, mean over sites</h3>
<p class="note">The constant predictor always names the most frequent class of the test images.
{{ "Not above it: " ~ finetuned.accuracy.low | join(", ") ~ "." if finetuned.accuracy.low }}</p>
{{ scored(finetuned.accuracy.columns, ["Encoder"], finetuned.accuracy.rows) }}
{% endif %}
<details><summary>Each site</summary>
{% for part in finetuned.sites %}<h3>{{ part.heading }}</h3>
{{ scored(part.columns, ["Site"], part.rows) }}{% endfor %}</details>
{% if finetuned.regions %}
<details><summary>Each region</summary>
<p class="note">Dice on each site's own labelled test images, then the other measures as means over the sites.</p>
{% for part in finetuned.regions %}<h3>{{ part.heading }}</h3>
{{ scored(part.columns, ["Region", "Site"], part.sites) }}
{% if part.means %}{{ scored(part.columns, ["Measure", "Region"], part.means) }}{% endif %}{% endfor %}</details>
{% endif %}
{% if finetuned.measures %}
<details><summary>All scores, mean over sites</summary>
{% for part in finetuned.measures %}<h3>{{ part.heading }}</h3>
{{ scored(part.columns, ["Score"], part.rows) }}{% endfor %}</details>
{% endif %}
{% else %}
{{ absent("No result yet: no fine-tuned network has been evaluated so far.") }}
{% endif %}
</section>
{% endif %}
"""

PREDICTIONS = """
{%- macro confusions(tables) %}
<div class="grid{{ " long" if tables and tables[0].classes | length > 4 }}">{% for table in tables %}
<figure><figcaption>{{ table.title }}</figcaption><div class="scroll" tabindex="0"><table class="heat small">
<thead><tr><th class="l">True</th>{% for name in table.classes %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for name, cells in table.rows %}
<tr><th>{{ name }}</th>{% for cell in cells %}
<td class="{{ cell.class }}"
{%- if cell.share is not none %} style="--heat: {{ cell.share }}%"{% endif %}>{{ cell.value }}
{%- if cell.share is not none %}<small>{{ cell.share }} %</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div></figure>{% endfor %}</div>
{%- endmacro %}
{% if predictions %}
<section id="predictions"><h2>Predictions</h2>
<p class="note">{{ predictions.protocol }}, test images of {{ sites_of(predictions.over) }}
{{- " together" if predictions.over > 1 }}
{%- if predictions.silent %} (too few of a class at {{ predictions.silent | join(", ") }}){% endif %}. The sites sent
no prediction, only counts of at least {{ predictions.least }} patients each, from which all of this is drawn.
{% if predictions.classes | length > 2 %}ROC, precision and recall are means over the classes, each against all others;
calibration takes the classes together.
{% elif predictions.classes %}Curves are of {{ predictions.classes[1] }}.{% endif %}</p>
{{ grid(predictions.figures) }}
{% if predictions.by_class %}{{ grid(predictions.by_class) }}{% endif %}
{% if predictions.violins %}
<h3>Predicted probability by true class</h3>
<p class="note">Wide where many images are, smoothed; each shape has its own scale.</p>
{{ grid(predictions.violins) }}
{% endif %}
{% if predictions.confusions %}
<h3>Confusion matrices</h3>
<p class="note">Test images by true class (row) and predicted class (column), with their share of the row. Withheld: a
site did not tell the number because it, or one that would follow from it, is of fewer than {{ predictions.least }}
patients; after ≥ the other sites' images.
{% if predictions.withheld %}Without {{ predictions.withheld | join(", ") }}, where some were withheld.{% endif %}</p>
{{ confusions(predictions.confusions) }}
{% endif %}
{% if predictions.sites %}
<details><summary>Each site</summary>
{% for site, part in predictions.sites %}<h3>{{ site }}</h3>
{% if part.figures %}{{ grid(part.figures) }}{% else %}
<p class="note">Too few images of a class for curves (fewer than {{ predictions.fewest }}).</p>{% endif %}
{{ confusions(part.confusions) }}{% endfor %}
{% if predictions.not_drawn %}
<p class="note">Not drawn, to keep the page small: {{ predictions.not_drawn | join(", ") }}.</p>
{% endif %}</details>
{% endif %}
{% for title, figures in predictions.others %}
<details><summary>{{ title }}</summary>{{ grid(figures) }}</details>
{% endfor %}
</section>
{% endif %}
"""

TRANSFER = """
<section id="transfer"><h2>Transfer between sites</h2>
{% for matrix in transfer.matrices %}
<h3>{{ matrix.heading }}</h3>
<p class="note">{{ matrix.note }} Framed: the site's own. Small print: 95 % intervals.</p>
<div class="scroll" tabindex="0"><table class="heat"><thead><tr><th class="l">Trained on</th>
{% for name, tag in matrix.columns %}<th>{{ name }}{% if tag %} <span class="tag">{{ tag }}</span>{% endif %}</th>
{% endfor %}</tr></thead><tbody>
{% for row in matrix.rows %}
<tr{% if row.arm and (loop.first or not loop.previtem.arm) %} class="first"{% endif %}><th>{{ row.name }}</th>
{% for cell in row.cells %}
<td class="{{ cell.class }}"{% if cell.heat is not none %} style="--heat: {{ cell.heat }}%"{% endif %}>
{{- cell.value }}{% if cell.interval %}<small>{{ cell.interval }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{{ facts(matrix.facts, "wide") }}
{% if matrix.gaps %}
<ul class="remarks note">{% for text in matrix.gaps %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
{% else %}
{{ absent("No transfer matrix yet: the transfer stage has not been run.") }}
{% endfor %}
{% if transfer.shared %}
<p class="note">The matrices of {{ transfer.shared | join(" and of ") }} share their colour scale.</p>
{% endif %}
</section>
"""
