"""From maps to supervision by codes, DiSSECT's discrete branch (arXiv:2509.18765): scales, their fusion, SERF."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.models.heads import MLP
from medfl.models.layers import convolution
from medfl.models.quantizer import Quantized, Quantizer

MODES = ("tokens", "pooled", "channel", "scales", "concat")


class Scale(nn.Module):
    """One scale's tokens: a 1x1 convolution to the width of the codes, each cell at unit length, then its quantizer.

    Args:
        channels: of the map.
        quantizer: K codes of width D.
        orthogonal: orthonormal weights instead of drawn ones.
        dims: spatial dimensions.
    """

    def __init__(self, channels: int, quantizer: Quantizer, *, orthogonal: bool, dims: int) -> None:
        super().__init__()
        self.projection = convolution(channels, quantizer.sums.shape[1], kernel=1, stride=1, dims=dims)
        if orthogonal:
            nn.init.orthogonal_(self.projection.get_parameter("weight"))
        self.quantizer = quantizer

    def tokens(self, maps: Tensor) -> Tensor:
        """Unit tokens (B, N, D), float32 or wider, of maps (B, C, *S) with N cells."""
        cells = self.projection(maps).flatten(2).transpose(1, 2)
        return F.normalize(cells.to(torch.promote_types(cells.dtype, torch.float32)), dim=2)

    def forward(self, maps: Tensor) -> tuple[Tensor, Quantized]:
        """Tokens (B, N, D) and their codes."""
        tokens = self.tokens(maps)
        return tokens, self.quantizer(tokens)


def fused(maps: Sequence[Tensor], weights: Tensor, grid: torch.Size) -> Tensor:
    """Weighted sum of maps (B, D, *S) of any sides on one grid, as tokens (B, N, D).

    Finer maps are averaged over the cells of the grid, coarser ones repeated (nearest neighbour).

    Args:
        weights: (maps,).
        grid: sides.
    """
    total = torch.stack([weight * _resized(one, grid) for weight, one in zip(weights, maps, strict=True)]).sum(0)
    return total.flatten(2).transpose(1, 2)


def _resized(maps: Tensor, grid: torch.Size) -> Tensor:
    finer = all(side >= cells for side, cells in zip(maps.shape[2:], grid, strict=True))
    return F.interpolate(maps, size=list(grid), mode="area" if finer else "nearest")  # area: adaptive average pooling


class Serf(nn.Module):
    """Supervision s (B, D) from the continuous embedding and the codes of one view, then a head.

    Args:
        mode: how `retrieve` reads the codes.
        width: D, of embedding, codes and s.
        hidden: of the head; None: no head.
        norm: of the head.
        residual: add the normalised embedding to what was retrieved.
    """

    def __init__(self, *, mode: str, width: int, hidden: int | None, norm: str, residual: bool) -> None:
        super().__init__()
        self.mode, self.residual = mode, residual
        inputs = 2 * width if mode == "concat" else width
        self.head = nn.Identity() if hidden is None else MLP(widths=[inputs, hidden, width], norm=norm)

    def forward(self, z: Tensor, tokens: Tensor) -> Tensor:
        """s (B, D) of z (B, D) and codes (B, N, D)."""
        z = z.to(tokens.dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            found = retrieve(z, tokens, mode=self.mode)
        s: Tensor = self.head(found + _levelled(z) if self.residual else found)
        return s


def retrieve(z: Tensor, tokens: Tensor, *, mode: str) -> Tensor:
    """What an embedding reads from the codes of its own image; the readings of DiSSECT's eq. (6).

    tokens, scales: attention over the codes, aₙ = softmaxₙ(<LN z, LN tₙ> / √D), r = Σ aₙ tₙ. With the codes'
    length 1 the logits would hardly differ, hence LN, layer normalisation without weights. For `scales` the tokens
    are the mean codes of each scale.
    pooled: the mean code q, the equation as printed for one key: its softmax over one logit is 1.
    channel: the equation for column vectors: rᵢ = Σⱼ softmaxⱼ(zᵢ qⱼ / √D) qⱼ.
    concat: (q, z), the ablation without SERF.

    Args:
        z: (B, D).
        tokens: (B, N, D).

    Returns:
        (B, D); (B, 2D) for concat.
    """
    if mode in ("tokens", "scales"):
        return F.scaled_dot_product_attention(_levelled(z)[:, None], _levelled(tokens), tokens)[:, 0]
    q = tokens.mean(1)
    if mode == "channel":
        key = q[..., None]
        return F.scaled_dot_product_attention(z[..., None], key, key, scale=q.shape[1] ** -0.5)[..., 0]
    return torch.cat([q, z], dim=1) if mode == "concat" else q


def _levelled(rows: Tensor) -> Tensor:
    """Layer normalisation without weights."""
    return F.layer_norm(rows, rows.shape[-1:])
