"""The product: one encoder as safetensors, with all that is needed to use it and to know where it comes from."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from medfl import __version__, config
from medfl.errors import ConfigError, DataError
from medfl.files import sha256, write_bytes, write_tensors
from medfl.methods.base import Role
from medfl.server_state import Server
from medfl.study import Study
from medfl.workshop import new_method

PREFIX = "encoder."
WEIGHTS, FACTS = "encoder.safetensors", "encoder.json"
INPUT = ("spatial_dims", "channels", "size", "depth", "modalities")  # of the node `data`, where it has them
log = logging.getLogger(__name__)


def write_encoder(folder: Path, study: Study, server: Server) -> None:
    """encoder.safetensors and encoder.json: architecture, input, role of each tensor, provenance, hash.

    Heads stay behind: they belong to the pretext task. Tensors that stay at the sites (norm=local) are not in it
    either.
    """
    method = new_method(study)
    claims = {name: claim for name, claim in method.roles().items() if name.startswith(PREFIX)}
    tensors = {n.removeprefix(PREFIX): t for n, t in server.tensors().items() if n.startswith(PREFIX)}
    fixed = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in method.state_dict().items()
        if name in claims and claims[name].role is Role.FIXED
    }
    digest = write_tensors(folder / WEIGHTS, tensors | fixed)
    facts = {
        "architecture": method.encoder.describe(),  # type: ignore[operator]
        "input": {name: study.data[name] for name in INPUT if study.data.get(name) is not None},
        "roles": [
            {"name": name, "role": claims[PREFIX + name].role, "shape": list(tensor.shape)}
            for name, tensor in sorted((tensors | fixed).items())
        ],
        "norm": study.rounds.norm,
        "provenance": {
            "medfl": __version__, "arm": server.arm, "rounds": server.round, "seed": study.seed,
            "method": study.method["_target_"], "lineage": server.lineage, "parent": server.parent,
        },
        "sha256": digest,
    }  # fmt: skip
    write_bytes(folder / FACTS, json.dumps(facts, indent=1).encode())


def load_encoder(folder: Path) -> nn.Module:
    """The exported encoder in eval mode, built from encoder.json and checked against its hash.

    Raises:
        DataError: the files are missing or do not belong together.
    """
    facts = read_facts(folder)
    encoder = config.build(facts["architecture"])
    if not isinstance(encoder, nn.Module):
        raise DataError(f"{folder}/{FACTS} names no network. Copy both files again.")
    return with_weights(encoder, folder / WEIGHTS, facts["sha256"])


def with_weights(encoder: nn.Module, weights: Path, digest: str) -> nn.Module:
    """`encoder` in eval mode with the tensors of a safetensors file.

    Raises:
        DataError: the file's SHA-256 is not `digest`.
    """
    if sha256(weights) != digest:
        raise DataError(f"{weights} does not match the SHA-256 it was written with. Copy the folder again.")
    lacking = set(encoder.load_state_dict(load_file(weights), strict=False).missing_keys)
    if lacking := {name for name in lacking if not name.endswith("num_batches_tracked")}:
        log.warning("%s lacks %d tensors that stayed at the sites, such as %s: recalibrate norms on your images.",
                    weights, len(lacking), min(lacking))  # fmt: skip
    return encoder.eval()


def copy_encoder(source: Path, target: Path) -> Path:
    """Copy both files of an encoder to `target`, after its hash was checked; returns `target`.

    Raises:
        DataError: as `load_encoder`.
        ConfigError: `target` holds an encoder already.
    """
    if (target / WEIGHTS).exists():
        raise ConfigError(f"{target} holds an encoder already. Name another folder with to=FOLDER.")
    load_encoder(source)
    for name in (WEIGHTS, FACTS):
        write_bytes(target / name, (source / name).read_bytes())
    return target


def read_facts(folder: Path) -> dict[str, Any]:
    """encoder.json.

    Raises:
        DataError: it or the weights are missing, or it is something else.
    """
    weights, file = folder / WEIGHTS, folder / FACTS
    if not (weights.exists() and file.exists()):
        raise DataError(f"{folder} holds no {WEIGHTS} with {FACTS}. Give a finished run's folder.")
    facts = json.loads(file.read_text())
    if not isinstance(facts, dict) or not {"sha256", "architecture"} <= facts.keys():
        raise DataError(f"{file} is not an encoder's description. Copy both files again.")
    return facts


def image_shape(facts: Mapping[str, Any]) -> tuple[int, ...]:
    """(C, *S) of the images that the encoder was trained on."""
    given = facts["input"]
    sides = [int(given["size"])] * int(given["spatial_dims"])
    if given.get("depth") and len(sides) == 3:
        sides[-1] = int(given["depth"])
    return (int(given["channels"]), *sides)


def modalities(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the channels, where they are contrasts of one subject."""
    return tuple(facts["input"].get("modalities") or facts["architecture"].get("modalities") or ())


def value_range(facts: Mapping[str, Any]) -> tuple[float, float]:
    """Intensities of those images (medfl.data.sample): with modalities from 0, which says that one is missing."""
    return (0.0, 1.0) if modalities(facts) else (-1.0, 1.0)
