"""A round's whole updates beside each other: their inner products, which tell lengths, distances and copies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CHUNK = 1 << 16  # elements; one chunk of every site then stays in the cache
SAME = math.sqrt(2 * (1 - 0.999))  # distance over length of two equally long vectors with cosine 0.999
Flat = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Whole:
    """What a rule may know of whole updates: local - broadcast over all groups of parameters and momentum encoders.

    Attributes:
        products: inner products, (sites, sites) float64, in site order. What a site does not send, it left alone.
        accepted: L2 norms of the updates accepted in earlier rounds.
    """

    products: np.ndarray
    accepted: Sequence[float] = ()

    @classmethod
    def of(cls, flats: Sequence[Flat], before: Flat, accepted: Sequence[float] = ()) -> "Whole":
        """Of each site's arrays and the broadcast's; `before` names the groups that count."""
        products = np.zeros((len(flats), len(flats)))
        buffer = np.empty((len(flats), CHUNK))
        for group, old in before.items():
            held = [place for place, flat in enumerate(flats) if group in flat]
            for start in range(0, old.size if held else 0, CHUNK):
                part = old[start : start + CHUNK]
                moved = buffer[: len(held), : part.size]
                for row, place in zip(moved, held, strict=True):
                    np.subtract(flats[place][group][start : start + CHUNK], part, out=row)
                products[np.ix_(held, held)] += moved @ moved.T
        return cls(products, accepted)

    def without(self, place: int) -> "Whole":
        """Of all sites but one."""
        rest = np.delete(np.arange(len(self.products)), place)
        return Whole(self.products[np.ix_(rest, rest)], self.accepted)

    @cached_property
    def norms(self) -> np.ndarray:
        """L2 norms, (sites,)."""
        found: np.ndarray = np.sqrt(np.diag(self.products))
        return found

    @cached_property
    def distances(self) -> np.ndarray:
        """Squared L2 distances, (sites, sites)."""
        squares = np.diag(self.products)
        found: np.ndarray = np.maximum(squares[:, None] + squares[None] - 2 * self.products, 0)
        np.fill_diagonal(found, 0)
        return found

    def copies(self) -> list[tuple[int, int]]:
        """Pairs of places whose updates are the same: cosine above 0.999 at equal length. Zeros are no copies."""
        longer = np.maximum(self.norms[:, None], self.norms[None])
        same = (np.sqrt(self.distances) <= SAME * longer) & (longer > 0)
        return [(int(i), int(j)) for i, j in np.argwhere(np.triu(same, 1))]
