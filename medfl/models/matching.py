"""The geometric matching network of NSLF: how the fused image would have to be moved to lie on its sources.

It teaches fusion to keep edges where the sources have them; it is no part of what is exported. From GVSL (He et al.,
CVPR 2023), built so that its affine part learns, and so that it starts from the identity.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.models.blocks import Rows, Slots
from medfl.models.layers import CONVOLUTIONS, pooled
from medfl.models.warp import affine_field, affine_numbers, bounded_affine, compose, positions, warp

PARTS = ("rotation", "scale", "translation", "shear")


class Match(NamedTuple):
    """The fused image on its sources."""

    warped: Tensor  # (B, 1, *S)
    field: Tensor  # (B, d, *S), of both parts together, in voxels
    local: Tensor  # (B, d, *S), of the deformable part alone


class Affine(nn.Module):
    """Coarse part: an affine map from the deep features."""

    def __init__(self, modalities: Sequence[str], width: int, dims: int) -> None:
        super().__init__()
        self.slots = Slots(modalities, width, width, fused=True, dims=dims)
        self.norm = nn.GroupNorm(_groups(width), width)
        numbers = zip(PARTS, affine_numbers(dims), strict=True)
        self.heads = nn.ModuleDict({part: _zeroed(nn.Linear(width, count)) for part, count in numbers})

    def forward(self, deep: Mapping[str, Rows], fused: Tensor) -> Tensor:
        """Maps (B, d, d + 1) from the modalities' deep features and those of the fused image."""
        found = pooled(F.relu(self.norm(self.slots(deep, like=fused, fused=fused))))
        return bounded_affine(*(self.heads[part](found).to(found.dtype) for part in PARTS))


class Deformation(nn.Module):
    """Fine part: a displacement of every voxel from the local features."""

    def __init__(self, modalities: Sequence[str], width: int, dims: int) -> None:
        super().__init__()
        hidden = max(width // 2, 1)
        self.slots = Slots(modalities, width, hidden, fused=True, dims=dims)
        self.norm = nn.GroupNorm(_groups(hidden), hidden)
        self.out = _zeroed(CONVOLUTIONS[dims](hidden, dims, 3, padding=1))

    def forward(self, local: Mapping[str, Rows], fused: Tensor) -> Tensor:
        """Field (B, d, *S) from the modalities' local features and those of the fused image."""
        field: Tensor = self.out(F.relu(self.norm(self.slots(local, like=fused, fused=fused))))
        return field.to(torch.promote_types(field.dtype, torch.float32))


class Matching(nn.Module):
    """Affine at the coarsest scale, then a displacement field at the full one; the image is sampled once.

    Args:
        modalities: names of the slots.
        base_width: of the U-Nets whose features it takes.
        spatial_dims: 2 | 3.
    """

    def __init__(self, modalities: Sequence[str], base_width: int, *, spatial_dims: int) -> None:
        super().__init__()
        self.affine = Affine(modalities, 8 * base_width, spatial_dims)
        self.deformation = Deformation(modalities, base_width, spatial_dims)

    def forward(
        self, deep: Mapping[str, Rows], local: Mapping[str, Rows], *, image: Tensor, fused: tuple[Tensor, Tensor]
    ) -> Match:
        """Move a fused image.

        Args:
            deep, local: features of the modalities, for the rows that hold them.
            image: the fused image (B, 1, *S).
            fused: its own deep and local features.
        """
        fused_deep, fused_local = fused
        maps = self.affine(deep, fused_deep)
        grid = positions(image.shape[2:], maps)
        found = self.deformation(local, warp(fused_local, affine_field(maps, grid)))
        field = compose(found, maps)
        return Match(warp(image, field), field, found)


def _groups(channels: int) -> int:
    """Groups of 8 channels, or else the most that divide them into 8 or more."""
    return math.gcd(max(channels // 8, 1), channels)


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
