"""The fusion decoder of NSLF: a score for every voxel of every modality, and their weighted mean as fused image."""

import torch
from torch import Tensor, nn

from medfl.models.blocks import TRANSPOSED, Block, ordered
from medfl.models.diffusion import cropped
from medfl.models.layers import CONVOLUTIONS
from medfl.models.unet import ascent


class FusionDecoder(nn.Module):
    """Scores of one modality from its deep and local features; one set of weights for all modalities.

    Args as in `UNet`, whose features it takes.
    """

    def __init__(self, base_width: int, *, levels: int, norm: str, spatial_dims: int) -> None:
        super().__init__()
        self.rise, self.up = nn.ModuleList(), nn.ModuleList()
        for below, _, outputs in ascent(base_width, levels):
            self.rise.append(TRANSPOSED[spatial_dims](below, below, 2, stride=2))
            self.up.append(Block(below, outputs, norm=norm, dims=spatial_dims))
        self.out = CONVOLUTIONS[spatial_dims](2 * base_width, 1, 3, padding=1)

    def forward(self, deep: Tensor, local: Tensor) -> Tensor:
        """Logits (R, 1, *S) of the scores."""
        current = deep
        for rise, up in zip(self.rise, self.up, strict=True):
            current = up(rise(ordered(current)))
        both = torch.cat([cropped(current, local.shape[2:]), local], dim=1)
        logits: Tensor = self.out(ordered(both))
        return logits


def fusion_weights(logits: Tensor, held: Tensor) -> Tensor:
    """w_m = s_m / Σ_k s_k over the modalities held, with the scores s = sigmoid(logits): (B, M, *S), sum 1.

    As a softmax of log s, so that scores too small for a float still share out the whole weight. 0 for modalities that
    are not held (B, M); all 0 where none is.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    there = held.view(*held.shape, *[1] * (logits.dim() - 2))
    scores = torch.nn.functional.logsigmoid(logits.to(wide)).masked_fill(~there, torch.finfo(wide).min)
    return scores.softmax(dim=1) * there
