"""Poisson numbers from hashed bits, for a whole batch of rates at once: the photon noise of the strong views."""

import math

import torch
from torch import Tensor

from medfl.views.intensity import hashed, shifted

BITS = 24  # of each uniform number: float32 holds it exactly
SMALL = 4.0  # rate below which the law is inverted exactly
MOST = 18  # P(X > 18) < 2^-25 at the rate 4: no 24-bit number reaches further


def poisson(rates: Tensor, salts: Tensor) -> Tensor:
    """Poisson numbers of `rates` (R, C, *S) >= 0, float32: a pure function of rate, salts (R, 2) int32 and position.

    One uniform number per voxel goes through the inverse of the law: exactly below the rate 4; above, through its
    expansion in 1 / sqrt(rate), whose distribution function is within 4e-4 and mean and variance within 6e-4.
    """
    centred = (shifted(hashed(salts, rates[0].numel()), 32 - BITS) - (1 << (BITS - 1))).float() + 0.5
    centred = centred.view_as(rates) / (1 << BITS)  # in (-1/2, 1/2), symmetric
    return torch.where(rates < SMALL, _searched(rates, centred + 0.5), _expanded(rates, centred))


def _searched(rates: Tensor, uniform: Tensor) -> Tensor:
    """How many values k of the distribution function F lie below `uniform`, for rates up to 4.

    Follows (u - F(k)) / P(k), which needs one product per step: its sign turns once, and for good.
    """
    rates = rates.clamp(1e-9, SMALL)  # not 0: it divides; below 6e-8 nothing is counted
    excess = uniform * rates.exp() - 1
    inverse, minus = 1 / rates, torch.full((), -1.0, device=rates.device)
    signs, sign = excess.sign(), torch.empty_like(excess)
    for k in range(1, MOST):
        torch.addcmul(minus, excess, inverse, value=k, out=excess)
        signs += torch.sign(excess, out=sign)
    return ((signs + MOST) / 2).floor_()


def _expanded(rates: Tensor, centred: Tensor) -> Tensor:
    """The expansion in the normal quantile w of 1/2 + `centred`, for rates from 4 on, rounded down.

    Giles, Approximation of the inverse Poisson cumulative distribution function, ACM TOMS 42(1), 2016.
    """
    rates = rates.clamp_min(SMALL)
    root, w = rates.sqrt(), math.sqrt(2) * torch.erfinv(2 * centred)
    square = w * w
    value = rates + root * w + (1 / 3 + square / 6) - w * (1 / 36 + square / 72) / root
    return (value + (square * (7 / 810 + square / 270) - 8 / 405) / rates).floor_().clamp_min_(0)
