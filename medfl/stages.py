"""The stages of a study, driven from the server. Each can be run alone on what the earlier ones left."""

import uuid
from collections.abc import Callable, Mapping, Sequence

from medfl import arms, finetuning
from medfl.arms import arms_of
from medfl.enrolment import Enrolled, Federation, enrol, newcomers
from medfl.exchange import Request, collect
from medfl.finetuning import Task, Tuning
from medfl.layout import Layout
from medfl.messages import SYNTHESIZE, Order
from medfl.run_folder import Event
from medfl.scoring import score
from medfl.server_state import Blueprint
from medfl.site import CENTRAL
from medfl.study import TUNED

SYNTHESIS_DEADLINE = 7 * 86400.0  # s; a latent diffusion model may take days where a round takes minutes
END_TO_END = "end_to_end"  # protocol: encoder and head of one site, tested at another
TRANSFERRED = {  # (protocol, metric) of a site's own network tested elsewhere -> kind of transfer
    ("linear", "auc"): "representation",
    ("segmentation", "dice_wt"): END_TO_END,
    ("fusion", "ssim"): END_TO_END,
    (END_TO_END, "auc"): END_TO_END,
    (END_TO_END, "dice"): END_TO_END,
}
Stage = Callable[[Federation, Sequence[Enrolled]], None]


def run(federation: Federation, stages: Sequence[str], expected: int) -> None:
    """Run the stages in the given order over the sites that answer."""
    sites: list[Enrolled] = []
    if set(stages) - {"report"}:
        sites = enrol(federation, expected)
        federation.folder.write(Event("enrol", "", 0, s.name, "site/train", float(s.volumes)) for s in sites)
    for stage in stages:
        STAGES[stage](federation, sites)
        if stage == "pretrain":  # those who came during the rounds are evaluated too
            sites = arms.merged(sites, newcomers(federation, {site.node for site in sites}))


def synthesize(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Every site makes synthetic images of its own training images and keeps them; only counts come back."""
    study, nothing = federation.study, Layout(())
    order = Order(study.source, "synthesis", "", "synthesize", 0, 0, 0, nothing.digest, uuid.uuid4().hex)
    request = Request(
        SYNTHESIZE, order, nothing, {}, nothing, nothing.digest, trains=False, deadline=SYNTHESIS_DEADLINE
    )
    for update in collect(federation, request, arms.training(sites)):
        federation.folder.write(
            Event("synthesize", "", 0, update.site, name, value) for name, value in update.metrics.items()
        )


def pretrain(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Train every arm; a finished one is not repeated, an interrupted one goes on after its last whole round.

    Where encoders are given, they are taken as they are.
    """
    study, known = federation.study, {site.node for site in sites}
    blueprint, every = Blueprint.of(study), arms_of(study, sites)
    arms.plan(federation, every)
    for name, arm in every.items():
        if arms.finished(federation.folder, name):
            continue
        if source := arms.given(study, name):
            arms.adopt(federation, name, source, blueprint)
        else:
            arms.train(federation, name, arm, blueprint, known=known if name == "federated" else None)


def evaluate(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Each arm's frozen encoder at every site, a site's own at its own; each fine-tuned network where it belongs."""
    _probe(federation, sites, lambda arm, site: not arm.startswith("local:") or arm == f"local:{site}")
    for tuning in _tuned(federation, sites):
        own = [site for site in _hospitals(sites) if tuning.site in ("", site.name)]
        _test(federation, sites, own, tuning, tuning.protocol)


def transfer(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Each encoder at every site, and each site's own network as it is at every other: the transfer matrices."""
    _probe(federation, sites, lambda arm, site: True)  # noqa: ARG005
    for tuning in _tuned(federation, sites):
        if tuning.protocol == "finetune" and tuning.encoder.startswith("local:") and tuning.fraction == 1:
            others = [site for site in _hospitals(sites) if site.name != tuning.site]
            _test(federation, sites, others, tuning, END_TO_END)
    names = {site.name for site in sites}
    rows = [row for row in federation.folder.evaluations() if row["site"] in names and _whole(row)]
    federation.folder.transfers([found for row in rows if (found := _transferred(row))])


def _transferred(row: Mapping[str, str]) -> dict[str, str] | None:
    """A row of transfer.csv from one of evaluation.csv; None where it says nothing of transfer."""
    protocol, arm = row["protocol"], row["arm"]
    own = arm.startswith("local:") and protocol == "finetune"  # of a site's own encoder only its own site tunes
    over = (arm, protocol) in (("federated", "federated_finetune"), ("central", "central_finetune"))
    kind = TRANSFERRED.get((END_TO_END if own or over else protocol, row["metric"]))
    if kind is None:
        return None
    values = {name: row[name] for name in ("metric", "value", "low", "high")}
    return {"trained_on": arm.removeprefix("local:"), "tested_on": row["site"], "kind": kind, **values}


def _whole(row: Mapping[str, str]) -> bool:
    return float(row["label_fraction"]) == 1


def _probe(federation: Federation, sites: Sequence[Enrolled], wanted: Callable[[str, str], bool]) -> None:
    """Probe what is wanted and not yet in evaluation.csv; scores are written arm by arm."""
    study, blueprint = federation.study, Blueprint.of(federation.study)
    tuned = (*TUNED, END_TO_END)
    done = {(row["arm"], row["site"]) for row in federation.folder.evaluations() if row["protocol"] not in tuned}
    for name in arms_of(study, sites):
        members = [s for s in _hospitals(sites) if wanted(name, s.name) and (name, s.name) not in done]
        if members:
            score(federation, members, arms.trained(federation, name, blueprint), arm=name)


def _tuned(federation: Federation, sites: Sequence[Enrolled]) -> list[Tuning]:
    """The fine-tunings that are there."""
    every = finetuning.tunings(federation.study, sites)
    return [tuning for tuning in every if arms.finished(federation.folder, tuning.name)]


def _test(
    federation: Federation, sites: Sequence[Enrolled], wanted: Sequence[Enrolled], tuning: Tuning, protocol: str
) -> None:
    """Test a fine-tuned network at those wanted sites that are not yet in evaluation.csv under this protocol."""
    key = {"arm": tuning.encoder, "protocol": protocol, "label_fraction": f"{tuning.fraction:g}"}
    rows = federation.folder.evaluations()
    done = {row["site"] for row in rows if all(row[name] == value for name, value in key.items())}
    members = [site for site in wanted if site.name not in done]
    if members:
        tuned = finetuning.of_tuning(federation, Task.of(sites), tuning)
        server = arms.trained(tuned, tuning.name, Blueprint.of(tuned.study))
        score(tuned, members, server, arm=tuning.encoder, protocol=protocol, fraction=tuning.fraction)


def _hospitals(sites: Sequence[Enrolled]) -> list[Enrolled]:
    return [site for site in sites if site.name != CENTRAL]


def report(federation: Federation, sites: Sequence[Enrolled]) -> None:  # noqa: ARG001
    """report.html from what the run folder holds."""
    from medfl.report.page import write

    write(federation.folder.path)


STAGES: dict[str, Stage] = {
    "synthesize": synthesize,
    "pretrain": pretrain,
    "finetune": finetuning.finetune,
    "evaluate": evaluate,
    "transfer": transfer,
    "report": report,
}
