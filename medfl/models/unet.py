"""CU-Net: a U-Net of one contrast that gives deep features, local features and a reconstruction (NSLF)."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.models.blocks import TRANSPOSED, Block, ordered
from medfl.models.diffusion import cropped, padded
from medfl.models.layers import CONVOLUTIONS

DARK = -2.0  # logit of a reconstruction at the start: narrow nets that start grey shut their ReLUs to get darker


class UNet(nn.Module):
    """Channels w, 2w, 4w, 8w, 8w from the full side to 1/16, and back; (B, 1, *S) in [0, 1].

    Sides that 2^levels does not divide are padded with their border and cropped back; the deep features are those
    of the padded image. Instance norm leaves a bottom of one voxel unnormalised.

    Args:
        base_width: w.
        levels: how often the sides are halved; 3 for slabs of few slices. The bottom always has 8w channels.
        norm: instance | batch | group.
        spatial_dims: 2 | 3.
        reconstructs: False: without the last layer, for `maps` alone.
    """

    def __init__(
        self, base_width: int, *, levels: int, norm: str, spatial_dims: int, reconstructs: bool = True
    ) -> None:
        super().__init__()
        self.levels = levels
        widths = [*level_widths(base_width, levels), 8 * base_width]
        self.enter = _double(1, base_width, norm=norm, dims=spatial_dims)
        self.down = nn.ModuleList(_double(a, b, norm=norm, dims=spatial_dims) for a, b in pairwise(widths))
        self.rise, self.up = nn.ModuleList(), nn.ModuleList()
        for below, skip, outputs in ascent(base_width, levels):
            self.rise.append(TRANSPOSED[spatial_dims](below, below, 2, stride=2))
            self.up.append(_double(below + skip, outputs, norm=norm, dims=spatial_dims))
        if reconstructs:
            self.out = CONVOLUTIONS[spatial_dims](base_width, 1, 1)
            nn.init.constant_(self.out.bias, DARK)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Deep features (B, 8w, *S/2^levels), local features (B, w, *S), reconstruction (B, 1, *S) in (0, 1)."""
        deep, local = self.maps(images)
        return deep, local, torch.sigmoid(self.out(local))

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Deep and local features, as in `forward`."""
        *skips, deep = self._descent(images)
        current = deep
        for rise, up, skip in zip(self.rise, self.up, reversed(skips), strict=True):
            current = up(torch.cat([skip, rise(ordered(current))], dim=1))
        return deep, cropped(current, images.shape[2:])

    def deep(self, images: Tensor) -> Tensor:
        """The deep features alone."""
        return self._descent(images)[-1]

    def _descent(self, images: Tensor) -> list[Tensor]:
        found = [self.enter(padded(images, 2**self.levels))]
        pool = F.max_pool2d if images.dim() == 4 else F.max_pool3d
        for level in self.down:
            found.append(level(pool(ordered(found[-1]), 2)))
        return found


def level_widths(base_width: int, levels: int) -> list[int]:
    """Channels of each level above the bottom: w, 2w, 4w, 8w, 8w, ..."""
    return [base_width * min(2**level, 8) for level in range(levels)]


def ascent(base_width: int, levels: int) -> list[tuple[int, int, int]]:
    """From the bottom up: channels from below, of the level that is reached, and of what leaves it."""
    widths, below, found = level_widths(base_width, levels), 8 * base_width, []
    for level in reversed(range(levels)):
        found.append((below, widths[level], widths[max(level - 1, 0)]))
        below = found[-1][2]
    return found


def _double(inputs: int, outputs: int, *, norm: str, dims: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, norm=norm, dims=dims), Block(outputs, outputs, norm=norm, dims=dims))
