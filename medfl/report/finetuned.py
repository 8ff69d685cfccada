"""The section on fine-tuning: every arm's encoder after training with labels, beside its frozen scores."""

from collections.abc import Sequence

from medfl.report import segmentation, summary
from medfl.report.cells import NONE, Section, by_site, cell, form_of, row, words_row
from medfl.report.label_efficiency import curves
from medfl.report.scores import COUNTS
from medfl.report.sentences import recovered
from medfl.report.summary import ALL, SIGNED, Comparison, Estimate, compare_arms, difference, written
from medfl.report.tables import Run
from medfl.report.words import ARMS, FROZEN, MAIN, TITLES, TUNED, metric_name, percent

STAGE = "finetune"
BESIDE = {**FROZEN, segmentation.SEGMENTATION: "As pretrained"}  # what fine-tuning is compared with
SCRATCH = " (fine-tuned: supervised from scratch)"
HEADS = ("head", "federated_head")  # the encoder stays as it is
AGAINST = {**ARMS, "random": "supervised training from scratch"}  # where the encoder is trained too


def section(run: Run) -> Section:
    """For the template; {} where no fine-tuning is asked for and none was recorded."""
    if not asked(run):
        return {}
    tuned = [c for c in (_comparison(run, name, summary.main_metric(run, name)) for name in TUNED) if c.cells]
    return {
        "tables": [_table(run, metric) for metric in MAIN if any(c.metric == metric for c in tuned)],
        "accuracy": _accuracy(run) if any(c.metric == "auc" for c in tuned) else {},
        "gains": [_gains(c) for c in tuned if c.mean("federated")],
        "sites": [{"heading": _heading(c), **_by_site(c)} for c in tuned],
        "regions": [
            {"heading": _heading(c), **found}
            for c in tuned
            if (found := segmentation.table(run, c.protocol, c.fraction))
        ],
        "measures": [{"heading": _heading(c), **found} for c in tuned if (found := _measures(run, c))["rows"]],
        "curves": curves(run),
    }


def asked(run: Run) -> bool:
    """Whether the study fine-tunes, or a fine-tuning has been recorded."""
    stages = run.config.get("stages")
    planned = isinstance(stages, list) and STAGE in stages
    return planned or any(s.protocol in TUNED for s in run.scores) or any(e.stage == STAGE for e in run.events)


def remark(run: Run, main: Comparison) -> str:
    """For the top of the page: what the federated encoder reaches when it is fine-tuned, against no pretraining."""
    for protocol in TUNED:
        scores = _comparison(run, protocol, summary.main_metric(run, protocol))
        federated, scratch = scores.mean("federated"), scores.mean("random")
        if federated and protocol != main.protocol:
            text = f"{_heading(scores)}, the federated encoder reaches a mean {metric_name(scores.metric)} of "
            other = "with an untrained encoder" if protocol in HEADS else "from scratch"
            return text + written(federated) + (f", against {scratch.value:.3f} {other}" if scratch else "") + "."
    return ""


def _comparison(run: Run, protocol: str, metric: str) -> Comparison:
    """With all labels, or with the most that were measured."""
    known = summary.fractions(run, protocol, metric)
    return compare_arms(run, protocol, metric, ALL if ALL in known else max(known, default=ALL))


def _heading(scores: Comparison) -> str:
    name = {**BESIDE, **TUNED}.get(scores.protocol, scores.protocol)
    return name if scores.fraction == ALL else f"{name}, {percent(scores.fraction)} of the labels"


def _columns(run: Run, metric: str) -> list[Comparison]:
    """The protocols that have this metric, those of the frozen encoder first."""
    return [c for c in (_comparison(run, protocol, metric) for protocol in (*BESIDE, *TUNED)) if c.cells]


def _table(run: Run, metric: str) -> Section:
    """Arms by protocol, means over sites."""
    columns = _columns(run, metric)
    return {
        "metric": metric_name(metric)[:1].upper() + metric_name(metric)[1:],
        "columns": [_heading(c) for c in columns],
        "rows": [*_arm_rows(columns), words_row("Sites", [str(len(c.compared)) for c in columns])],
    }


def _arm_rows(columns: Sequence[Comparison]) -> list[Section]:
    form = form_of(columns[0].metric)
    arms = [arm for arm in ARMS if any(arm in c.arms for c in columns)]
    return [row(TITLES[a] + SCRATCH * (a == "random"), [c.mean(a) for c in columns], form=form) for a in arms]


def _accuracy(run: Run) -> Section:
    """Accuracy by arm and protocol, and below it that of always naming the most frequent class, at the same sites."""
    columns = _columns(run, "accuracy")
    floors = [_floor(run, c) for c in columns]
    low = [
        f"{TITLES[arm]} ({_heading(c)})"
        for c, floor in zip(columns, floors, strict=True)
        for arm in c.arms
        if floor is not None and (known := c.mean(arm)) and known.value <= floor
    ]
    return {
        "columns": [_heading(c) for c in columns],
        "rows": [
            *_arm_rows(columns),
            words_row("Constant predictor", [NONE if floor is None else f"{floor:.3f}" for floor in floors]),
        ],
        "low": low,
    } if columns else {}  # fmt: skip


def _floor(run: Run, scores: Comparison) -> float | None:
    """Mean accuracy of the constant predictor; it depends on the test split alone."""
    known = {s.site: s.value for s in run.scores if s.metric == "constant_accuracy" and s.value is not None}
    if not scores.compared or not known.keys() >= set(scores.compared):
        return None
    return sum(known[site] for site in scores.compared) / len(scores.compared)


def _gains(scores: Comparison) -> Section:
    """Federated pretraining minus each other arm under one protocol, and the recovered gap."""
    federated = scores.mean("federated")
    others = {arm: known for arm in ARMS if arm != "federated" and (known := scores.mean(arm))}
    names = ARMS if scores.protocol in HEADS else AGAINST
    gains = [(names[arm], _written(difference(federated, known))) for arm, known in others.items()] if federated else []
    return {"heading": _heading(scores), "gains": gains, "gap": recovered(scores)}


def _written(change: Estimate) -> Section:
    return {**cell(change, SIGNED), "text": written(change, SIGNED)}


def _by_site(scores: Comparison) -> Section:
    return {"columns": [TITLES[arm] for arm in scores.arms], "rows": by_site(scores, scores.arms)}


def _measures(run: Run, scores: Comparison) -> Section:
    """Every other metric of a protocol as means over sites; those of single regions have a table of their own."""
    names = sorted(
        {s.metric for s in run.scores if (s.protocol, s.label_fraction) == (scores.protocol, scores.fraction)}
        - {scores.metric, *COUNTS}
    )
    found = {
        name: compare_arms(run, scores.protocol, name, scores.fraction)
        for name in names
        if not (scores.metric.startswith("dice") and segmentation.OF_REGION.fullmatch(name))
    }
    rows = [
        row(
            metric_name(name)[:1].upper() + metric_name(name)[1:],
            [c.mean(arm) for arm in scores.arms],
            form=form_of(name),
        )
        for name, c in found.items()
        if c.cells
    ]
    return {"columns": [TITLES[arm] for arm in scores.arms], "rows": rows}
