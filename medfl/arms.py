"""Arms: ways to train one network over some sites, each from its start to its finished files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from medfl import checkpoint, export
from medfl.enrolment import Enrolled, Federation, newcomers
from medfl.errors import ConfigError
from medfl.files import unpacked, write_tensors
from medfl.layout import Tensors
from medfl.rounds import join_codebooks, refresh, run_round, seed_codebooks, stop_if_collapsed
from medfl.run_folder import Event, RunFolder
from medfl.server_state import Blueprint, Server
from medfl.site import CENTRAL
from medfl.study import Study

WEIGHTS = "model.safetensors"  # in an arm's folder, when it is finished


@dataclass(frozen=True)
class Arm:
    """A way to train the network: which sites, and how many steps each per round."""

    members: Sequence[Enrolled]
    steps: int


def arms_of(study: Study, sites: Sequence[Enrolled]) -> dict[str, Arm]:
    """The study's arms. All that train see equal numbers of samples: a lone site takes everybody's steps.

    Where encoders are given, the arms that have one; they are not trained.
    """
    members = training(sites)
    whole = [site for site in sites if site.name == CENTRAL]
    steps, all_steps = study.training.steps, study.training.steps * len(members)
    arms = {"random": Arm(members, 0), "federated": Arm(members, steps)}
    arms |= {f"local:{site.name}": Arm([site], all_steps) for site in members}
    if whole:  # only a simulation has one place with all data
        arms["central"] = Arm(whole, all_steps)
    wanted = {arm: value for arm, value in arms.items() if arm.partition(":")[0] in study.arms}
    if study.encoders is None:
        return wanted
    return {name: replace(arm, steps=0) for name, arm in wanted.items() if name == "random" or given(study, name)}


def given(study: Study, name: str) -> Path | None:
    """The folder of the encoder that `run.encoders` gives for an arm; None: it is trained."""
    if study.encoders is None or name == "random":
        return None
    folder = RunFolder(Path(study.encoders)).arm(name)
    return folder if (folder / export.WEIGHTS).exists() else None


def training(sites: Sequence[Enrolled]) -> list[Enrolled]:
    """The sites that take part in training."""
    return [site for site in sites if not site.held_out and site.name != CENTRAL]


def merged(sites: Sequence[Enrolled], new: Sequence[Enrolled]) -> list[Enrolled]:
    """All of them by name; a site that came back on another node is there once, on the new one."""
    found = {site.name: site for site in (*sites, *new)}
    return [found[name] for name in sorted(found)]


def plan(federation: Federation, every: Mapping[str, Arm], rounds: int | None = None) -> None:
    """Say how many rounds are to come, of the arms that are not finished.

    Args:
        rounds: of each; None: the study's.
    """
    left = sum(bool(arm.steps) and not finished(federation.folder, name) for name, arm in every.items())
    count = federation.study.rounds.count if rounds is None else rounds
    federation.folder.write([Event(federation.stage, "", 0, "", "planned", float(left * count))])


def finished(folder: RunFolder, name: str) -> bool:
    return (folder.arm(name) / WEIGHTS).exists()


def train(
    federation: Federation,
    name: str,
    arm: Arm,
    blueprint: Blueprint,
    *,
    known: set[int] | None = None,
    parent: str = "",
) -> None:
    """Train an arm to its end; an interrupted one goes on after its last whole round.

    Args:
        known: nodes asked so far; others that come online join the rounds. None: nobody joins.
        parent: lineage under which the sites keep their own part of what this arm starts from.
    """
    study, folder = federation.study, federation.folder.arm(name)
    saved, damaged = checkpoint.newest(folder / "checkpoints")
    server = Server.start(study, name, blueprint, saved, parent=parent)
    federation.folder.forget_after(name, server.round)
    federation.folder.write(
        Event(federation.stage, name, server.round, "", "checkpoint/damaged", 1.0, text) for text in damaged
    )
    members = arm.members
    if arm.steps and server.round == 0:
        seed_codebooks(federation, server, members)
    while arm.steps and server.round < study.rounds.count:
        if known is not None:
            members = _welcome(federation, server, members, known)
        run_round(federation, server, members, arm.steps)
        checkpoint.save(folder / "checkpoints", server.round, server.checkpoint(), keep=study.rounds.keep_checkpoints)
        stop_if_collapsed(study, server)
    refresh(federation, server, members)
    export.write_encoder(folder, study, server)
    write_tensors(folder / WEIGHTS, server.tensors())


def adopt(federation: Federation, name: str, folder: Path, blueprint: Blueprint) -> None:
    """Take the encoder in a folder as an arm's, as it is, its norms too; the heads stay untrained.

    Raises:
        ConfigError: it is of another architecture than the study's.
        DataError: its files do not belong together.
    """
    export.load_encoder(folder)  # checks the hash
    tensors = {f"{export.PREFIX}{key}": tensor for key, tensor in unpacked(folder / export.WEIGHTS).items()}
    wanted = {slot.name: slot.shape for slot in blueprint.sends.slots if slot.name.startswith(export.PREFIX)}
    odd = sorted(key for key, shape in wanted.items() if key not in tensors or tuple(tensors[key].shape) != shape)
    if odd:
        got = tuple(tensors[odd[0]].shape) if odd[0] in tensors else "nothing"
        raise ConfigError(
            f"{folder}: the encoder of arm '{name}' has {got} for '{odd[0]}', the "
            f"study's encoder needs {wanted[odd[0]]}. Choose encoder= and data.channels as {folder}/encoder.json says."
        )
    server = Server.start(federation.study, name, starting_from(blueprint, tensors), None)
    export.write_encoder(federation.folder.arm(name), federation.study, server)
    write_tensors(federation.folder.arm(name) / WEIGHTS, server.tensors())


def _welcome(
    federation: Federation, server: Server, members: Sequence[Enrolled], known: set[int]
) -> Sequence[Enrolled]:
    """The members of the next round, with the sites that came online since the last, or came back on another node."""
    new = training(newcomers(federation, known))
    late = [site for site in new if site.name not in {member.name for member in members}]
    join_codebooks(federation, server, len(members), late)
    federation.folder.write(
        Event(federation.stage, server.arm, server.round + 1, site.name, "joined", 1.0) for site in late
    )
    return merged(members, new)


def trained(federation: Federation, name: str, blueprint: Blueprint) -> Server:
    """The finished model of an arm, with the lineage under which the sites kept their own part.

    Raises:
        ConfigError: the arm has not been trained.
    """
    tensors = weights(federation.folder, name, federation.stage)
    saved, _ = checkpoint.newest(federation.folder.arm(name) / "checkpoints")
    server = Server.start(federation.study, name, blueprint, saved)
    server.flat.update(blueprint.sends.pack(tensors))
    return server


def weights(folder: RunFolder, name: str, stage: str = "pretrain") -> Tensors:
    """
    Raises:
        ConfigError: the arm has not been trained.
        DataError: its file is damaged.
    """
    if not finished(folder, name):
        raise ConfigError(f"arm '{name}' has no trained model in {folder.arm(name)}. Run the stage {stage} first.")
    return unpacked(folder.arm(name) / WEIGHTS)


def starting_from(blueprint: Blueprint, tensors: Mapping[str, Tensor]) -> Blueprint:
    """The blueprint with some of its initial tensors replaced; other names are left out."""
    initial = blueprint.sends.unpack(blueprint.initial)
    return replace(
        blueprint, initial=blueprint.sends.pack({**initial, **{n: t for n, t in tensors.items() if n in initial}})
    )
