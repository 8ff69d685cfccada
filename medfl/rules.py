"""Aggregation rules: pure functions `rule(values, weights) -> aggregate` over the sites' flat arrays, in site order.

A rule keeps no state: momentum and adaptivity are the server optimizer's. Sums run in float64 in a fixed order, so that
equal inputs give equal bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medfl.errors import ConfigError


@dataclass(frozen=True)
class Before:
    """The broadcast values of a group, and the places (offset, size) in it of tensors with two or more axes."""

    values: np.ndarray
    layers: Sequence[tuple[int, int]]


CHUNK = 1 << 16  # elements; the float64 accumulator then stays in cache


def weighted_mean(values: Sequence[np.ndarray], weights: Sequence[float], before: Before) -> np.ndarray:
    """Σ w_i x_i / Σ w_i (McMahan et al. 2017, algorithm 1); float64 inside, one rounding at the end."""
    shares = np.asarray(weights, dtype=np.float64) / float(np.sum(weights))
    if len(values) == 1:
        return values[0].copy()
    mean = np.empty_like(values[0])
    out, parts = torch.from_numpy(mean), [torch.from_numpy(value) for value in values]
    total = torch.empty(min(CHUNK, mean.size), dtype=torch.float64)
    for start in range(0, mean.size, CHUNK):
        place = slice(start, min(start + CHUNK, mean.size))
        chunk = total[: place.stop - start].zero_()
        for share, part in zip(shares, parts, strict=True):
            chunk.add_(part[place], alpha=float(share))
        out[place] = chunk
    return mean


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

    Every site has one vote. Withstands `trim` arbitrary updates.

    Raises:
        ConfigError: fewer than 2 * trim + 1 sites.
    """
    if len(values) <= 2 * trim:
        raise ConfigError(
            f"trimmed_mean: got {len(values)} sites, need {2 * trim + 1} to trim {trim} at each end. "
            "Lower rule.trim or take rule=weighted_mean."
        )
    ordered = np.sort(np.stack(values), axis=0)[trim : len(values) - trim]
    mean: np.ndarray = ordered.mean(axis=0, dtype=np.float64).astype(values[0].dtype)
    return mean


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
