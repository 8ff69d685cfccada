"""The feature segmentation decoder of NSLF: tumour classes from local features and the fused image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.models.blocks import Block, Rows, Slots, norm_of
from medfl.models.layers import CONVOLUTIONS

CLASSES = 4  # background, necrotic or non-enhancing core, oedema, enhancing tumour


class Segmenter(nn.Module):
    """Local features (R, w, *S) of each modality -> logits (B, 4, *S).

    Args:
        modalities: names of the slots; () leaves only that of the fused image's features.
        base_width: w.
        norm: instance | batch | group.
        use_fused: give the fused image to the last layer, next to its features.
        spatial_dims: 2 | 3.
    """

    def __init__(
        self, modalities: Sequence[str], base_width: int, *, norm: str, use_fused: bool, spatial_dims: int
    ) -> None:
        super().__init__()
        w, dims = base_width, spatial_dims
        self.use_fused = use_fused
        self.slots = Slots(modalities, w, 2 * w, fused=not modalities, dims=dims)
        self.norm = norm_of(norm, 2 * w, dims=dims)
        widths = ((2 * w, 2 * w), (2 * w, w), (w, w))
        self.path = nn.Sequential(*(Block(a, b, norm=norm, dims=dims) for a, b in widths))
        self.out = CONVOLUTIONS[dims](w + use_fused, CLASSES, 1)

    def forward(self, parts: dict[str, Rows], *, image: Tensor, fused: Tensor | None = None) -> Tensor:
        """Logits from the modalities' rows, the fused image (B, 1, *S), and its own features if they have a slot."""
        maps = F.relu(self.norm(self.slots(parts, like=image, fused=fused)), inplace=True)
        maps = self.path(maps)
        if self.use_fused:
            maps = torch.cat([maps, image.to(maps.dtype)], dim=1)
        logits: Tensor = self.out(maps)
        return logits
