"""The fused CPU kernel of the views: affine gather, blur, gamma, scale, shift and noise of a row while it is in cache.

It computes what `spatial.resample`, `intensity.blur` and `intensity.adjust` compute, for the same drawn numbers. Rows
are independent and each is worked on by one thread, so the number of threads changes nothing in the result. The
threads are Python's (the compiled code releases the GIL): numba's portable pool aborts the process when two
threads enter it at once, as two sites in one process may.

The code is written for the vectoriser: 32-bit numbers throughout, no branches in the inner loops, unsigned indices
(signed ones cost numba a wrap-around test each), lines padded to whole vectors.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medfl import jit
from medfl.views.intensity import LEVELS, MULTIPLIERS, quantiles

Array = npt.NDArray[Any]
LANES = 16  # float32 of the widest vector register
CHUNK = 1024  # voxels whose noise is drawn at once
WORTH = 1 << 15  # voxels below which starting threads costs more than it saves
f32 = np.float32
i32 = np.int32
u32 = np.uint32
u64 = np.uint64
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
FIRST, SECOND, THIRD = (u32(value) for value in MULTIPLIERS)
DROP = u32(32 - LEVELS)
EXPONENT, BIAS, ROOT_HALF = i32(23), i32(127), i32(0x3F3504F3)  # float32's layout; the bits of sqrt(1/2)


def _polynomial(function: Callable[[Array], Array], degree: int, low: float, high: float) -> tuple[np.float32, ...]:
    """Coefficients, lowest power first, of the Chebyshev interpolant of `function` on [low, high]."""
    fit = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    return tuple(f32(value) for value in fit.convert(kind=np.polynomial.Polynomial).coef)


# log2(1 + t) = t * P(t) for 1 + t in [sqrt(1/2), sqrt(2)], and 2 ** f for f in [-1/2, 1/2]: both to about 1e-7.
LOG2 = _polynomial(lambda t: np.log2(1 + t) / t, 8, math.sqrt(0.5) - 1, math.sqrt(2) - 1)
EXP2 = _polynomial(np.exp2, 5, -0.5, 0.5)


class Drawn(NamedTuple):
    """The drawn numbers of R rows, as arrays: see `Spatial.draw` and `Intensity.draw`."""

    affine: Array  # (R, 3, 4) float32: source voxel from view voxel, axes (z, y, x); 2D has z = 0
    tone: Array  # (R, 4) float32
    taps: Array  # (R, T) float32
    salts: Array  # (R, 2) uint32
    quantiles: Array  # (4096,) float32
    reach: np.float32  # how far outside the image coordinates may lie: 0 repeats the border, 1 fades to zero


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled so that NaN and infinity keep their meaning; the allowed liberties are contraction and reordering."""
    return jit.compiled(function, fastmath={"contract", "reassoc", "nsz"})


@compiled
def _weigh(
    index: Array, low: Array, high: Array, first: np.float32, step: np.float32, last: int, reach: np.float32
) -> None:
    """Lower neighbour and the two weights along one axis for the coordinates `first + k * step`.

    The weight of a voxel is the hat function of its distance; outside [0, last] it fades by itself.
    """
    top = f32(last) + reach
    for k in range(index.size):
        coordinate = min(max(first + step * f32(k), -reach), top)
        lower = min(max(i32(np.floor(coordinate)), i32(0)), i32(last - 1))
        distance = coordinate - f32(lower)
        index[k] = lower
        low[k] = max(ZERO, ONE - abs(distance))
        high[k] = max(ZERO, ONE - abs(distance - ONE))


@compiled
def _gather_plane(line: Array, source: Array, base: Array, index: Array, weight: Array, width: int) -> None:
    """Bilinear values of one line from a flat image `width` wide."""
    for k in range(line.size):
        base[k] = u32(u32(index[1, k] * i32(width)) + index[2, k])
    right, down = u64(1), u64(width)
    for k in range(line.size):
        a = u64(base[k])
        b = a + down
        low, high = weight[4, k], weight[5, k]
        upper = source[a] * low + source[a + right] * high
        lower = source[b] * low + source[b + right] * high
        line[k] = upper * weight[2, k] + lower * weight[3, k]


@compiled
def _gather_volume(
    line: Array, source: Array, base: Array, index: Array, weight: Array, width: int, height: int
) -> None:
    """Trilinear values of one line from a flat volume of lines `width` long, `height` of them in a slice."""
    for k in range(line.size):
        row = u32(u32(index[0, k] * i32(height)) + index[1, k])
        base[k] = u32(u32(row * u32(width)) + index[2, k])
    right, down, deep = u64(1), u64(width), u64(width * height)
    for k in range(line.size):
        a = u64(base[k])
        b, c = a + down, a + deep
        d = c + down
        low, high = weight[4, k], weight[5, k]
        near = (source[a] * low + source[a + right] * high) * weight[2, k]
        near += (source[b] * low + source[b + right] * high) * weight[3, k]
        far = (source[c] * low + source[c + right] * high) * weight[2, k]
        far += (source[d] * low + source[d + right] * high) * weight[3, k]
        line[k] = near * weight[0, k] + far * weight[1, k]


