"""The sections of the page on what happened from round to round; the macros are the page's."""

TRAINING = """
<section id="training"><h2>Training</h2>
{% if losses or pace %}
<p class="note">By round. Panels of one loss share their scale. Losses are means over a round's steps.</p>
{% for part in losses[:1] + pace %}{{ gallery(part) }}{% endfor %}
{% if losses[1:] %}
<details><summary>The terms of the loss and the method's own monitors</summary>
{% for part in losses[1:] %}{{ gallery(part) }}{% endfor %}</details>
{% endif %}
{% if tuned_losses %}
<details><summary>The loss of fine-tuning</summary>
{% for part in tuned_losses %}{{ gallery(part) }}{% endfor %}</details>
{% endif %}
{% else %}
{{ absent("No round of pretraining is recorded yet (metrics.jsonl).") }}
{% endif %}
</section>
"""

COLLAPSE = """
<section id="collapse"><h2>Collapse monitors</h2>
{% if monitors %}
<p>{{ collapse }}</p>
<p class="note">Measured by each site on its own training images, under the weights that it received.</p>
{% for part in monitors %}{{ gallery(part) }}{% endfor %}
{% else %}
{{ absent("No collapse monitor is recorded yet (metrics.jsonl).") }}
{% endif %}
</section>
"""

CODEBOOKS = """
{% if codebooks %}
<section id="codebooks"><h2>Codebooks</h2>
{% for text in codebooks.alarms %}<p class="box alarm">{{ text }}</p>{% endfor %}
<p class="note">Federated arm, by round. All sites share one codebook per scale: {{ codebooks.sizes }}. A token is one
place of a feature map; each site sends sums of its tokens by code, and the server adds them up. A code that only
few images of a site use is not sent, and counts as not used there.</p>
{{ grid(codebooks.figures) }}
{% if codebooks.more %}
<details><summary>How the sites share the codes, and codes that were revived</summary>
{{ grid(codebooks.more) }}</details>
{% endif %}
{% if codebooks.rows %}
<h3>Each site in round {{ codebooks.round }}</h3>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Codebook</th><th class="l">Site</th>
{% for heading, _ in codebooks.columns %}<th>{{ heading }}</th>{% endfor %}</tr></thead><tbody>
{% for row in codebooks.rows %}
<tr>{% if row.height %}<th rowspan="{{ row.height }}">{{ row.book }}</th>{% endif %}<td class="l">{{ row.site }}</td>
{% for text, alarm in row.cells %}<td{% if alarm %} class="bad"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<ul class="remarks note">{% for heading, reading in codebooks.columns %}
<li><b>{{ heading }}</b>: {{ reading }}</li>{% endfor %}</ul>
{% endif %}
</section>
{% endif %}
"""

REMARKS = """
{%- macro remarked(rows) %}
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Arm</th><th class="l">Rounds</th>
<th class="l">Remark</th></tr></thead><tbody>{% for row in rows %}
<tr{% if row.alarm %} class="alarm"{% endif %}><th class="l">{{ row.arm }}</th><td class="l">{{ row.rounds }}</td>
<td class="l text">{{ row.text }}</td></tr>{% endfor %}</tbody></table></div>
{%- endmacro %}
{% if remarks %}
<section id="remarks"><h2>Remarks</h2>
<p class="note">What the program noticed while it trained. A remark that came back with other numbers is shown once,
with its last numbers.</p>
{{ remarked(remarks.first) }}
{% if remarks.rest %}
<details><summary>{{ remarks.rest | length }} more</summary>{{ remarked(remarks.rest) }}</details>
{% endif %}
</section>
{% endif %}
"""
