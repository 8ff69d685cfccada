"""The stages of a study, driven from the server: pretrain, evaluate, transfer, report. Each can be run alone."""

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from safetensors.torch import load_file

from medfl import checkpoint
from medfl.errors import ConfigError
from medfl.exchange import Enrolled, Federation, Request, collect, enrol, newcomers
from medfl.export import write_encoder
from medfl.files import write_tensors
from medfl.layout import Layout
from medfl.messages import EVALUATE, SYNTHESIZE, Order
from medfl.rounds import (
    join_codebooks,
    order_of,
    refresh,
    run_round,
    seed_codebooks,
    stop_if_collapsed,
)
from medfl.run_folder import Evaluated, Event
from medfl.server_state import Blueprint, Server
from medfl.site import CENTRAL
from medfl.study import Study

SYNTHESIS_DEADLINE = 7 * 86400.0  # s; a latent diffusion model may take days where a round takes minutes
Stage = Callable[[Federation, Sequence[Enrolled]], None]


@dataclass(frozen=True)
class Arm:
    """A way to train the encoder: which sites, and how many steps each per round."""

    members: Sequence[Enrolled]
    steps: int


def run(federation: Federation, stages: Sequence[str], expected: int) -> None:
    """Run the stages in the given order over the sites that answer."""
    sites: list[Enrolled] = []
    if set(stages) - {"report"}:
        sites = enrol(federation, expected)
        federation.folder.write(Event("enrol", "", 0, s.name, "site/train", float(s.volumes)) for s in sites)
    for stage in stages:
        STAGES[stage](federation, sites)
        if stage == "pretrain":  # those who came during the rounds are evaluated too
            sites = _with(sites, newcomers(federation, {site.node for site in sites}))


def _with(sites: Sequence[Enrolled], new: Sequence[Enrolled]) -> list[Enrolled]:
    """All of them by name; a site that came back on another node is there once, on the new one."""
    found = {site.name: site for site in (*sites, *new)}
    return [found[name] for name in sorted(found)]


def arms_of(study: Study, sites: Sequence[Enrolled]) -> dict[str, Arm]:
    """The study's arms. All that train see equal numbers of samples: a lone site takes everybody's steps."""
    members = [site for site in sites if not site.held_out and site.name != CENTRAL]
    whole = [site for site in sites if site.name == CENTRAL]
    steps, all_steps = study.training.steps, study.training.steps * len(members)
    arms = {"random": Arm(members, 0), "federated": Arm(members, steps)}
    arms |= {f"local:{site.name}": Arm([site], all_steps) for site in members}
    if whole:  # only a simulation has one place with all data
        arms["central"] = Arm(whole, all_steps)
    return {arm: value for arm, value in arms.items() if arm.partition(":")[0] in study.arms}


