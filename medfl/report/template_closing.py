"""The last sections of the page: what the study cost, what left the sites, and where it comes from."""

COMPUTE = """
{%- macro costs(rows, first, runs) %}
<div class="scroll" tabindex="0"><table><thead><tr>{% for title in first %}<th class="l">{{ title }}</th>{% endfor %}
{% if runs %}<th>Trainings</th>{% endif %}<th>Rounds</th><th>Steps</th><th>Images seen</th><th>Left the sites</th>
<th>Arrived</th><th>Time at sites</th><th>Time of rounds</th></tr></thead><tbody>
{% for row in rows %}
<tr>{% if row.height %}<th rowspan="{{ row.height }}">{{ row.name }}</th>{% endif %}
{% for text in row.words %}<td class="l">{{ text }}</td>{% endfor %}
{% for text in row.cells %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{%- endmacro %}
{% if compute %}
<section id="compute"><h2>Cost</h2>
{% for text in compute.uneven %}<p class="box">{{ text }}</p>{% endfor %}
{% if compute.even %}<p>All pretrained arms saw equally many images.</p>{% endif %}
<p class="note">Steps are added up over sites and rounds. Images seen count repeats. Time at sites is added up over the
sites; rounds also wait and send.{% if compute.simulated %} Of the arms Alone and Central nothing crosses a border: this
is a simulation.{% endif %}</p>
{% if compute.pretrain %}{{ costs(compute.pretrain, ["Pretraining"], false) }}{% endif %}
{% if compute.finetune %}
<details><summary>Fine-tuning</summary>
{{ costs(compute.finetune, ["Protocol", "Encoder", "Labels"], true) }}</details>
{% endif %}
</section>
{% endif %}
"""

WIRE = """
<section id="wire"><h2>What left each site</h2>
<p class="box {{ wire.state }}">{{ wire.text }}</p>
{% if wire.rows %}
<p>In all, {{ wire.up }} left the sites and {{ wire.down }} arrived, over all stages
{%- if wire.simulated %} of the federated arm. The arms that it is compared with are trained inside the simulation and
are not counted{% endif %}.</p>
<div class="scroll" tabindex="0"><table class="wire"><thead><tr><th class="l">Site</th><th class="l">Direction</th>
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
<details{{ " open" if wire.metrics | length < 40 }}><summary>Numbers that left, by name; scores with their
intervals</summary>
<p class="names">{% for name in wire.metrics %}<code>{{ name }}</code>{% endfor %}</p></details>
{% endif %}
</section>
"""

CLOSING = """
<section id="refusals"><h2>Refusals and incidents</h2>
{% if refusals.rows %}
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Round</th><th class="l">Stage</th>
<th class="l">Arm</th><th class="l">Site</th><th class="l">What</th><th class="l">Reason</th></tr></thead><tbody>
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
<div class="scroll" tabindex="0"><table>{% for file, digest in provenance.hashes.items() %}
<tr><th class="l">{{ file }}</th><td class="l"><code>{{ digest }}</code></td></tr>{% endfor %}</table></div>
{% if provenance.config %}
<details><summary>The resolved study (config.yaml)</summary>
<pre>{{ provenance.config }}</pre></details>
{% endif %}
</section>

<section id="limits"><h2>What this page does not say</h2>
<ul class="limits">{% for text in limits %}<li>{{ text }}</li>{% endfor %}</ul></section>
"""
