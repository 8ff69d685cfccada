"""A lower bound on ε from one training: canaries of which each took part or not by a coin (Steinke et al. 2023).

A canary is a patient made up for the audit, whose gradient is as long as the clipping allows and lies along one
coordinate of its own: nobody could be seen better. Who sees the noised gradients guesses which ones took part.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from medfl.privacy.gradients import PrivateGradients

SURE = 0.95
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)  # of the canaries that are guessed, the clearest ones; SURE is shared among them
LARGEST = 50.0


class Marked(PrivateGradients):
    """The gradients of a site's steps with canaries among the units, and what can be seen of them.

    Attributes:
        seen: (m,) sum over the steps of the noised sum at each canary's coordinate, in units of C.
    """

    part: Tensor
    places: Tensor

    def mark(self, count: int, *, seed: int) -> None:
        """Put `count` canaries among the units, each of them by a coin."""
        draw = torch.Generator().manual_seed(seed)
        self.places = torch.randperm(self.size, generator=draw)[:count].to(self.where.device)
        self.part = torch.rand(len(self.places), generator=draw) < 0.5
        self.seen = torch.zeros(len(self.places), device=self.where.device)

    def follow(self, other: "Marked") -> None:
        """Go on with the canaries of an earlier round."""
        self.places, self.part, self.seen = other.places, other.part, other.seen

    def summed(self, step: int) -> Tensor:
        total = super().summed(step)
        chosen = self.secret.chosen(len(self.part), self.units.rate)
        there = self.places[chosen[self.part[chosen]].to(self.places.device)]
        return total.index_add_(0, there, torch.full((len(there),), self.privacy.clip, device=total.device))

    def __call__(self, step: int) -> dict[str, Tensor]:
        told = super().__call__(step)
        grads = torch.cat([p.grad.reshape(-1).float() for p in self.parameters if p.grad is not None])
        self.seen += grads[self.places] * (self.units.expected / self.privacy.clip)
        return told


@dataclass(frozen=True)
class Lower:
    """A lower bound on ε at 95 %, and the guesses that it comes from."""

    epsilon: float
    canaries: int
    guesses: int
    right: int


def lower_bound(seen: Tensor, part: Tensor, delta: float) -> Lower:
    """The largest ε that these guesses refute at 95 %; 0 where they are no better than a coin.

    Args:
        seen: (m,) larger where a canary looks as if it took part.
        part: (m,) bool, whether it did.
        delta: δ of the claim.
    """
    order, truth = torch.argsort(seen.cpu()), part.cpu()
    best = Lower(0.0, len(seen), 0, 0)
    for share in SHARES:
        each = max(1, int(share * len(seen) / 2))
        right = int((~truth[order[:each]]).sum() + truth[order[-each:]].sum())
        found = _refuted(len(seen), 2 * each, right, delta, level=(1 - SURE) / len(SHARES))
        if found > best.epsilon:
            best = Lower(found, len(seen), 2 * each, right)
    return best


def _refuted(canaries: int, guesses: int, right: int, delta: float, *, level: float) -> float:
    """The largest ε whose p-value is at most `level`."""
    if p_value(canaries, guesses, right, 0.0, delta) > level:
        return 0.0
    low, high = 0.0, LARGEST
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(canaries, guesses, right, middle, delta) <= level else (low, middle)
    return low


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, for any (ε, δ) private training (theorem 5.2 of the paper)."""
    chance = 1 / (1 + np.exp(-epsilon))
    pure = float(stats.binom.sf(right - 1, guesses, chance))
    below = np.cumsum(stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    extra = float(np.max(below / np.arange(1, right + 1), initial=0.0))
    return min(1.0, pure + extra * 2 * canaries * delta)