def synthesize(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Every site makes synthetic images of its own training images and keeps them; only counts come back."""
    study, nothing = federation.study, Layout(())
    order = Order(study.source, "synthesis", "", "synthesize", 0, 0, 0, nothing.digest, uuid.uuid4().hex)
    request = Request(
        SYNTHESIZE, order, nothing, {}, nothing, nothing.digest, trains=False, deadline=SYNTHESIS_DEADLINE
    )
    members = [site for site in sites if not site.held_out and site.name != CENTRAL]
    for update in collect(federation, request, members):
        federation.folder.write(
            Event("synthesize", "", 0, update.site, name, value) for name, value in update.metrics.items()
        )


def pretrain(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Train every arm; a finished one is not repeated, an interrupted one goes on after its last whole round."""
    blueprint = Blueprint.of(federation.study)
    for name, arm in arms_of(federation.study, sites).items():
        if not (federation.folder.arm(name) / "model.safetensors").exists():
            _train(federation, name, arm, blueprint, known={site.node for site in sites})


def _train(federation: Federation, name: str, arm: Arm, blueprint: Blueprint, known: set[int]) -> None:
    study, folder = federation.study, federation.folder.arm(name)
    saved, damaged = checkpoint.newest(folder / "checkpoints")
    server = Server.start(study, name, blueprint, saved)
    federation.folder.forget_after(name, server.round)
    federation.folder.write(Event("pretrain", name, server.round, "", "checkpoint/damaged", 1.0, d) for d in damaged)
    members = arm.members
    if arm.steps and server.round == 0:
        seed_codebooks(federation, server, members)
    while arm.steps and server.round < study.rounds.count:
        if name == "federated":
            members = _welcome(federation, server, members, known)
        run_round(federation, server, members, arm.steps)
        checkpoint.save(folder / "checkpoints", server.round, server.checkpoint(), keep=study.rounds.keep_checkpoints)
        stop_if_collapsed(study, server)
    refresh(federation, server, members)
    write_encoder(folder, study, server)
    write_tensors(folder / "model.safetensors", server.tensors())


def _welcome(
    federation: Federation, server: Server, members: Sequence[Enrolled], known: set[int]
) -> Sequence[Enrolled]:
    """The members of the next round, with the sites that came online since the last, or came back on another node."""
    new = [site for site in newcomers(federation, known) if not site.held_out and site.name != CENTRAL]
    late = [site for site in new if site.name not in {member.name for member in members}]
    join_codebooks(federation, server, len(members), late)
    federation.folder.write(Event("pretrain", server.arm, server.round + 1, site.name, "joined", 1.0) for site in late)
    return _with(members, new)


def evaluate(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Each arm's frozen encoder at every site; a site's own encoder at its own site."""
    _probe(federation, sites, lambda arm, site: not arm.startswith("local:") or arm == f"local:{site}")


def transfer(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Each encoder at every site: the representation transfer matrix."""
    _probe(federation, sites, lambda arm, site: True)  # noqa: ARG005
    names = {site.name for site in sites}
    federation.folder.transfers(
        [
            {
                "trained_on": row["arm"].removeprefix("local:"),
                "tested_on": row["site"],
                "kind": "representation",
                **{name: row[name] for name in ("metric", "value", "low", "high")},
            }
            for row in federation.folder.evaluations()
            if row["protocol"] == "linear" and row["metric"] == "auc" and row["site"] in names
        ]
    )


def _probe(federation: Federation, sites: Sequence[Enrolled], wanted: Callable[[str, str], bool]) -> None:
    """Probe what is wanted and not yet in evaluation.csv; scores are written arm by arm."""
    study, blueprint = federation.study, Blueprint.of(federation.study)
    done = {(row["arm"], row["site"]) for row in federation.folder.evaluations()}
    hospitals = [site for site in sites if site.name != CENTRAL]
    for name in arms_of(study, sites):
        members = [s for s in hospitals if wanted(name, s.name) and (name, s.name) not in done]
        if not members:
            continue
        server = _trained(federation, name, blueprint)
        order = order_of(study, server, server.round, 1)
        request = Request(
            EVALUATE, order, blueprint.sends, server.flat, Layout(()), blueprint.sends.digest, trains=False
        )
        for update in collect(federation, request, members):
            federation.folder.evaluated(_evaluated(name, update.site, update.metrics))


def _trained(federation: Federation, arm: str, blueprint: Blueprint) -> Server:
    """The finished model of an arm, with the lineage under which the sites kept their own part.

    Raises:
        ConfigError: the arm has not been trained.
    """
    folder, study = federation.folder.arm(arm), federation.study
    if not (folder / "model.safetensors").exists():
        raise ConfigError(f"arm '{arm}' has no trained model in {folder}. Run the stage pretrain first.")
    saved, _ = checkpoint.newest(folder / "checkpoints")
    server = Server.start(study, arm, blueprint, saved)
    tensors = load_file(folder / "model.safetensors")
    server.flat.update(blueprint.sends.pack(tensors))
    return server


def _evaluated(arm: str, site: str, metrics: Mapping[str, float]) -> Iterable[Evaluated]:
    """Rows of evaluation.csv from metrics named protocol/metric/value|low|high."""
    for name in sorted(metrics):
        protocol, _, rest = name.partition("/")
        metric, _, part = rest.partition("/")
        if part == "value":
            low, high = (metrics.get(f"{protocol}/{metric}/{end}") for end in ("low", "high"))
            yield Evaluated(
                arm, site, protocol, metric, f"{metrics[name]:.6g}",
                "" if low is None else f"{low:.6g}", "" if high is None else f"{high:.6g}",
            )  # fmt: skip


def report(federation: Federation, sites: Sequence[Enrolled]) -> None:  # noqa: ARG001
    """report.html from what the run folder holds."""
    from medfl.report.page import write

    write(federation.folder.path)


STAGES: dict[str, Stage] = {
    "synthesize": synthesize,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "transfer": transfer,
    "report": report,
}
