"""Server state on disk: written whole and atomically after every round, read back with its hash checked."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfl.errors import DataError
from medfl.faults import point
from medfl.files import room_for, sync_folder, unpacked, write_bytes, write_tensors

Tensors = dict[str, Tensor]
CHECK = "check"  # key of the hash over all other facts


@dataclass(frozen=True)
class Checkpoint:
    """Tensors and the facts needed to go on: round, lineage, layout, norms accepted so far."""

    tensors: Tensors
    facts: dict[str, Any]


def save(folder: Path, round: int, checkpoint: Checkpoint, *, keep: int) -> None:  # noqa: A002
    """Write `folder/round-0007/`, then drop all but the last `keep`.

    Raises:
        ResourceError: the disk is full; earlier checkpoints are untouched.
    """
    target, draft = folder / f"round-{round:04d}", folder / f".round-{round:04d}.draft"
    with room_for(target):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        digest = write_tensors(draft / "state.safetensors", checkpoint.tensors)
        point("during_checkpoint")
        facts = {**checkpoint.facts, "round": round, "sha256": digest}
        facts[CHECK] = _digest(facts)
        write_bytes(draft / "state.json", json.dumps(facts, indent=1).encode())
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
        point("after_rename")
        sync_folder(folder)
    for old in saved(folder)[:-keep]:
        shutil.rmtree(old)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not.

    Raises:
        DataError: checkpoints are there, and none is whole.
    """
    damaged: list[str] = []
    for path in reversed(saved(folder)):
        try:
            return _read(path), damaged
        except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError) as error:
            damaged.append(f"{path} is damaged ({error}); going back to the one before.")
    if damaged:
        raise DataError(f"no checkpoint under {folder} is whole: {damaged[0]} Remove the folder to start anew.")
    return None, []


def _read(path: Path) -> Checkpoint:
    facts = json.loads((path / "state.json").read_bytes())
    content = (path / "state.safetensors").read_bytes()
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise ValueError("state.safetensors does not match its SHA-256")
    if facts.pop(CHECK) != _digest(facts):
        raise ValueError("state.json does not match its SHA-256")
    return Checkpoint(unpacked(path / "state.safetensors", content), facts)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def saved(folder: Path) -> list[Path]:
    """Where the checkpoints under `folder` are, oldest first."""
    return sorted(path for path in folder.glob("round-*") if path.is_dir())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's state under names that survive a file: optimizer/<parameter>/<name>."""
    return {
        f"optimizer/{index}/{name}": torch.as_tensor(value).clone()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of `optimizer_tensors`; without such tensors the optimizer starts afresh."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for (
        parameter,
        held,
    ) in optimizer.state.items():  # a file has no strides, and fused steps need those of the parameter
        for name, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                held[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
