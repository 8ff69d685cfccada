"""The fused CPU kernel of the views: affine gather, blur, gamma, scale, shift and noise of a row while it is in cache.

It computes what `spatial.resample`, `intensity.blur` and `intensity.adjust` compute, for the same drawn numbers. Rows
are independent and each is worked on by one thread, so the number of threads changes nothing in the result.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medfl.views.compiled import (
    CHUNK,
    HALF,
    LANES,
    ONE,
    ZERO,
    Array,
    compiled,
    f32,
    hashed,
    i32,
    power,
    soften,
    threaded,
    u32,
)
from medfl.views.intensity import LEVELS, quantiles

u64 = np.uint64
DROP = u32(32 - LEVELS)


class Drawn(NamedTuple):
    """The drawn numbers of R rows, as arrays: see `Spatial.draw` and `Intensity.draw`."""

    affine: Array  # (R, 3, 4) float32: source voxel from view voxel, axes (z, y, x); 2D has z = 0
    tone: Array  # (R, 4) float32
    taps: Array  # (R, T) float32
    salts: Array  # (R, 2) uint32
    quantiles: Array  # (4096,) float32
    reach: np.float32  # how far outside the image coordinates may lie: 0 repeats the border, 1 fades to zero


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
    """Gamma on [0, 1] in place; values outside (-1, 1) stay."""
    for k in range(line.size):
        value = line[k]
        p = power(value * HALF + HALF, gamma)
        line[k] = p + p - ONE if abs(value) < ONE else value


@compiled
def _finish(part: Array, picked: Array, offset: int, drawn: Drawn, row: int) -> None:
    """Scale, shift and the noise of the positions from `offset` on, in place."""
    scale, shift, sd = drawn.tone[row, 1], drawn.tone[row, 2], drawn.tone[row, 3]
    if sd == ZERO:
        for k in range(part.size):
            part[k] = part[k] * scale + shift
        return
    hashed(picked, offset, drawn.salts[row])
    quantiles = drawn.quantiles
    for k in range(part.size):
        part[k] = part[k] * scale + shift + sd * quantiles[u64(picked[k] >> DROP)]


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
def _rows(images: Array, out: Array, channels: int, drawn: Drawn, start: int, stop: int) -> None:
    """The first channels of rows `start` to `stop` of out (R, C, D, H, W).

    Row r shows image r modulo B of images (B, C, D, H, W).
    """
    picked = np.empty(CHUNK, np.uint32)
    for row in range(start, stop):
        made = out[row][:channels]
        _place(images[row % len(images)][:channels], made, drawn.affine[row], drawn.reach)
        if drawn.taps[row, drawn.taps.shape[1] // 2] < ONE:
            soften(made, drawn.taps[row])
        view = made.reshape(-1)
        for first in range(0, view.size, CHUNK):
            part = view[first : first + CHUNK]
            if drawn.tone[row, 0] != ONE:
                _curve(part, drawn.tone[row, 0])
            _finish(part, picked, first, drawn, row)


def render(
    images: Tensor,
    maps: Tensor,
    *,
    tone: Tensor,
    taps: Tensor,
    salts: Tensor,
    padding: str,
    channels: int | None = None,
) -> Tensor:
    """Views (R, C, *S) of images (B, C, *S), float32 on the CPU, on `torch.get_num_threads()` threads.

    Row r shows image r modulo B. `maps` (R, d, d + 1) is from `Spatial.draw`, tone and taps from `Intensity.draw`,
    salts (R, 2) int32.

    Args:
        channels: the first ones, which are made; what the others hold is left open. None: all.
    """
    rows, shape = len(maps), images.shape[1:]
    some = shape[0] if channels is None else channels
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
    threaded(lambda start, stop: _rows(source, target, some, drawn, start, stop), rows, voxels=out.numel())
    return out


def from_corner(maps: Tensor, size: torch.Size) -> Array:
    """Maps (R, d, d + 1) about the grid's centre as (R, 3, 4) about its first voxel; 2D gets an idle first axis."""
    dims = len(size)
    centre = (torch.tensor(size, dtype=torch.float32) - 1) / 2
    affine = torch.zeros(len(maps), 3, 4)
    affine[:, 3 - dims :, 3 - dims :] = maps
    affine[:, 3 - dims :, 3] += centre - maps[:, :, :dims] @ centre
    return affine.numpy()
