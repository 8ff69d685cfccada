"""The CPU kernel of masks: the nearest voxel at the places that the views' kernel takes its values from."""

from typing import Any

import numpy as np
from torch import Tensor

from medfl.views.compiled import LANES, ONE, ZERO, compiled, f32, i32, u32
from medfl.views.kernel import from_corner, u64


@compiled
def _rows(images: Any, out: Any, affine: Any, begin: int, border: bool) -> None:
    """The channels from `begin` on of out (R, C, D, H, W); row r shows image r modulo B of images (B, C, D, H, W)."""
    channels, depth, height, width = images.shape[1:]
    sides = (depth, height, width)
    padded = (width + LANES - 1) // LANES * LANES
    voxel, inside, line = np.empty(padded, np.uint32), np.empty(padded, np.float32), np.empty(padded, np.float32)
    for row in range(len(out)):
        source = images[row % len(images)]
        for z in range(depth):
            for y in range(height):
                voxel[:] = 0
                inside[:] = ONE
                for axis in range(3):
                    first = affine[row, axis, 0] * f32(z) + affine[row, axis, 1] * f32(y) + affine[row, axis, 3]
                    step, side, last = affine[row, axis, 2], u32(sides[axis]), f32(sides[axis] - 1)
                    for k in range(padded):
                        at = np.rint(first + step * f32(k))
                        kept = min(max(at, ZERO), last)
                        inside[k] = inside[k] if border or at == kept else ZERO
                        voxel[k] = u32(u32(voxel[k] * side) + u32(i32(kept)))
                for c in range(begin, channels):
                    volume = source[c].reshape(-1)
                    for k in range(padded):
                        line[k] = volume[u64(voxel[k])] if inside[k] == ONE else ZERO
                    for k in range(width):
                        out[row, c, z, y, k] = line[k]


def fill(out: Tensor, images: Tensor, maps: Tensor, *, begin: int, padding: str) -> None:
    """The channels from `begin` on of views out (R, C, *S) of images (B, C, *S), float32 and contiguous on the CPU.

    They become what `spatial.resample` gives with mode="nearest". Row r shows image r modulo B. Places midway between
    two voxels may fall to the other one, by rounding.
    """
    source, target = (x.view(len(x), x.shape[1], -1, *x.shape[-2:]).numpy() for x in (images.contiguous(), out))
    _rows(source, target, from_corner(maps, images.shape[2:]), begin, padding == "border")
