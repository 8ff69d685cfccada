"""The CPU kernel of masks: the nearest voxel at the places that the views' kernel takes its values from."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfl.views.kernel import compiled, from_corner

f32 = np.float32
i32 = np.int32


@compiled
def _rows(images: Any, out: Any, affine: Any, border: bool) -> None:
    """out (R, C, D, H, W); row r shows image r modulo B of images (B, C, D, H, W)."""
    channels, depth, height, width = images.shape[1:]
    lasts = (depth - 1, height - 1, width - 1)
    index, place = np.empty((3, width), np.int32), np.empty(width, np.int32)
    for row in range(len(out)):
        source = images[row % len(images)]
        for z in range(depth):
            for y in range(height):
                for k in range(width):
                    place[k] = 0
                for axis in range(3):
                    first = affine[row, axis, 0] * f32(z) + affine[row, axis, 1] * f32(y) + affine[row, axis, 3]
                    step, last = affine[row, axis, 2], f32(lasts[axis])
                    line = index[axis]
                    for k in range(width):
                        at = np.rint(first + step * f32(k))
                        inside = min(max(at, f32(0)), last)
                        line[k] = i32(inside)
                        place[k] |= i32(at != inside)  # 1: outside
                for c in range(channels):
                    volume = source[c].reshape(-1)
                    for k in range(width):
                        voxel = i32(i32(i32(index[0, k] * i32(height)) + index[1, k]) * i32(width)) + index[2, k]
                        value = volume[voxel]
                        out[row, c, z, y, k] = value if border or place[k] == 0 else f32(0)


def render(images: Tensor, maps: Tensor, *, padding: str) -> Tensor:
    """Views (R, C, *S) of images (B, C, *S), float32 on the CPU: what `spatial.resample` gives with mode="nearest".

    Row r shows image r modulo B. Places midway between two voxels may fall to the other one, by rounding.
    """
    out = torch.empty(len(maps), *images.shape[1:])
    source, target = (
        x.view(len(x), images.shape[1], -1, *images.shape[-2:]).numpy() for x in (images.contiguous(), out)
    )
    _rows(source, target, from_corner(maps, images.shape[2:]), padding == "border")
    return out
