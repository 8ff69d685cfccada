"""Where each tensor lies on the wire. Built at both ends from the same method; only its digest travels.

One flat array per (role, owner, dtype): a message of a few large arrays is several times faster than one of hundreds.
What a role does not allow to travel is not in the layout, so it cannot leave by mistake.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from medfl.evaluation.counts import BINS
from medfl.methods.base import Claim, Method, Role
from medfl.study import Rounds

Tensors = dict[str, Tensor]
Flat = dict[str, np.ndarray]  # group -> (n,) array
DTYPES = {"float32": torch.float32, "float64": torch.float64}
CODED = ("bfloat16", "float16", "int8")  # of compressed weights (`medfl.forms`)
WHOLE = ("uint8", "uint32", "uint64")  # of secure aggregation: keys, shares, masked numbers
MOMENTS = ("count", "sum", "square")
WIDEST_GRAM = 512  # features; wider ones would send megabytes of sums
# Received arrays are views of the message's bytes: read, copied from, never written.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


def carrier(dtype: str) -> np.dtype:
    """What an array of this dtype is made of: numpy and Flower have no bfloat16, whose bits travel as uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def finite(array: np.ndarray) -> bool:
    """Whether a flat array has no NaN or infinity, nor values whose squares overflow.

    One pass without a temporary: any NaN or infinity survives the sum of squares.
    """
    if str(array.dtype) in WHOLE:
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(np.dot(array, array)))


