"""Where each tensor lies on the wire. Built at both ends from the same method; only its digest travels.

One flat array per (role, owner, dtype): a message of a few large arrays is several times faster than one of hundreds.
What a role does not allow to travel is not in the layout, so it cannot leave by mistake.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medfl.methods.base import Claim, Method, Role

Tensors = dict[str, Tensor]
Flat = dict[str, np.ndarray]  # group -> (n,) array
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MOMENTS = ("count", "sum", "square")
# Received arrays are views of the message's bytes: read, copied from, never written.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


@dataclass(frozen=True)
class Slot:
    """One tensor's place: `size` elements from `offset` in the flat array of its group."""

    name: str
    role: Role
    owner: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def group(self) -> str:
        return f"{self.role}/{self.owner or 'all'}/{self.dtype}"


@dataclass(frozen=True)
class Layout:
    """Slots in the order of their names; groups are named "role/owner/dtype"."""

    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Claim, tuple[int, ...], str]]) -> "Layout":
        """From (name, claim, shape, dtype) of every tensor that travels.

        Raises:
            ValueError: a dtype that cannot be aggregated, such as an integer counter.
        """
        ends: dict[str, int] = {}
        slots = []
        for name, claim, shape, dtype in sorted(named, key=lambda row: row[0]):
            if dtype not in DTYPES:
                raise ValueError(f"'{name}' is {dtype}, need one of {', '.join(DTYPES)}. Claim it as local.")
            slot = Slot(name, claim.role, claim.owner, dtype, shape, 0)
            slot = Slot(name, claim.role, claim.owner, dtype, shape, ends.get(slot.group, 0))
            ends[slot.group] = slot.offset + slot.size
            slots.append(slot)
        return cls(tuple(slots))

    @cached_property
    def groups(self) -> dict[str, tuple[Slot, ...]]:
        found: dict[str, list[Slot]] = {}
        for slot in self.slots:
            found.setdefault(slot.group, []).append(slot)
        return {group: tuple(slots) for group, slots in found.items()}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of each group's flat array."""
        return {group: slots[-1].offset + slots[-1].size for group, slots in self.groups.items()}

    @cached_property
    def digest(self) -> str:
        rows = [(s.name, s.role, s.owner, s.dtype, s.shape, s.offset) for s in self.slots]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def owned(self, owners: Sequence[str]) -> "Layout":
        """The part that a site with these owner groups takes part in; offsets are per group, so they stay."""
        return Layout(tuple(slot for slot in self.slots if not slot.owner or slot.owner in owners))

    def pack(self, tensors: Mapping[str, Tensor]) -> Flat:
        """Copy the tensors into one new flat array per group.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        flat = {group: np.empty(size, group.rpartition("/")[2]) for group, size in self.sizes.items()}
        for slot in self.slots:
            if slot.name not in tensors or tuple(tensors[slot.name].shape) != slot.shape:
                got = tuple(tensors[slot.name].shape) if slot.name in tensors else "nothing"
                raise ValueError(f"'{slot.name}': got {got}, need shape {slot.shape}.")
            place = torch.from_numpy(flat[slot.group][slot.offset : slot.offset + slot.size])
            place.copy_(tensors[slot.name].detach().reshape(-1))
        return flat

    def unpack(self, flat: Mapping[str, np.ndarray]) -> Tensors:
        """The tensors as views of the flat arrays (no copy)."""
        whole = {group: torch.from_numpy(array) for group, array in flat.items()}
        return {
            slot.name: whole[slot.group][slot.offset : slot.offset + slot.size].view(slot.shape) for slot in self.slots
        }


def study_claims(method: Method, norm: str) -> dict[str, Claim]:
    """Each tensor's claim under the study's treatment of batch norm.

    Args:
        norm: `pooled` leaves the method's claims; `local_statistics` keeps running statistics at the site (SiloBN,
            Andreux et al. 2020); `local` keeps scale and shift there too (FedBN, Li et al. 2021).
    """
    claims = dict(method.roles())
    for name in claims:
        module = method.get_submodule(name.rpartition(".")[0])
        if not isinstance(module, _BatchNorm) or claims[name].role is Role.FIXED:
            continue
        if norm == "local" or (norm == "local_statistics" and claims[name].role is Role.NORM_MOMENTS):
            claims[name] = Claim(Role.LOCAL)
    return claims


def broadcast_layout(method: Method, norm: str, prefix: str = "") -> Layout:
    """What the server sends: parameters and norm statistics, under `prefix` only (e.g. "encoder")."""
    travels = (Role.PARAMETER, Role.NORM_MOMENTS)
    claims = study_claims(method, norm)
    return Layout.of(
        (name, claims[name], tuple(tensor.shape), _dtype(tensor))
        for name, tensor in method.state_dict().items()
        if claims[name].role in travels and f"{name}.".startswith(f"{prefix}." if prefix else "")
    )


def update_layout(method: Method, norm: str, *, parameters: bool = True) -> Layout:
    """What a site answers: parameters after training, and per batch norm the plain sums (n, Σx, Σx²)."""
    claims = study_claims(method, norm)
    rows = [
        (name, claims[name], tuple(tensor.shape), _dtype(tensor))
        for name, tensor in method.state_dict().items()
        if parameters and claims[name].role is Role.PARAMETER
    ]
    for name, module in pooled_norms(method, norm).items():
        claim = claims[f"{name}.running_mean"]
        rows += [(f"{name}.{kind}", claim, (module.num_features,), "float64") for kind in MOMENTS]
    return Layout.of(rows)


def pooled_norms(method: nn.Module, norm: str) -> dict[str, _BatchNorm]:
    """The batch norms whose statistics are pooled over the sites, by name."""
    if norm != "pooled" or not isinstance(method, Method):
        return {}
    roles = method.roles()
    return {
        name: module
        for name, module in method.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and roles[f"{name}.running_mean"].role is Role.NORM_MOMENTS
    }


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
