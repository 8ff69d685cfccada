"""The model card: what an encoder is, where it comes from, what it scored and what it cannot do, from the run's files.

No site is named: a card travels further than a report.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medfl.export import image_shape, modalities, value_range
from medfl.report.rows import Score
from medfl.report.summary import ALL, Estimate, mean, number, written
from medfl.report.tables import Run, study_node
from medfl.report.wire import WORDS, size, verdict
from medfl.report.words import FROZEN, MAIN, TUNED, metric_name

NONE = "not recorded"
COUNTS, PRESENT = ("n_test", "constant_accuracy"), "_present"  # not scores of an encoder; a second form of others
PLACES = {  # first word of an arm -> how its weights came about
    "federated": "trained by all sites together: weights travelled, images did not",
    "central": "trained on the images of all sites in one place, which only a simulation can do",
    "local": "trained at one site alone",
    "random": "not trained: the weights as drawn from the seed",
}
TUNED_PLACES = {
    "finetune": "then trained further with labels or masks at one site",
    "head": "kept as it was while a head was trained on it at one site",
    "federated_finetune": "then trained further with labels or masks by all sites together",
    "federated_head": "kept as it was while all sites together trained a head on it",
    "central_finetune": "then trained further with labels or masks in one place",
}
PREPARATION = ("name", "normalize", "window", "spacing", "fit")  # of the node `data`; the others may hold paths
CLEAR = "By the roles recorded in wire.csv, no image, no patient id and no per-patient value left a site."
LIMITS = (
    "It was measured on the sites of one study. Other scanners, protocols and patients can give other results: "
    "measure it on images of your own before you rely on it.",
    "It is for research. It is no medical device, and it is not approved for diagnosis or treatment.",
    "Its features are no finding: a head that was trained and tested on known cases has to read them.",
)
TRAINED = (
    "Its weights were computed from images of the sites. Whether a single patient can be recognised from them was not "
    "tested by this export."
)


@dataclass(frozen=True)
class Arm:
    """An arm of a run folder, taken apart: `protocol` is "" for an encoder as it was pretrained."""

    encoder: str
    protocol: str = ""
    site: str = ""
    fraction: float = ALL

    @classmethod
    def of(cls, name: str) -> "Arm":
        """Of "federated", "local:A", "federated_finetune:random:0.1" or "finetune:local:A:A:1"."""
        protocol, _, rest = name.partition(":")
        if protocol not in TUNED:
            return cls(name, site=rest if protocol == "local" else "")
        middle, _, fraction = rest.rpartition(":")
        at_one_site = protocol in ("finetune", "head")
        encoder, site = middle.rsplit(":", 1) if at_one_site else (middle, "")
        return cls(encoder, protocol, site, float(fraction))

    @property
    def public(self) -> str:
        """Its name without that of a site."""
        words = (self.protocol, self.encoder.partition(":")[0], f"{self.fraction:g}" if self.protocol else "")
        return ":".join(filter(None, words))

    def owns(self, score: Score) -> bool:
        """Whether the score is of this arm: the encoder's own tests, or those of its fine-tuning."""
        protocols = (self.protocol,) if self.protocol else FROZEN | {"segmentation": "", "fusion": ""}
        return (
            score.arm == self.encoder
            and score.protocol in protocols
            and score.label_fraction == self.fraction
            and self.site in ("", score.site)
        )


def render(run: Run, facts: Mapping[str, Any], *, name: str, width: int, uses: Mapping[str, str]) -> str:
    """The card as Markdown.

    Args:
        run: the run folder.
        facts: encoder.json of the arm.
        name: of the arm.
        width: features of an image.
        uses: what is used -> lines of code that load it.
    """
    arm = Arm.of(name)
    architecture = str(facts["architecture"]["_target_"]).rpartition(".")[2]
    parts = {
        "How to use it": [*_code(uses), *_bullets(_input(run, facts))],
        "How it was trained": _bullets(_training(run, facts, arm)),
        "What it scored": _scores(run, arm),
        "What left the sites": _wire(run, name, arm),
        "What it cannot do": [f"- {text}" for text in (*LIMITS, *_own_limits(run, facts, arm))],
    }
    sections = "\n\n".join("\n".join([f"## {title}", "", *lines]) for title, lines in parts.items())
    return (
        f"# Image encoder: {run.name}, arm {arm.public}\n\n"
        f"{architecture} in {facts['input']['spatial_dims']}D: it turns an image into {width} features, for a linear "
        f"probe, a nearest-neighbour search or a head of your own. It was {_origin(arm)}.\n\n{sections}\n"
    )


