"""The sections of the page on images: fused, segmented, made up, and the sites' own; the macros are the page's."""

VOLUMES = """
{% if volumes %}
<section id="volumes"><h2>Fusion and segmentation</h2>
{% if volumes.owners %}
<h3>Who holds which modality</h3>
<p class="note">Training images that have it, and training images with a mask.</p>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Site</th>
{% for name in volumes.modalities %}<th>{{ name }}</th>{% endfor %}<th>With a mask</th></tr></thead><tbody>
{% for row in volumes.owners %}
<tr><th>{{ named(row) }}</th>
{% for count in row.counts %}<td>{{ count }}</td>{% endfor %}<td>{{ row.labelled }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if volumes.segmentation %}
<h3>Segmentation</h3>
<p class="note">Dice on each site's own labelled test images, 95 % intervals. An image without such a region counts
1 if none is found there, else 0.</p>
{{ scored(volumes.segmentation.columns, ["Region", "Site"], volumes.segmentation.sites) }}
{% if volumes.segmentation.means %}
<details><summary>Other measures</summary>
<p class="note">Means over {{ sites_of(volumes.segmentation.over) }}. HD95 is 0 where truth and prediction are both
empty, and the image's diagonal where only one is.</p>
{{ scored(volumes.segmentation.columns, ["Measure", "Region"], volumes.segmentation.means) }}
</details>
{% endif %}
{% elif "segmentation" in volumes.asked %}
<h3>Segmentation</h3>
{{ absent("No segmentation score yet (evaluation.csv).") }}
{% endif %}
{% if volumes.fusion %}
<h3>Fusion</h3>
<p class="note">{{ volumes.fusion.metric }} of the fused image and its sources, on each site's own test images of two
modalities or more, 95 % intervals. The first column has the plain mean of the sources in place of the fused image.</p>
{{ scored(volumes.fusion.columns, ["Site"], volumes.fusion.sites) }}
<p class="note">All measures, means over {{ sites_of(volumes.fusion.over) }}.</p>
{{ scored(volumes.fusion.columns, ["Measure"], volumes.fusion.means) }}
<ul class="remarks note">{% for name, reading in volumes.fusion.readings %}
<li><b>{{ name }}</b>: {{ reading }}</li>{% endfor %}</ul>
{% elif "fusion" in volumes.asked %}
<h3>Fusion</h3>
{{ absent("No fusion score yet (evaluation.csv).") }}
{% endif %}
</section>
{% endif %}
"""

PICTURES = """
{% if pictures %}
<section id="pictures"><h2>Pictures</h2>
<p class="box"><b>These are test images of the sites.</b> Each site drew its own, and no picture was sent. They are on
this page only because this machine holds all sites of a simulation. Before you give the page to anybody who may not see
them, remove {{ pictures.place }} from the run folder and write the report again.</p>
{% if pictures.left_out %}
<p class="note">To keep the page small, some are not on it: {{ pictures.left_out }}. See {{ pictures.place }}.</p>
{% endif %}
{% for site, figures in pictures.sites %}
<details{{ " open" if loop.first }}><summary>{{ site }}</summary>
{% for drawn in figures %}
<figure class="picture"><figcaption>{{ drawn.caption }}</figcaption>
<img alt="{{ drawn.caption }}, {{ site }}" src="{{ drawn.address }}"></figure>{% endfor %}</details>
{% endfor %}
</section>
{% endif %}
"""

SYNTHETIC = """
{% if synthetic %}
<section id="synthetic"><h2>Synthetic images</h2>
<p>Each site trained a generator on its own training images, sorted what it drew, and kept the rest on its own disk:
neither images nor generator left a site, only the numbers below.
{% if synthetic.used %}Pretraining used {{ "%.3g" | format(synthetic.used) }} of them for each real image.
{% else %}Pretraining used none of them.{% endif %}</p>
<p class="note">Images by what became of them; one that fails several tests is counted under the first. Copies among all
are those that the copy test found, whatever else was wrong with them, with a 95 % interval. Images may be exported only
where the copy test was shown to find planted copies and had enough images of other patients.</p>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Site</th>
{% for name in synthetic.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for site, cells in synthetic.rows %}
<tr><th>{{ site }}</th>{% for cell in cells %}{{ number(cell) }}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</section>
{% endif %}
"""