@compiled
def _curve(line: Array, gamma: np.float32) -> None:
    """Gamma on [0, 1] in place, as 2 ** (gamma * log2(u)); values outside (-1, 1) stay."""
    for k in range(line.size):
        value = line[k]
        bits = i32(f32(value * HALF + HALF).view(np.int32))
        power = i32(i32(bits - ROOT_HALF) >> EXPONENT)
        t = i32(bits - i32(power << EXPONENT)).view(np.float32) - ONE
        p = ((LOG2[8] * t + LOG2[7]) * t + LOG2[6]) * t + LOG2[5]
        p = (((p * t + LOG2[4]) * t + LOG2[3]) * t + LOG2[2]) * t + LOG2[1]
        exponent = max(((p * t + LOG2[0]) * t + f32(power)) * gamma, f32(-126))
        whole = np.floor(exponent + HALF)
        f = exponent - whole
        p = ((((EXP2[5] * f + EXP2[4]) * f + EXP2[3]) * f + EXP2[2]) * f + EXP2[1]) * f + EXP2[0]
        p = p * i32(i32(i32(whole) + BIAS) << EXPONENT).view(np.float32)
        line[k] = p + p - ONE if abs(value) < ONE else value


@compiled
def _finish(part: Array, picked: Array, offset: int, drawn: Drawn, row: int) -> None:
    """Scale, shift and the noise of the positions from `offset` on, in place."""
    scale, shift, sd = drawn.tone[row, 1], drawn.tone[row, 2], drawn.tone[row, 3]
    if sd == ZERO:
        for k in range(part.size):
            part[k] = part[k] * scale + shift
        return
    first_salt, second_salt, start = drawn.salts[row, 0], drawn.salts[row, 1], u32(offset)
    for k in range(picked.size):
        bits = u32(u32(start + u32(k)) ^ first_salt)
        bits = u32(u32(bits ^ u32(bits >> u32(16))) * FIRST)
        bits = u32(u32(u32(bits ^ u32(bits >> u32(15))) * SECOND) + second_salt)
        bits = u32(u32(bits ^ u32(bits >> u32(16))) * THIRD)
        picked[k] = u32(bits >> DROP)
    quantiles = drawn.quantiles
    for k in range(part.size):
        part[k] = part[k] * scale + shift + sd * quantiles[u64(picked[k])]


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
def _place(image: Array, out: Array, affine: Array, reach: np.float32) -> None:
    """The spatial part of one view, image and out (C, D, H, W)."""
    channels, depth, height, width = image.shape
    padded = (width + LANES - 1) // LANES * LANES
    index, weight = np.empty((3, padded), np.int32), np.empty((6, padded), np.float32)
    base, line = np.empty(padded, np.uint32), np.empty(padded, np.float32)
    lasts = (depth - 1, height - 1, width - 1)
    for z in range(depth):
        for y in range(height):
            for axis in range(0 if depth > 1 else 1, 3):
                first = affine[axis, 0] * f32(z) + affine[axis, 1] * f32(y) + affine[axis, 3]
                low, high = weight[2 * axis], weight[2 * axis + 1]
                _weigh(index[axis], low, high, first, affine[axis, 2], lasts[axis], reach)
            for c in range(channels):
                if depth > 1:
                    _gather_volume(line, image[c].reshape(-1), base, index, weight, width, height)
                else:
                    _gather_plane(line, image[c].reshape(-1), base, index, weight, width)
                for k in range(width):
                    out[c, z, y, k] = line[k]


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


@compiled
def _rows(images: Array, out: Array, drawn: Drawn, start: int, stop: int) -> None:
    """Rows `start` to `stop` of out (R, C, D, H, W); row r shows image r modulo B of images (B, C, D, H, W)."""
    picked = np.empty(CHUNK, np.uint32)
    for row in range(start, stop):
        _place(images[row % len(images)], out[row], drawn.affine[row], drawn.reach)
        if drawn.taps[row, drawn.taps.shape[1] // 2] < ONE:
            soften(out[row], drawn.taps[row])
        view = out[row].reshape(-1)
        for first in range(0, view.size, CHUNK):
            part = view[first : first + CHUNK]
            if drawn.tone[row, 0] != ONE:
                _curve(part, drawn.tone[row, 0])
            _finish(part, picked, first, drawn, row)


def render(images: Tensor, maps: Tensor, *, tone: Tensor, taps: Tensor, salts: Tensor, padding: str) -> Tensor:
    """Views (R, C, *S) of images (B, C, *S), float32 on the CPU, on `torch.get_num_threads()` threads.

    Row r shows image r modulo B. `maps` (R, d, d + 1) is from `Spatial.draw`, tone and taps from `Intensity.draw`,
    salts (R, 2) int32.
    """
    rows, shape = len(maps), images.shape[1:]
    out = torch.empty(rows, *shape)
    source, target = (x.view(len(x), shape[0], -1, *shape[-2:]).numpy() for x in (images.contiguous(), out))
    drawn = Drawn(
        affine=from_corner(maps, shape[1:]),
        tone=tone.numpy(),
        taps=taps.numpy(),
        salts=salts.numpy().view(np.uint32),
        quantiles=quantiles(images.device).numpy(),
        reach=np.float32(padding == "zeros"),
    )
    threads = min(torch.get_num_threads(), rows) if out.numel() >= WORTH else 1
    if threads == 1:
        _rows(source, target, drawn, 0, rows)
        return out
    edges = np.linspace(0, rows, min(4 * threads, rows) + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(_rows, source, target, drawn, *edge) for edge in itertools.pairwise(edges)]
    for part in parts:
        part.result()
    return out


def from_corner(maps: Tensor, size: torch.Size) -> Array:
    """Maps (R, d, d + 1) about the grid's centre as (R, 3, 4) about its first voxel; 2D gets an idle first axis."""
    dims = len(size)
    centre = (torch.tensor(size, dtype=torch.float32) - 1) / 2
    affine = torch.zeros(len(maps), 3, 4)
    affine[:, 3 - dims :, 3 - dims :] = maps
    affine[:, 3 - dims :, 3] += centre - maps[:, :, :dims] @ centre
    return affine.numpy()
