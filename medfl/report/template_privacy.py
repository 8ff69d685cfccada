"""The section of the page on privacy."""

PRIVACY = """
{% if privacy %}
<section id="privacy"><h2>Privacy</h2>
{% if not privacy.mechanism %}
<p>The study has no differential privacy.</p>
{% elif privacy.rows %}
<h3>Differential privacy</h3>
<p class="box {{ 'alarm' if privacy.weak else 'clear' }}">Largest ε of a site: {{ privacy.worst }}, together with its δ
below{% if privacy.weak %}. Above 10 this is no protection worth the name{% endif %}.</p>
<p>Unit: {{ privacy.unit }}. Mechanism {{ privacy.mechanism }}: gradients of a
{{ "patient" if privacy.mechanism == "patient" else "bucket of patients" }} are clipped to {{ privacy.clip }} and get
noise of {{ privacy.noise }} times that, at the site; the guarantee holds against the coordinator too. ε counts all
that a site has released of its training patients, in earlier studies too; a patient of two sites has the sum of
both.</p>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Site</th><th>ε by RDP</th><th>ε, smaller of RDP and
PRV</th><th>δ</th></tr></thead><tbody>
{% for row in privacy.rows %}
<tr><th>{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="note">Not covered by ε: scores and counts of test images, and probes fitted on a site's own labels to get
them; the numbers of images; times; whatever chose the study's settings.</p>
{% else %}
{{ absent("No site has told of what it spent.") }}
{% endif %}
{% if privacy.attacks %}
<h3>Attacks</h3>
{% for text in privacy.attacks.broken %}<p class="box alarm">{{ text }}</p>{% endfor %}
<p class="note">On {{ privacy.attacks.site }}, the site with the fewest training patients
({{ privacy.attacks.patients }}). An attack that fails proves nothing; there are others.</p>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Attack</th><th class="l">Found</th>
<th class="l">To compare</th></tr></thead><tbody>
{% for row in privacy.attacks.rows %}
<tr>{% for cell in row %}<td class="l">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>
{% endif %}
"""
