"""The form in which weights travel in training requests, and where its parts lie on the wire (`rounds.wire`).

Compressed is what is float32 and has the role parameter or target. Down go the weights themselves; up goes the change
that a site made to them. Sums of any kind, and all other requests, are never compressed.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from medfl import codecs
from medfl.errors import DivergedError
from medfl.layout import Flat, Layout, Slot, carrier, finite
from medfl.methods.base import Claim, Role
from medfl.study import Rounds

PLAIN = "fp32"
HALF = {"bf16": "bfloat16", "fp16": "float16"}
DOWN = {"topk": "bf16"}  # a few of the weights are no network
FEEDBACK = (
    "int8",
    "topk",
)  # what these leave out is sent later; halves err by a small part of each single change
SCALES, INDICES, VALUES = ":scales", ":indices", ":values"

Row = tuple[str, Claim, tuple[int, ...], str]


def forms_of(rounds: Rounds, sends: Layout, answers: Layout) -> tuple["Form", "Form"]:
    """The forms of broadcasts and answers of the requests that train."""
    down = DOWN.get(rounds.wire, rounds.wire)
    return Form.of(down, sends, rounds.wire_share), Form.of(rounds.wire, answers, rounds.wire_share)


@dataclass(frozen=True)
class Form:
    """A layout as it is, and as it travels.

    bf16, fp16: every tensor rounded. int8: tensors of two or more axes in blocks with a scale each, which never cross a
    tensor. topk: of all such tensors of a group together the largest values and their places. Tensors of one axis stay
    float32 in int8 and topk.

    Attributes:
        digest: of both layouts for all owner groups; both ends must agree on it.
    """

    kind: str
    plain: Layout
    coded: Layout
    digest: str

    @classmethod
    def of(cls, kind: str, plain: Layout, share: float) -> "Form":
        """
        Args:
            share: of the values that topk keeps.
        """
        if kind == PLAIN:
            return cls(kind, plain, plain, plain.digest)
        coded = Layout.placed(_rows(kind, plain, share))
        both = hashlib.sha256(f"{kind} {plain.digest} {coded.digest}".encode())
        return cls(kind, plain, coded, both.hexdigest())

    def owned(self, owners: Sequence[str]) -> "Form":
        """The part that a site with these owner groups takes part in."""
        return replace(self, plain=self.plain.owned(owners), coded=self.coded.owned(owners))

    @cached_property
    def groups(self) -> dict[str, tuple[Slot, ...]]:
        """The groups that are compressed, under their names in the plain layout."""
        return {g: slots for g, slots in self.plain.groups.items() if self.kind != PLAIN and _compressed(slots[0])}

    def encode(self, flat: Flat) -> Flat:
        """Plain arrays as they travel; what is not compressed is not copied.

        Raises:
            DivergedError: a weight beyond what fp16 holds.
        """
        coded = {group: array for group, array in flat.items() if group not in self.groups}
        new = {group: size for group, size in self.coded.sizes.items() if group not in coded}
        coded |= {group: np.empty(size, carrier(group.rpartition("/")[2])) for group, size in new.items()}
        places = _places(self.coded, coded)
        for group, slots in self.groups.items():
            values = {slot: flat[group][slot.offset : slot.offset + slot.size] for slot in slots}
            for slot in slots:
                self._encode(slot, values[slot], places)
            if group + INDICES in places:
                matrices = np.concatenate([values[slot] for slot in slots if len(slot.shape) > 1])
                codecs.to_largest(matrices, places[group + INDICES], places[group + VALUES])
        return coded

    def _encode(self, slot: Slot, values: np.ndarray, places: Mapping[str, np.ndarray]) -> None:
        if self.kind in HALF:
            codecs.to_half(values, HALF[self.kind], places[slot.name])
            if self.kind == "fp16" and max(values.max(), -values.min()) >= codecs.HALF_LIMIT:
                raise DivergedError(
                    f"'{slot.name}' has a value beyond 65504, the largest of fp16. Take rounds.wire=bf16."
                )
        elif slot.name + SCALES in places:
            codecs.to_int8(values, places[slot.name], places[slot.name + SCALES])
        elif slot.name in places:
            places[slot.name][:] = values

    def decode(self, coded: Flat) -> Flat:
        """Arrays that came, as plain ones: those that are compressed are new.

        Raises:
            ValueError: places of values that cannot be.
        """
        new = {group: np.empty(self.plain.sizes[group], np.float32) for group in self.groups}
        flat = {group: coded[group] for group in self.plain.sizes if group not in new} | new
        places = _places(self.coded, coded)
        for group, slots in self.groups.items():
            if group + INDICES in places:
                self._place_largest(group, places, flat[group])
            for slot in slots:
                self._decode(slot, places, flat[group][slot.offset : slot.offset + slot.size])
        return flat

    def _decode(self, slot: Slot, places: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        if self.kind in HALF:
            codecs.of_half(places[slot.name], HALF[self.kind], out)
        elif slot.name + SCALES in places:
            codecs.of_int8(places[slot.name], places[slot.name + SCALES], out)
        elif slot.name in places:
            out[:] = places[slot.name]

    def _place_largest(self, group: str, places: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        matrices = [slot for slot in self.groups[group] if len(slot.shape) > 1]
        try:
            values = codecs.of_largest(
                places[group + INDICES], places[group + VALUES], sum(slot.size for slot in matrices)
            )
        except ValueError as error:
            raise ValueError(f"'{group + INDICES}': {error}.") from None
        start = 0
        for slot in matrices:
            out[slot.offset : slot.offset + slot.size] = values[start : start + slot.size]
            start += slot.size


def sound(array: np.ndarray, dtype: str) -> bool:
    """Whether an array of a dtype on the wire holds finite numbers alone."""
    if dtype == "bfloat16":
        return bool(((array & 0x7F80) != 0x7F80).all())
    if dtype == "float16":
        return bool(np.isfinite(array).all())
    return dtype == "int8" or finite(array)


def _compressed(slot: Slot) -> bool:
    return slot.role in (Role.PARAMETER, Role.TARGET) and slot.dtype == "float32"


def _rows(kind: str, plain: Layout, share: float) -> Iterator[Row]:
    """What travels in place of each slot; of topk first what travels for a whole group."""
    for group, slots in plain.groups.items() if kind == "topk" else ():
        size = sum(slot.size for slot in slots if len(slot.shape) > 1)
        if _compressed(slots[0]) and size:
            claim, shape = Claim(slots[0].role, slots[0].owner), (math.ceil(share * size),)
            yield group + INDICES, claim, shape, "uint32"
            yield group + VALUES, claim, shape, "float32"
    for slot in plain.slots:
        claim, matrix = Claim(slot.role, slot.owner), len(slot.shape) > 1
        if _compressed(slot) and kind in HALF:
            yield slot.name, claim, slot.shape, HALF[kind]
        elif _compressed(slot) and matrix and kind == "int8":
            yield slot.name, claim, slot.shape, "int8"
            yield slot.name + SCALES, claim, (codecs.scales_of(slot.size),), "float32"
        elif not (_compressed(slot) and matrix and kind == "topk"):
            yield slot.name, claim, slot.shape, slot.dtype


def _places(layout: Layout, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {slot.name: flat[slot.group][slot.offset : slot.offset + slot.size] for slot in layout.slots}