def _code(uses: Mapping[str, str]) -> list[str]:
    return [line for title, code in uses.items() for line in (f"{title}:", "", "```python", code, "```", "")]


def _origin(arm: Arm) -> str:
    first = PLACES.get(arm.encoder.partition(":")[0], NONE)
    return f"{first}; {TUNED_PLACES[arm.protocol]}" if arm.protocol else first


def _input(run: Run, facts: Mapping[str, Any]) -> dict[str, str]:
    shape, (low, high) = image_shape(facts), value_range(facts)
    data = study_node(run, "data")
    prepared = ", ".join(f"{key} {data[key]}" for key in PREPARATION if data.get(key) is not None)
    found = {
        "Images": f"(N, {', '.join(map(str, shape))}) float32; other sizes were not seen in training",
        "Intensities": f"from {low:g} to {high:g}" + "; a modality that is missing is a channel of zeros" * (low == 0),
        "Channels": ", ".join(modalities(facts)),
        "Images of the study": f"{data.get('_target_', NONE)}" + f" ({prepared})" * bool(prepared),
    }
    return {key: value for key, value in found.items() if value}


def _training(run: Run, facts: Mapping[str, Any], arm: Arm) -> dict[str, str]:
    known, given = facts["provenance"], study_node(run, "provenance")
    plan = study_node(run, "finetune" if arm.protocol else "training")
    versions = {key: given[key] for key in ("medfl", "torch", "flwr", "monai", "python") if key in given}
    steps = f"{plan['steps']} steps of {plan.get('batch_size', NONE)} images per site" if "steps" in plan else NONE
    tuned = arm.protocol and arm.encoder != "random"
    together = arm.encoder == "federated" or arm.protocol.startswith("federated")
    found = {
        "Way": _origin(arm),
        "Share of the labels": f"{arm.fraction:g}" if arm.protocol else "",
        "Method": str(known.get("method", NONE)),
        "Pretrained with": str(study_node(run, "method").get("_target_", NONE)) if tuned else "",
        "Rounds": str(known.get("rounds", NONE)) + f", each {steps}" * together,
        "Sites": _sites(run, arm),
        "Aggregation": str(study_node(run, "rule").get("_target_", NONE)) if together else "",
        "Batch-norm statistics": str(facts.get("norm", NONE)) * (facts["architecture"].get("norm") == "batch"),
        "Seed": str(known.get("seed", NONE)),
        "Versions": ", ".join(f"{key} {value}" for key, value in versions.items()) or NONE,
        "Started": str(given.get("started", NONE)),
        "Weights": f"SHA-256 {facts['sha256']}",
    }
    return {key: value for key, value in found.items() if value}


def _sites(run: Run, arm: Arm) -> str:
    """How many, with how many training images; real sites tell their size when they enrol."""
    sizes = {e.site: int(e.value) for e in run.events if (e.stage, e.name) == ("enrol", "site/train")}
    sizes |= {site.name: site.train for site in run.sites}
    trained = sorted((n for name, n in sizes.items() if name not in (*run.unseen, "central")), reverse=True)
    if arm.site:
        return f"1 of {len(trained)}, with {sizes.get(arm.site, NONE)} training images"
    if arm.encoder == "random" and not arm.protocol:
        return ""
    if not trained:
        return NONE
    text = f"{len(trained)}, with {', '.join(f'{n:,}' for n in trained)} training images"
    return text + f"; {len(run.unseen)} more took no part in training" * bool(run.unseen)


