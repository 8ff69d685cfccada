"""Scores of one network at some sites: asked for, and written into the run folder."""

from collections.abc import Iterator, Mapping, Sequence

from medfl.enrolment import Enrolled, Federation
from medfl.exchange import Request, collect
from medfl.gate import Update
from medfl.layout import Layout, counts_layout
from medfl.messages import EVALUATE
from medfl.rounds import order_of
from medfl.run_folder import Counted, Evaluated
from medfl.server_state import Server

TASKS = {"segmentation": "segmentation", "fusion": "fusion", "average": "fusion"}  # by protocol; else classification


def score(
    federation: Federation,
    members: Sequence[Enrolled],
    server: Server,
    *,
    arm: str,
    protocol: str = "",
    fraction: float = 1.0,
) -> None:
    """Scores at the members' test splits into evaluation.csv, and counts of their test images into counts.jsonl.

    Args:
        arm, protocol, fraction: under which they are written; protocol "" and fraction 1: as the sites name them.
    """
    plan, sends = federation.study.evaluation, server.blueprint.sends
    for classes in dict.fromkeys(site.classes for site in members):
        those = [site for site in members if site.classes == classes]
        answers = counts_layout(plan.predicting, len(classes)) if plan.counts else Layout(())
        order = order_of(federation.study, server, server.round, 1)
        request = Request(EVALUATE, order, sends, server.flat, answers, sends.digest, trains=False)
        for update in collect(federation, request, those):
            named = {"arm": arm, "site": update.site}
            federation.folder.counted(_counted(update, answers, named, protocol, fraction, classes, plan.counts or 0))
            federation.folder.evaluated(_evaluated(update.metrics, named, protocol, fraction))  # last: it says "done"


def _evaluated(metrics: Mapping[str, float], named: dict[str, str], protocol: str, fraction: float) -> list[Evaluated]:
    """Rows of evaluation.csv from metrics named protocol[@fraction]/metric/value|low|high."""
    rows = []
    for name in sorted(metrics):
        first, _, rest = name.partition("/")
        metric, _, part = rest.partition("/")
        if part == "value":
            ends = (metrics.get(f"{first}/{metric}/{end}") for end in ("value", "low", "high"))
            kind, _, share = first.partition("@")
            cells = ("" if end is None else f"{end:.6g}" for end in ends)
            task = TASKS.get(kind, "classification")
            rows.append(Evaluated(**named, protocol=protocol or kind, metric=metric, task=task,
                                  label_fraction=share or f"{fraction:g}",
                                  **dict(zip(("value", "low", "high"), cells, strict=True))))  # fmt: skip
    return rows


def _counted(
    update: Update,
    answers: Layout,
    named: dict[str, str],
    protocol: str,
    fraction: float,
    classes: Sequence[str],
    least: int,
) -> Iterator[Counted]:
    tensors = answers.unpack(update.flat)
    for name in (key.removesuffix(".histogram") for key in tensors if key.endswith(".histogram")):
        histogram, confusion = (tensors[f"{name}.{kind}"].long().tolist() for kind in ("histogram", "confusion"))
        yield Counted(
            **named,
            protocol=protocol or name,
            label_fraction=f"{fraction:g}",
            classes=list(classes),
            least=least,
            histogram=histogram,
            confusion=confusion,
        )
