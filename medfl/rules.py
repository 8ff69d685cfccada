"""Aggregation rules: pure functions `rule(values, weights, before) -> aggregate` over the sites' flat arrays, in order.

A rule sees one group of tensors at a time, and of the whole updates what `before.whole` tells. It keeps no state:
momentum and adaptivity are the server optimizer's. Sums run in float64 in a fixed order, so that equal inputs give
equal bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from medfl.errors import ConfigError, NetworkError
from medfl.whole import Whole

NOBODY = Whole(np.zeros((0, 0)))


@dataclass(frozen=True)
class Before:
    """What a rule knows besides the values of a group.

    Attributes:
        values: the broadcast's.
        layers: places (offset, size) in the group of tensors with two or more axes.
        whole: all sites' whole updates.
        places: of the sites that hold the group, in `whole`; as many as there are values.
        missing: sites of this round whose update did not come or was refused: they count among those that a rule is to
            withstand, who may send anything, or nothing.
    """

    values: np.ndarray
    layers: Sequence[tuple[int, int]]
    whole: Whole = NOBODY
    places: Sequence[int] = ()
    missing: int = 0

    def left(self, bad: int) -> int:
        """How many of so many bad sites may still be among those that answered."""
        return max(0, bad - self.missing)


def weighted_mean(values: Sequence[np.ndarray], weights: Sequence[float], before: Before) -> np.ndarray:
    """Σ w_i x_i / Σ w_i (McMahan et al. 2017, algorithm 1); float64 inside, one rounding at the end."""
    from medfl.adding import mean  # numba takes half a second to import

    return values[0].copy() if len(values) == 1 else mean(values, weights)


def uniform_mean(values: Sequence[np.ndarray], weights: Sequence[float], before: Before) -> np.ndarray:
    """The mean in which every site counts once, whatever its volumes."""
    return weighted_mean(values, [1.0] * len(weights), before)


def trimmed_mean(
    values: Sequence[np.ndarray],
    weights: Sequence[float],
    before: Before,
    *,
    trim: int,
) -> np.ndarray:
    """Mean without the `trim` lowest and highest values of each coordinate (Yin et al. 2018, definition 2).

    Every site has one vote. Withstands `trim` arbitrary updates; each that is missing is one of them.

    Raises:
        ConfigError, NetworkError: too few sites, or too few of them answered.
    """
    cut = before.left(trim)
    if len(values) <= 2 * cut:
        raise _too_few(
            len(values),
            before.missing,
            2 * trim + 1,
            f"trimmed_mean: got {len(values)} sites, need {2 * cut + 1} to trim {cut} at each end. "
            "Lower rule.trim or take rule=weighted_mean.",
        )
    ordered = np.sort(np.stack(values), axis=0)[cut : len(values) - cut]
    mean: np.ndarray = ordered.mean(axis=0, dtype=np.float64).astype(values[0].dtype)
    return mean


def median(values: Sequence[np.ndarray], weights: Sequence[float], before: Before) -> np.ndarray:
    """Median of each coordinate (Yin et al. 2018, definition 1); of an even number the mean of the middle two.

    Every site has one vote. Withstands arbitrary updates of fewer than half the sites. Where honest sites differ it
    follows none of them: it takes the middle of each coordinate, not the mean of their data.
    """
    return trimmed_mean(values, weights, replace(before, missing=0), trim=(len(values) - 1) // 2)


def krum(
    values: Sequence[np.ndarray],
    weights: Sequence[float],
    before: Before,
    *,
    bad: int,
    keep: int | None,
) -> np.ndarray:
    """Krum (`keep` 1) and Multi-Krum (Blanchard et al. 2017): the plain mean of the updates nearest to others.

    Whole updates are chosen, the same for all groups; a group that no chosen site holds stays. Honest sites far from
    the others (a rare scanner, a rare disease) are as unlikely to be chosen as bad ones.

    Args:
        bad: sites that may send anything; each that is missing is one of them.
        keep: updates in the mean; None: all sites but `bad`.

    Raises:
        ConfigError, NetworkError: fewer than 2 * bad + 3 sites, or too few of them answered; or a `keep` that would
            take bad ones in.
    """
    chosen = set(krum_places(before.whole, bad=bad, keep=keep, missing=before.missing))
    held = [value for value, place in zip(values, before.places, strict=True) if place in chosen]
    return uniform_mean(held, [1.0] * len(held), before) if held else before.values.copy()


def krum_places(whole: Whole, *, bad: int, keep: int | None, missing: int = 0) -> list[int]:
    """Places of the `keep` updates with the least sum of squared distances to their sites - bad - 2 nearest others."""
    sites, left = len(whole.products), max(0, bad - missing)
    if bad < 0:
        raise ConfigError(f"krum: got rule.bad={bad}, need a number from 0.")
    if sites < 2 * left + 3:
        raise _too_few(
            sites,
            missing,
            2 * bad + 3,
            f"krum: got {sites} sites, need {2 * left + 3} to withstand rule.bad={bad}, {missing} of "
            "which are missing. Lower rule.bad, or take rule=median.",
        )
    most = sites + missing - bad  # honest sites
    if keep is not None and not 1 <= keep <= most:
        raise ConfigError(
            f"krum: got rule.keep={keep}, need 1 to {most} of {sites + missing} sites with rule.bad={bad}, or null."
        )
    nearest = np.sort(whole.distances, axis=1)[:, 1 : sites - left - 1]  # without itself
    return [int(place) for place in np.argsort(nearest.sum(axis=1), kind="stable")[: min(keep or most, sites - left)]]


def _too_few(sites: int, missing: int, needed: int, text: str) -> ConfigError | NetworkError:
    """Too few sites for a rule: an error of the study, or of a round in which too many are missing."""
    return NetworkError(text) if sites + missing >= needed else ConfigError(text)


def clipped_mean(
    values: Sequence[np.ndarray],
    weights: Sequence[float],
    before: Before,
    *,
    most: float,
) -> np.ndarray:
    """Weighted mean of updates of which none is longer than `most` times the median length accepted so far.

    In the first round the median is that round's. Bounds how far one site can move the model (model replacement), not
    where to: a bad update of ordinary length, such as a flipped sign, counts in full.

    Raises:
        ConfigError: `most` is not above 0.
    """
    if not most > 0:
        raise ConfigError(f"clipped_mean: got rule.most={most}, need a number above 0, such as 1.0.")
    norms, known = before.whole.norms, before.whole.accepted
    limit = most * float(np.median(known if len(known) else norms))
    shares = [min(1.0, limit / norms[place]) if norms[place] > 0 else 1.0 for place in before.places]
    clipped = [
        value if share == 1 else before.values + np.asarray(share, value.dtype) * (value - before.values)
        for value, share in zip(values, shares, strict=True)
    ]
    return weighted_mean(clipped, weights, before)


def layer_divergence_aware(values: Sequence[np.ndarray], weights: Sequence[float], before: Before) -> np.ndarray:
    """L-DAWA (Rehman et al. 2023, eq. 3), normalised: layer by layer Σ w_i d_i x_i / Σ w_i d_i, d_i = cos(x_i, before).

    The published form divides by Σ w_i, so that weights shrink by their mean cosine in every round; this one does not.
    Negative cosines count as 0; vectors (biases, norms), layers of zeros and layers without any weight left take the
    weighted mean.
    """
    mean = weighted_mean(values, weights, before)
    for offset, size in before.layers:
        place = slice(offset, offset + size)
        reference = before.values[place].astype(np.float64)
        layers = [value[place].astype(np.float64) for value in values]
        lengths = [float(np.linalg.norm(layer)) * float(np.linalg.norm(reference)) for layer in layers]
        cosines = [float(x @ reference) / n if n > 0 else 0.0 for x, n in zip(layers, lengths, strict=True)]
        shares = [weight * max(cosine, 0.0) for weight, cosine in zip(weights, cosines, strict=True)]
        if sum(shares) > 0:
            mean[place] = sum(share * layer for share, layer in zip(shares, layers, strict=True)) / sum(shares)
    return mean


def linear(rule: Callable[..., np.ndarray]) -> bool:
    """Whether a rule is a mean with weights of volumes alone, which can be made as the updates come."""
    return rule_of(rule) in (weighted_mean, uniform_mean)


def rule_of(rule: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The function behind a rule whose arguments are set."""
    return rule.func if isinstance(rule, partial) else rule


def shares_of(rule: Callable[..., np.ndarray], volumes: Sequence[float], max_share: float) -> list[float]:
    """What the sites weigh in a linear rule, of sum 1."""
    return [1 / len(volumes)] * len(volumes) if rule_of(rule) is uniform_mean else site_weights(volumes, max_share)


def site_weights(volumes: Sequence[float], max_share: float) -> list[float]:
    """Shares of the sites: proportional to volumes, none above `max_share` (or above 1 / sites, where that is more).

    What a capped site loses goes to the others in proportion, and is capped again if need be.
    """
    cap = max(max_share, 1 / len(volumes))
    share = np.asarray(volumes, dtype=np.float64) / float(np.sum(volumes))
    capped = np.zeros(len(volumes), dtype=bool)
    while bool((over := ~capped & (share > cap * (1 + 1e-12))).any()):
        capped |= over
        rest = share[~capped].sum()
        share[~capped] *= (1 - cap * capped.sum()) / rest if rest else 0.0
        share[capped] = cap
    return [float(value) for value in share]