def _scores(run: Run, arm: Arm) -> list[str]:
    """One row a metric, over the sites that trained and over those that took no part."""
    own = [s for s in run.scores if arm.owns(s) and s.value is not None and not _left_out(s.metric)]
    own.sort(key=lambda s: s.metric not in MAIN)
    groups = dict.fromkeys((s.protocol, s.metric, s.site in run.unseen) for s in own)
    if not groups:
        return ["No score of this arm is in the run folder."]
    untrained = Arm("random", arm.protocol, arm.site, arm.fraction)
    rows = []
    for protocol, metric, unseen in groups:
        at = {s.site: _estimate(s) for s in own if _is(s, protocol, metric) and (s.site in run.unseen) == unseen}
        base = [s for s in run.scores if untrained.owns(s) and _is(s, protocol, metric) and s.site in at]
        known = [_estimate(s) for s in base if s.value is not None]
        floor = mean(known) if len(known) == len(at) and untrained.encoder != arm.encoder else None
        values = [cell.value for cell in at.values()]
        rows.append((
            f"{({**FROZEN, **TUNED}).get(protocol, protocol)}: {metric_name(metric)}" + " (unseen sites)" * unseen,
            written(total) if (total := mean(list(at.values()))) else NONE,
            f"{len(at)}",
            f"{number(min(values))} to {number(max(values))}",
            number(floor.value) if floor else "–",
        ))  # fmt: skip
    tested = sum(s.value or 0 for s in run.scores if arm.owns(s) and _is(s, own[0].protocol, "n_test"))
    header = ("Score", "Mean over sites", "Sites", "From the lowest site to the highest", "Untrained encoder")
    notes = [f"Tested on {tested:,.0f} images of patients who were not trained on."] * bool(tested)
    notes.append("Intervals are over patients; they do not hold the chance of another seed.")
    return [*_table(header, rows), "", *notes]


def _left_out(metric: str) -> bool:
    return metric in COUNTS or metric.endswith(PRESENT)


def _is(score: Score, protocol: str, metric: str) -> bool:
    return (score.protocol, score.metric) == (protocol, metric)


def _estimate(score: Score) -> Estimate:
    return Estimate(float("nan") if score.value is None else score.value, score.low, score.high)


def _wire(run: Run, name: str, arm: Arm) -> list[str]:
    """Bytes by role over all sites, of this arm and of the encoder that it started from."""
    if "federated" not in (arm.encoder, arm.protocol.partition("_")[0]):
        return ["Nothing had to leave a site for this arm: it was not trained over several sites."]
    rows = [c for c in run.crossings if c.arm in (name, arm.encoder) and c.arm.startswith("federated")]
    if not rows:
        return ["There is no record (wire.csv) of what left the sites, so nothing can be said about it."]
    totals: dict[tuple[str, str], int] = {}
    for row in rows:
        totals[row.role, row.direction] = totals.get((row.role, row.direction), 0) + row.bytes
    roles = [role for role in WORDS if any(key[0] == role for key in totals)]
    roles += sorted({role for role, _ in totals} - {*roles})
    lines = [
        (role.replace("_", " "), WORDS.get(role, "").partition(",")[0],
         *(size(totals.get((role, way), 0)) for way in ("up", "down")))
        for role in roles
    ]  # fmt: skip
    said = verdict(run)
    return [
        *_table(("Role", "What", "Left the sites", "Reached them"), lines),
        "",
        CLEAR if said.state == "clear" else said.text,
    ]


def _own_limits(run: Run, facts: Mapping[str, Any], arm: Arm) -> Iterable[str]:
    """What does not hold for every encoder."""
    if arm.encoder != "random" or arm.protocol:
        yield TRAINED
    if facts.get("norm") == "local":
        yield "Statistics of its batch norms stayed at the sites: recalibrate them on your images before use."
    if run.sites:
        yield "Its sites were simulated on one machine, not joined over a network."
    yield from (f"When this card was written: {text}" for text in run.problems)


def _bullets(pairs: Mapping[str, str]) -> list[str]:
    return [f"- {name}: {value}" for name, value in pairs.items()]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
