"""What the CPU kernels of the views share: how they are compiled, and parts of them.

The code is written for the vectoriser: 32-bit numbers throughout, no branches in the inner loops, unsigned indices
(signed ones cost numba a wrap-around test each), lines padded to whole vectors. The threads are Python's (the compiled
code releases the GIL): numba's portable pool aborts the process when two threads enter it at once, as two sites in one
process may.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medfl import jit
from medfl.views.intensity import MULTIPLIERS

Array = npt.NDArray[Any]
LANES = 16  # float32 of the widest vector register
CHUNK = 1024  # voxels that a step takes at once, so that what it works with stays in the cache
WORTH = 1 << 15  # voxels below which starting threads costs more than it saves
f32 = np.float32
i32 = np.int32
u32 = np.uint32
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
FIRST, SECOND, THIRD = (u32(value) for value in MULTIPLIERS)
EXPONENT, BIAS, ROOT_HALF = i32(23), i32(127), i32(0x3F3504F3)  # float32's layout; the bits of sqrt(1/2)


def _polynomial(function: Callable[[Array], Array], degree: int, low: float, high: float) -> tuple[np.float32, ...]:
    """Coefficients, lowest power first, of the Chebyshev interpolant of `function` on [low, high]."""
    fit = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    return tuple(f32(value) for value in fit.convert(kind=np.polynomial.Polynomial).coef)


# log2(1 + t) = t * P(t) for 1 + t in [sqrt(1/2), sqrt(2)], and 2 ** f for f in [-1/2, 1/2]: both to about 1e-7.
LOG2 = _polynomial(lambda t: np.log2(1 + t) / t, 8, math.sqrt(0.5) - 1, math.sqrt(2) - 1)
EXP2 = _polynomial(np.exp2, 5, -0.5, 0.5)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled so that NaN and infinity keep their meaning; the allowed liberties are contraction and reordering."""
    return jit.compiled(function, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


@compiled
def log2(u: Any) -> Any:
    """Of a positive normal number."""
    bits = i32(f32(u).view(np.int32))
    power = i32(i32(bits - ROOT_HALF) >> EXPONENT)
    t = i32(bits - i32(power << EXPONENT)).view(np.float32) - ONE
    p = ((LOG2[8] * t + LOG2[7]) * t + LOG2[6]) * t + LOG2[5]
    p = (((p * t + LOG2[4]) * t + LOG2[3]) * t + LOG2[2]) * t + LOG2[1]
    return (p * t + LOG2[0]) * t + f32(power)


@compiled
def power(u: Any, gamma: Any) -> Any:
    """u ** gamma of u in (0, 1), as 2 ** (gamma * log2(u)); what is below 2 ** -126 is that."""
    exponent = max(log2(u) * gamma, f32(-126))
    whole = np.floor(exponent + HALF)
    f = exponent - whole
    p = ((((EXP2[5] * f + EXP2[4]) * f + EXP2[3]) * f + EXP2[2]) * f + EXP2[1]) * f + EXP2[0]
    return p * i32(i32(i32(whole) + BIAS) << EXPONENT).view(np.float32)


@compiled
def hashed(picked: Array, start: int, salts: Array) -> None:
    """32 random bits for the positions from `start` on: see `intensity.hashed`."""
    first_salt, second_salt, offset = salts[0], salts[1], u32(start)
    for k in range(picked.size):
        bits = u32(u32(offset + u32(k)) ^ first_salt)
        bits = u32(u32(bits ^ u32(bits >> u32(16))) * FIRST)
        bits = u32(u32(u32(bits ^ u32(bits >> u32(15))) * SECOND) + second_salt)
        picked[k] = u32(u32(bits ^ u32(bits >> u32(16))) * THIRD)


@compiled
def _blur(volume: Array, taps: Array, outer: int, side: int, inner: int) -> None:
    """Convolve a flat volume, seen as (outer, side, inner), along `side` in place, repeating the border."""
    radius, slab = taps.size // 2, side * inner
    padded = np.empty((side + 2 * radius) * inner, np.float32)
    for block in range(outer):
        view = volume[block * slab : (block + 1) * slab]
        for j in range(side + 2 * radius):
            start = min(max(j - radius, 0), side - 1) * inner
            for k in range(inner):
                padded[j * inner + k] = view[start + k]
        for k in range(slab):
            view[k] = ZERO
        for tap in range(taps.size):
            shifted, share = padded[tap * inner : tap * inner + slab], taps[tap]
            for k in range(slab):
                view[k] += share * shifted[k]


@compiled
def soften(out: Array, taps: Array) -> None:
    """Blur a view (C, D, H, W) along every axis in place."""
    for c in range(len(out)):
        volume = out[c].reshape(-1)
        outer, inner = 1, volume.size
        for side in out.shape[1:]:
            inner //= side
            if side > 1:
                _blur(volume, taps, outer, side, inner)
            outer *= side


def threaded(work: Callable[[int, int], None], rows: int, *, voxels: int) -> None:
    """work(start, stop) for all rows, of so many voxels together, on `torch.get_num_threads()` threads."""
    threads = min(torch.get_num_threads(), rows) if voxels >= WORTH else 1
    if threads == 1:
        work(0, rows)
        return
    edges = np.linspace(0, rows, min(4 * threads, rows) + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(work, *edge) for edge in itertools.pairwise(edges)]
    for part in parts:
        part.result()
