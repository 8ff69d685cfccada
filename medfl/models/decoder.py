"""A U-Net decoder for a `ResNet`: from the maps of its layers back to the full side (Ronneberger et al. 2015)."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.models.blocks import Block
from medfl.models.encoders import STEMS, ResNet
from medfl.models.layers import CONVOLUTIONS, convolution

NARROWEST = 8  # channels near the full side
POOLED = 3  # modules of a stem before its pool
PRIOR = 2.0  # logit of the background at the start, and minus that of all others: most voxels are background


class Decoder(nn.Module):
    """Logits of the images' own size from the maps of `pyramid`; 5.3 million weights for a 2D ResNet-50.

    From the coarsest map on: fewer channels, enlarge to the side of the next finer map, concatenate, two convolutions.
    The width is that of the encoder's stem at layer1, doubled for each layer below and halved for each level above. The
    norm is the encoder's, so that a federation treats both alike.

    Args:
        encoder: what the maps are of; it is read, not kept.
        labels: channels of the logits.
    """

    def __init__(self, encoder: ResNet, *, labels: int) -> None:
        super().__init__()
        built = encoder.describe()
        dims, narrow = built["spatial_dims"], built["base_width"]
        finer = [built["in_channels"], narrow][: _halvings(encoder)]
        skips = [*finer, *encoder.stage_widths]
        widths = [max(NARROWEST, narrow >> level) for level in range(len(finer), 0, -1)]
        widths += [narrow << level for level in range(3)] + [encoder.width]
        sizes: dict[str, Any] = {"norm": built["norm"], "dims": dims}
        self.rise, self.up = nn.ModuleList(), nn.ModuleList()
        for skip, (width, below) in zip(skips, pairwise(widths), strict=False):
            self.rise.append(convolution(below, width, kernel=1, stride=1, dims=dims))
            self.up.append(nn.Sequential(Block(skip + width, width, **sizes), Block(width, width, **sizes)))
        self.out = CONVOLUTIONS[dims](widths[0], labels, 1)
        nn.init.constant_(self.out.bias, -PRIOR)  # type: ignore[arg-type]
        nn.init.constant_(self.out.bias[:1], PRIOR)  # type: ignore[index]

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Logits (B, labels, *S) of maps from fine to coarse, the first of side S."""
        *skips, current = maps
        for rise, up, skip in zip(reversed(self.rise), reversed(self.up), reversed(skips), strict=True):
            larger = F.interpolate(rise(current), skip.shape[2:], mode="nearest")  # with equal gradients in every run
            current = up(torch.cat([skip.to(larger.dtype), larger], dim=1))
        logits: Tensor = self.out(current)
        return logits


def pyramid(encoder: ResNet, images: Tensor) -> list[Tensor]:
    """Maps of images (B, C, *S) from the full side to layer4: what of the images and the stem is finer than layer1."""
    found = [images]
    current = encoder.stem[:POOLED](images)
    if len(encoder.stem) > POOLED:
        found.append(current)
        current = encoder.stem[POOLED:](current)
    for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        current = layer(current)
        found.append(current)
    return found[-(4 + _halvings(encoder)) :]


def _halvings(encoder: ResNet) -> int:
    """How often the stem halves the sides: 2 with a pool, else 1 or 0."""
    _, stride, pool = STEMS[encoder.describe()["stem"]]
    return int(stride > 1) + int(pool)
