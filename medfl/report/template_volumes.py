"""The section of the page on fused and segmented images; the macros are the page's."""

VOLUMES = """
{%- macro named(row) -%}
{{ row.name }}{% if row.tag %} <span class="tag">{{ row.tag }}</span>{% endif %}
{%- endmacro %}
{%- macro scored(table, first, rows) %}
<div class="scroll"><table><thead><tr>{% for title in first %}<th class="l">{{ title }}</th>{% endfor %}
{% for title in table.columns %}<th>{{ title }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}
<tr{% if row.whole %} class="sum"{% endif %}>
{% if row.height %}<th rowspan="{{ row.height }}">{{ row.group or named(row) }}</th>{% endif %}
{% if row.group %}<td class="l">{{ named(row) }}</td>{% endif %}
{% for cell in row.cells %}{{ number(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{%- endmacro %}
{% if volumes %}
<section id="volumes"><h2>Fusion and segmentation</h2>
{% if volumes.owners %}
<h3>Who holds which modality</h3>
<p class="note">Training images that have it, and training images with a mask.</p>
<div class="scroll"><table><thead><tr><th class="l">Site</th>
{% for name in volumes.modalities %}<th>{{ name }}</th>{% endfor %}<th>With a mask</th></tr></thead><tbody>
{% for row in volumes.owners %}
<tr><th>{{ named(row) }}</th>
{% for count in row.counts %}<td>{{ count }}</td>{% endfor %}<td>{{ row.labelled }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<h3>Segmentation</h3>
{% if volumes.segmentation %}
<p class="note">Dice on each site's own labelled test images, 95 % intervals. An image without such tumour counts 1 if
none is found there, else 0.</p>
{{ scored(volumes.segmentation, ["Region", "Site"], volumes.segmentation.sites) }}
{% if volumes.segmentation.means %}
<details><summary>Other measures</summary>
<p class="note">Means over {{ volumes.segmentation.over }}
site{{ "" if volumes.segmentation.over == 1 else "s" }}. HD95 is 0 where truth and prediction are both
empty, and the image's diagonal where only one is.</p>
{{ scored(volumes.segmentation, ["Measure", "Region"], volumes.segmentation.means) }}
</details>
{% endif %}
{% else %}
{{ absent("No segmentation score yet (evaluation.csv).") }}
{% endif %}
<h3>Fusion</h3>
{% if volumes.fusion %}
<p class="note">{{ volumes.fusion.metric }} of the fused image and its sources, on each site's own test images of two
modalities or more, 95 % intervals. The first column has the plain mean of the sources in place of the fused image.</p>
{{ scored(volumes.fusion, ["Site"], volumes.fusion.sites) }}
<p class="note">All measures, means over {{ volumes.fusion.over }}
site{{ "" if volumes.fusion.over == 1 else "s" }}.</p>
{{ scored(volumes.fusion, ["Measure"], volumes.fusion.means) }}
<ul class="remarks note">{% for name, reading in volumes.fusion.readings %}
<li><b>{{ name }}</b>: {{ reading }}</li>{% endfor %}</ul>
{% else %}
{{ absent("No fusion score yet (evaluation.csv).") }}
{% endif %}
{% if volumes.pictures %}
<h3>Pictures</h3>
<p class="box"><b>These are test images of the sites.</b> Each site drew its own, and no picture was sent. They are on
this page only because this machine holds all sites of a simulation. Before you give the page to anybody who may not see
them, remove {{ volumes.place }} from the run folder and write the report again.</p>
{% for part in volumes.pictures %}
<details{{ " open" if loop.first }}><summary>{{ part.site }}, arm {{ part.arm }}</summary>
{% for caption, address in part.figures %}
<figure class="picture"><figcaption>{{ caption }}</figcaption>
<img alt="{{ caption }}, {{ part.site }}" src="{{ address }}"></figure>{% endfor %}</details>
{% endfor %}
{% endif %}
</section>
{% endif %}
"""
