"""Weighted means of large arrays that come one by one, each read from memory once.

Sums run in float64 in the order of coming, without any reordering by the compiler: equal inputs give equal bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medfl.jit import compiled

RING = 4  # arrays that are added in one pass over the sum: its traffic is then half of that of the arrays


@compiled
def _add(total: Any, first: bool, a: Any, b: Any, c: Any, d: Any, w: Any) -> None:
    """total <- total + Σ w x, or Σ w x where it is the `first`."""
    wa, wb, wc, wd = w
    if first:
        for i in range(total.size):
            total[i] = ((wa * a[i] + wb * b[i]) + wc * c[i]) + wd * d[i]
    else:
        for i in range(total.size):
            total[i] = (((total[i] + wa * a[i]) + wb * b[i]) + wc * c[i]) + wd * d[i]


@compiled
def _finish(total: Any, first: bool, a: Any, b: Any, c: Any, d: Any, w: Any, divisor: float, out: Any) -> None:
    """out <- (total + Σ w x) / divisor, without `total` where it is the `first`."""
    wa, wb, wc, wd = w
    if first:
        for i in range(out.size):
            out[i] = (((wa * a[i] + wb * b[i]) + wc * c[i]) + wd * d[i]) / divisor
    else:
        for i in range(out.size):
            out[i] = ((((total[i] + wa * a[i]) + wb * b[i]) + wc * c[i]) + wd * d[i]) / divisor


NOTHING = np.zeros(0)


class Mean:
    """Σ w_i x_i / Σ w_i of arrays (n,) of one dtype, of which RING are held at a time, and of the sum a float64 array.

    With `apart` K also the arrays of the K largest weights are held, which may be lowered at the end.
    """

    def __init__(self, apart: int = 0) -> None:
        self.weights: list[float] = []  # as they were given
        self._apart = apart
        self._held: list[tuple[float, int, np.ndarray]] = []  # weight, place, array
        self._ring: list[tuple[float, np.ndarray]] = []
        self._total = NOTHING

    def add(self, values: np.ndarray, weight: float) -> None:
        """Take an array, which must stay as it is until the mean is made; `weight` above 0."""
        self._held.append((weight, len(self.weights), values))
        self.weights.append(weight)
        if len(self._held) > self._apart:
            lightest = min(range(len(self._held)), key=lambda place: self._held[place][:2])
            least, _, array = self._held.pop(lightest)
            self._count(array, least)

    def mean(self, weights: Sequence[float] | None = None) -> np.ndarray:
        """The mean, once: nothing may be added afterwards.

        Args:
            weights: in place of those given; in proportion to them but for the K largest.
        """
        final = self.weights if weights is None else weights
        held = {place for _, place, _ in self._held}
        counted = [place for place in range(len(final)) if place not in held]
        given, taken = (float(sum(of[place] for place in counted)) for of in (self.weights, final))
        if counted and not taken:  # what was counted no longer counts
            self._ring, self._total, counted = [], NOTHING, []
        scale = given / taken if counted and weights is not None else 1.0
        for _, place, array in sorted(self._held, key=lambda one: one[1]):
            self._count(array, final[place] * scale)
        arrays, shares = self._full()
        out = np.empty_like(arrays[0])
        divisor = sum(final) if weights is None else (given if counted else 0.0) + scale * sum(final[p] for p in held)
        _finish(self._total, not self._total.size, *arrays, shares, float(divisor), out)
        return out

    def _count(self, values: np.ndarray, weight: float) -> None:
        if len(self._ring) == RING:
            arrays, shares = self._full()
            first = not self._total.size
            if first:
                self._total = np.empty(values.size)
            _add(self._total, first, *arrays, shares)
            self._ring.clear()
        self._ring.append((weight, values))

    def _full(self) -> tuple[list[np.ndarray], tuple[float, ...]]:
        """The arrays of the ring and their weights, filled up with weights of 0."""
        ring = self._ring + [(0.0, self._ring[0][1])] * (RING - len(self._ring))
        return [array for _, array in ring], tuple(weight for weight, _ in ring)


def mean(values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Σ w_i x_i / Σ w_i; sites without weight are left out."""
    found = Mean()
    for array, weight in zip(values, weights, strict=True):
        if weight > 0:
            found.add(array, weight)
    return found.mean()
