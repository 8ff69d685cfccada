"""CPU kernels of the strong views' costly operations: what `operations` and `poisson` compute, row by row."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfl.views.intensity import MULTIPLIERS
from medfl.views.kernel import compiled, soften
from medfl.views.poisson import MOST, SMALL

f32 = np.float32
i32 = np.int32
u32 = np.uint32
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
FIRST, SECOND, THIRD = (u32(value) for value in MULTIPLIERS)
FINE = 1 << 16  # bins of values in [0, 1]: a rank is first found among them, then within one


@compiled
def _ranked(rows: Any, low: int, high: int, out: Any) -> None:
    """out (N, 2): the values of these two ranks of each row (N, P) of values in [0, 1]."""
    counts = np.zeros(FINE, np.int32)
    some = np.empty(rows.shape[1], np.float32)
    for row in range(len(rows)):
        values = rows[row]
        counts[:] = 0
        for k in range(values.size):
            counts[min(i32(values[k] * f32(FINE)), i32(FINE - 1))] += 1
        for which in range(2):
            rank, below, place = (low if which == 0 else high), 0, 0
            while below + counts[place] <= rank:
                below += counts[place]
                place += 1
            found = 0
            for k in range(values.size):
                if min(i32(values[k] * f32(FINE)), i32(FINE - 1)) == place:
                    some[found] = values[k]
                    found += 1
            out[row, which] = np.sort(some[:found])[rank - below]


def ranked(rows: Tensor, low: int, high: int) -> Tensor:
    """The values of two ranks, from 0, of each row (N, P) of float32 in [0, 1]: (N, 2)."""
    out = torch.empty(len(rows), 2)
    _ranked(rows.contiguous().numpy(), low, high, out.numpy())
    return out


@compiled
def _blurred(rows: Any, taps: Any) -> None:
    """Convolve each row (R, C, D, H, W) along every axis with its taps (R, T), in place; the border is repeated."""
    for row in range(len(rows)):
        soften(rows[row], taps[row])


def blurred(u: Tensor, taps: Tensor) -> Tensor:
    """What `intensity.blur` gives: u (R, C, *S) with taps (R, T)."""
    out = u.clone(memory_format=torch.contiguous_format)
    _blurred(out.view(*u.shape[:2], -1, *u.shape[-2:]).numpy(), taps.contiguous().numpy())
    return out


@compiled
def _normal(q: Any) -> Any:
    """The normal quantile of 1/2 + q (Wichura, algorithm AS 241, PPND7): relative error about 1e-7."""
    if abs(q) <= f32(0.425):
        r = f32(0.180625) - q * q
        top = ((f32(59.109374720) * r + f32(159.29113202)) * r + f32(50.434271938)) * r + f32(3.3871327179)
        return q * top / (((f32(67.187563600) * r + f32(78.757757664)) * r + f32(17.895169469)) * r + ONE)
    r = np.sqrt(-np.log(HALF - abs(q)))
    if r <= f32(5):
        r -= f32(1.6)
        top = ((f32(0.17023821103) * r + f32(1.3067284816)) * r + f32(2.7568153900)) * r + f32(1.4234372777)
        found = top / ((f32(0.12021132975) * r + f32(0.73700164250)) * r + ONE)
    else:
        r -= f32(5)
        top = ((f32(0.017337203997) * r + f32(0.42868294337)) * r + f32(3.0812263860)) * r + f32(6.6579051150)
        found = top / ((f32(0.012258202635) * r + f32(0.24197894225)) * r + ONE)
    return found if q > ZERO else -found


@compiled
def _photons(rows: Any, kappa: Any, salts: Any) -> None:
    """Each row (R, P) in place: its value times kappa becomes a Poisson number of that rate, and back."""
    for row in range(len(rows)):
        first_salt, second_salt, factor = salts[row, 0], salts[row, 1], kappa[row]
        for k in range(rows.shape[1]):
            bits = u32(u32(k) ^ first_salt)
            bits = u32(u32(bits ^ u32(bits >> u32(16))) * FIRST)
            bits = u32(u32(u32(bits ^ u32(bits >> u32(15))) * SECOND) + second_salt)
            bits = u32(u32(bits ^ u32(bits >> u32(16))) * THIRD)
            centred = (f32(i32(bits >> u32(8)) - i32(1 << 23)) + HALF) * f32(1 / (1 << 24))
            rate = rows[row, k] * factor
            if rate >= f32(SMALL):
                w = _normal(centred)
                square, root = w * w, np.sqrt(rate)
                value = rate + root * w + (f32(1 / 3) + square * f32(1 / 6))
                value -= w * (f32(1 / 36) + square * f32(1 / 72)) / root
                value += (square * (f32(7 / 810) + square * f32(1 / 270)) - f32(8 / 405)) / rate
                number = max(np.floor(value), ZERO)
            else:
                rate = max(rate, f32(1e-9))
                part = np.exp(-rate)
                total, number = part, ZERO
                while total < centred + HALF and number < f32(MOST - 1):
                    number += ONE
                    part *= rate / number
                    total += part
            rows[row, k] = min(number / factor, ONE)


def photons(u: Tensor, kappa: Tensor, salts: Tensor) -> Tensor:
    """Rows u (R, C, *S) seen by kappa (R,) photons at 1, at most 1; salts (R, 2) int32."""
    out = u.clone(memory_format=torch.contiguous_format)
    _photons(out.flatten(1).numpy(), kappa.contiguous().numpy(), salts.contiguous().numpy().view(np.uint32))
    return out