@dataclass(frozen=True)
class Slot:
    """One tensor's place: `size` elements from `offset` in the flat array of its group."""

    name: str
    role: Role
    owner: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def bytes(self) -> int:
        return self.size * carrier(self.dtype).itemsize

    @cached_property
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
        rows = sorted(named, key=lambda row: row[0])
        for name, _, _, dtype in rows:
            if dtype not in DTYPES:
                raise ValueError(f"'{name}' is {dtype}, need one of {', '.join(DTYPES)}. Claim it as local.")
        return cls.placed(rows)

    @classmethod
    def placed(cls, rows: Iterable[tuple[str, Claim, tuple[int, ...], str]]) -> "Layout":
        """The same in the given order, and of any dtype."""
        ends: dict[str, int] = {}
        slots = []
        for name, claim, shape, dtype in rows:
            slot = Slot(name, claim.role, claim.owner, dtype, shape, 0)
            slot = replace(slot, offset=ends.get(slot.group, 0))
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

    def of_role(self, role: Role) -> "Layout":
        """The part with this role; offsets are per group, so they stay."""
        return Layout(tuple(slot for slot in self.slots if slot.role is role))

    def crossing(self, sizes: Mapping[str, int]) -> Iterator[tuple[Slot, int]]:
        """Each tensor and its bytes: its part of its group's, which may be packed; they add up to them.

        Args:
            sizes: bytes of each group as it travels.
        """
        for slot in self.slots:
            whole, size = self.sizes[slot.group], sizes[slot.group]
            yield slot, (slot.offset + slot.size) * size // whole - slot.offset * size // whole

    def unsound(self, group: str, array: np.ndarray) -> str:
        """Name of the first tensor of a flat array that is not finite; "" if there is none."""
        parts = ((slot.name, array[slot.offset : slot.offset + slot.size]) for slot in self.groups[group])
        return next((name for name, part in parts if not finite(part)), "")

    def empty(self) -> Flat:
        """One flat array per group, not yet filled."""
        return {group: np.empty(size, carrier(group.rpartition("/")[2])) for group, size in self.sizes.items()}

    def pack(self, tensors: Mapping[str, Tensor], into: Flat | None = None) -> Flat:
        """Copy the tensors into one flat array per group: new ones, or `into`, which saves a third of the time.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        flat = self.empty() if into is None else into
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


@dataclass(frozen=True)
class Policy:
    """What a study does with the roles that leave a choice; `rounds` in configs/rounds/default.yaml explains each."""

    norm: str = "pooled"
    codebook: str = "refresh"
    target: str = "average"
    gram: bool = False

    @classmethod
    def of(cls, method: Method, rounds: Rounds) -> "Policy":
        width = int(getattr(method.encoder, "width", 0))
        gram = rounds.gram == "always" or (rounds.gram == "auto" and 0 < width <= WIDEST_GRAM)
        target = method.target_mode if rounds.target == "auto" else rounds.target
        return cls(rounds.norm, rounds.codebook, target, gram)


def study_claims(method: Method, policy: Policy) -> dict[str, Claim]:
    """Each tensor's claim under the study's policy.

    norm: `pooled` leaves the method's claims; `local_statistics` keeps running statistics at the site (SiloBN, Andreux
    et al. 2020); `local` keeps scale and shift there too (FedBN, Li et al. 2021). codebook: `local` keeps them there.
    """
    claims = dict(method.roles())
    for name, claim in claims.items():
        if claim.role is Role.CODEBOOK and policy.codebook == "local":
            claims[name] = Claim(Role.LOCAL, claim.owner)
        if claim.role in (Role.FIXED, Role.TARGET):
            continue
        if isinstance(method.get_submodule(name.rpartition(".")[0]), _BatchNorm):
            silo = policy.norm == "local_statistics" and claim.role is Role.NORM_MOMENTS
            claims[name] = Claim(Role.LOCAL) if policy.norm == "local" or silo else claim
    return claims


def traveling(policy: Policy) -> tuple[Role, ...]:
    """The roles that a broadcast brings."""
    both = (Role.PARAMETER, Role.NORM_MOMENTS, Role.CODEBOOK)
    return (*both, Role.TARGET) if policy.target == "average" else both


def broadcast_layout(method: Method, policy: Policy, prefix: str = "") -> Layout:
    """What the server sends, under `prefix` only (e.g. "encoder")."""
    claims, roles = study_claims(method, policy), traveling(policy)
    return Layout.of(
        (name, claims[name], tuple(tensor.shape), _dtype(tensor))
        for name, tensor in method.state_dict().items()
        if claims[name].role in roles and f"{name}.".startswith(f"{prefix}." if prefix else "")
    )


def update_layout(method: Method, policy: Policy, *, parameters: bool = True) -> Layout:
    """What a site answers: parameters after training, and the plain sums of the refresh pass.

    Sums: per batch norm (n, Σx, Σx²); per codebook the tokens of each code, their sum and squared distance; of the
    features the count, Σz and Σzzᵀ.
    """
    claims = study_claims(method, policy)
    trained = (Role.PARAMETER, Role.TARGET) if policy.target == "average" else (Role.PARAMETER,)
    rows = [
        (name, claims[name], tuple(tensor.shape), _dtype(tensor))
        for name, tensor in method.state_dict().items()
        if parameters and claims[name].role in trained
    ]
    for name, module in pooled_norms(method, policy.norm).items():
        claim = claims[f"{name}.running_mean"]
        rows += [(f"{name}.{kind}", claim, (module.num_features,), "float64") for kind in MOMENTS]
    if policy.codebook != "local":
        rows += _book_rows(method, ("counts", "sums", "residuals"))
    if policy.gram:
        width = int(method.encoder.width)  # type: ignore[arg-type]
        shapes = {"count": (1,), "sum": (width,), "gram": (width * (width + 1) // 2,)}
        rows += [(f"features.{kind}", Claim(Role.STATISTICS), shape, "float64") for kind, shape in shapes.items()]
    return Layout.of(rows)


def seed_layout(method: Method) -> Layout:
    """What a site answers before the first round: the masses and sums of its own k-means, per codebook."""
    return Layout.of(_book_rows(method, ("counts", "sums")))


def counts_layout(protocols: Sequence[str], classes: int) -> Layout:
    """What a site answers beside its scores: counts of test images for each protocol (`medfl.evaluation.counts`).

    Args:
        protocols: those that predict classes.
        classes: K; 0: the site has no labels, so there is nothing to count.
    """
    shapes = {"histogram": (classes, 2, BINS), "confusion": (classes, classes)} if classes else {}
    claim = Claim(Role.STATISTICS)
    return Layout.of((f"{p}.{kind}", claim, shape, "float64") for p in protocols for kind, shape in shapes.items())


def _book_rows(method: Method, kinds: Sequence[str]) -> list[tuple[str, Claim, tuple[int, ...], str]]:
    rows: list[tuple[str, Claim, tuple[int, ...], str]] = []
    for name, book in method.codebooks().items():
        claim, (codes, width) = method.claim_of(f"{name}.sums"), book.sums.shape
        rows += [(f"{name}.{k}", claim, (codes, width) if k == "sums" else (codes,), "float64") for k in kinds]
    return rows


def pooled_norms(method: Method, norm: str) -> dict[str, _BatchNorm]:
    """The batch norms whose statistics are pooled over the sites, by name."""
    if norm != "pooled":
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
