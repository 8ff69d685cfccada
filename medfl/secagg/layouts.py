"""Where masked numbers, keys and shares lie on the wire."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from medfl.layout import Flat, Layout, Slot
from medfl.methods.base import Role
from medfl.secagg import masks, shamir
from medfl.secagg.fixed import UNSIGNED

OFFER, SIGNATURE = 2 * masks.SEED, 64  # bytes: two public keys; Ed25519
SEALED = 2 * shamir.BYTES + masks.TAG  # bytes: a share of either secret, for one site


def _layout(rows: Sequence[tuple[str, Role, str, str, int]]) -> Layout:
    """From (name, role, owner, dtype, size)."""
    ends: dict[str, int] = {}
    slots = []
    for name, role, owner, dtype, size in rows:
        group = Slot(name, role, owner, dtype, (size,), 0).group
        slots.append(Slot(name, role, owner, dtype, (size,), ends.get(group, 0)))
        ends[group] = ends.get(group, 0) + size
    return Layout(tuple(slots))


def masked(layout: Layout) -> Layout:
    """Each group of a layout as one array of whole numbers, under the group's name, of the same owner and size."""
    sizes = layout.sizes
    return _layout(
        [
            (group, Role.MASKED, layout.groups[group][0].owner, UNSIGNED[group.rpartition("/")[2]], sizes[group])
            for group in sorted(sizes)
        ]
    )


def views(layout: Layout, flat: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(group, owner, its place in a masked answer) of each array that is there."""
    for slot in layout.slots:
        if slot.group in flat:
            yield slot.name, slot.owner, flat[slot.group][slot.offset : slot.offset + slot.size]


OFFERED = _layout([("keys", Role.KEY, "", "uint8", OFFER), ("signature", Role.KEY, "", "uint8", SIGNATURE)])


def sealed(sites: Iterable[str]) -> Layout:
    """A sealed pair of shares for each site; zeros for the maker itself, so that all answers have one form."""
    return _layout([(f"for {name}", Role.SHARE, "", "uint8", SEALED) for name in sorted(sites)])


def opened(alive: Sequence[str], gone: Sequence[str]) -> Layout:
    """One share for each site, of the seed of its own mask or of the key of its masks with others; never of both."""
    rows = [(f"mask of {name}", name) for name in alive] + [(f"key of {name}", name) for name in gone]
    return _layout(
        [(label, Role.SHARE, "", "uint8", shamir.BYTES) for label, _ in sorted(rows, key=lambda row: row[1])]
    )


def packed(layout: Layout, parts: Mapping[str, bytes]) -> Flat:
    """Named bytes as the arrays of a layout."""
    flat = layout.empty()
    for slot in layout.slots:
        flat[slot.group][slot.offset : slot.offset + slot.size] = np.frombuffer(parts[slot.name], np.uint8)
    return flat


def unpacked(layout: Layout, flat: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """Named bytes from the arrays of a layout."""
    return {s.name: flat[s.group][s.offset : s.offset + s.size].tobytes() for s in layout.slots}
