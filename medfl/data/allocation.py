"""Dividing patients among simulated sites: how many, of which class; deterministic and repaired to given
minima.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfl.seeding import key

LEAST_SHARE = 1e-3  # of a class at a site before fitting: sizes stay reachable
FITTING_STEPS = 200

Cell = tuple[str, int]  # (split, label)


@dataclass(frozen=True)
class Minima:
    """Least training images per site, and least patients of each class per site and split where there are
    enough.
    """

    images: int
    per_class: int


def shares(totals: Sequence[int], wanted: NDArray[np.float64], alpha: float | None, seed: int) -> NDArray[np.float64]:
    """Share of each class that each site gets, (classes, sites), rows summing to 1.

    The Dirichlet draw fixes the odds of the classes between sites; proportional fitting then gives every
    site its size and every class its total, so that label skew and quantity skew are independent.

    Args:
        totals: patients of each class.
        wanted: (sites,) relative sizes.
        alpha: concentration of a class over sites; small is skewed, None gives all sites equal labels.
    """
    rng = np.random.default_rng(key(seed, "label"))
    sites = len(wanted)
    table = np.ones((len(totals), sites)) if alpha is None else rng.dirichlet([alpha] * sites, size=len(totals))
    table = (table + LEAST_SHARE) * wanted
    rows, columns = np.maximum(totals, 1e-9)[:, None], wanted / wanted.sum() * max(sum(totals), 1)
    for _ in range(FITTING_STEPS):
        table *= rows / table.sum(axis=1, keepdims=True)
        table *= columns / table.sum(axis=0)
    return np.asarray(table / table.sum(axis=1, keepdims=True))


def sizes(sites: int, law: str | None, spread: float, seed: int) -> NDArray[np.float64]:
    """Relative sizes of the sites: equal, exp(spread * normal), or rank ** -spread in a seeded order."""
    rng = np.random.default_rng(key(seed, "quantity"))
    if law is None:
        return np.ones(sites)
    if law == "lognormal":
        return np.exp(spread * rng.standard_normal(sites))
    return rng.permutation(np.arange(1, sites + 1) ** -spread)


def allocate(
    cells: Mapping[Cell, Sequence[str]],
    weights: Mapping[str, int],
    table: NDArray[np.float64],
    minima: Minima,
    seed: int,
) -> dict[str, int]:
    """The site of every patient.

    Args:
        cells: patients of each (split, label); label -1 is unknown.
        weights: images of each patient.
        table: (classes + 1, sites) from `shares`; the last row is for unknown labels.
        minima: reached by moving patients away from the largest site, as far as there are enough.
    """
    held: dict[Cell, list[list[str]]] = {}
    for (split, label), patients in sorted(cells.items()):
        ranked = sorted(patients, key=lambda patient: key(seed, "site", patient))
        counts = _round(table[label] * len(ranked), len(ranked))
        floor = min(minima.per_class, len(ranked) // len(counts)) if label >= 0 else 0
        _raise_to(counts, floor)
        edges = np.cumsum([0, *counts])
        held[split, label] = [ranked[low:high] for low, high in itertools.pairwise(edges)]
    _fill("train", held, weights, minima)
    _fill("val", held, weights, Minima(1, 0))
    _fill("test", held, weights, Minima(1, 0))
    return {patient: site for lists in held.values() for site, members in enumerate(lists) for patient in members}


def _round(amounts: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers nearest to `amounts` that sum to `total` (largest remainders)."""
    counts = np.floor(amounts + 1e-9).astype(np.int64)
    order = np.argsort(-(amounts - counts), kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def _raise_to(counts: NDArray[np.int64], floor: int) -> None:
    """Move units from the largest to the smallest until none is below `floor`."""
    while counts.min() < floor:
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1


def _fill(split: str, held: Mapping[Cell, list[list[str]]], weights: Mapping[str, int], minima: Minima) -> None:
    """Move patients of one split from the largest site to the smallest until it has `minima.images`, if it can."""
    mine = {cell: lists for cell, lists in held.items() if cell[0] == split}
    if not mine:
        return
    totals: dict[int, int] = defaultdict(int)
    for lists in mine.values():
        for site, members in enumerate(lists):
            totals[site] += sum(weights[patient] for patient in members)
    while True:
        poor, rich = min(totals, key=lambda s: (totals[s], s)), max(totals, key=lambda s: (totals[s], -s))
        stock = max(mine.values(), key=lambda lists: len(lists[rich]))
        if totals[poor] >= minima.images or len(stock[rich]) <= minima.per_class:
            return
        if totals[rich] - weights[stock[rich][-1]] < minima.images:
            return
        patient = stock[rich].pop()
        stock[poor].append(patient)
        totals[rich] -= weights[patient]
        totals[poor] += weights[patient]
