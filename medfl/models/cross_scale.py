"""Heads on the encoder's maps: DCL-CsTP's cross-scale token projection and the two heads it is compared with.

None of them mixes images: the norms are layer norms.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.errors import ConfigError, one_of
from medfl.models.heads import MLP
from medfl.models.layers import convolution, pooled

KINDS = ("cstp", "mlp", "self_attention")


class SelfAttention(nn.Module):
    """softmax(Q Kᵀ / √d) V of the cells of a map (B, C, *S): tokens (B, N, C), N the number of cells.

    Q is of the cells, K and V are of `sources`, here the cells too; both normalised. d = C / heads.

    Args:
        width: C.
        heads: attend independently, each with C / heads of the channels of Q, K and V.

    Raises:
        ConfigError: heads that do not divide the width.
    """

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"method.heads: got {heads}, need a divisor of the {width} channels of the tokens.")
        self.heads = heads
        self.query_norm, self.source_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        # no bias: the softmax cancels that of the keys, the norm's and the output's stand for the other two
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.output = nn.Linear(width, width)

    def sources(self, maps: Tensor) -> Tensor:
        """What is attended to, before its norm: (B, M, C)."""
        return tokenized(maps)

    def forward(self, maps: Tensor) -> Tensor:
        """Tokens (B, N, C), without the residual.

        Raises:
            ValueError: a map of one cell.
        """
        queries, keys, values = self._projected(maps)
        read = F.scaled_dot_product_attention(queries, keys, values)
        found: Tensor = self.output(read.transpose(1, 2).flatten(2))
        return found

    @torch.no_grad()
    def weights(self, maps: Tensor) -> Tensor:
        """softmax(Q Kᵀ / √d), (B, heads, N, M): what `forward` reads where the values are unit vectors."""
        queries, keys, _ = self._projected(maps)
        units = torch.eye(keys.shape[2], dtype=keys.dtype, device=keys.device)
        return F.scaled_dot_product_attention(queries, keys, units.expand(*keys.shape[:2], -1, -1))

    def _projected(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (B, heads, N, d), K and V (B, heads, M, d)."""
        if maps.shape[2:].numel() < 2:
            raise ValueError(
                f"{type(self).__name__}: got maps {tuple(maps.shape)}; over a single cell the attention is constant. "
                "Use a larger data.size, an encoder.stem with a smaller stride, or method.head=mlp."
            )
        sources = self.source_norm(self.sources(maps))
        queries = self.query(self.query_norm(tokenized(maps)))
        q, k, v = (
            each.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for each in (queries, self.key(sources), self.value(sources))
        )
        return q, k, v


class CrossScaleAttention(SelfAttention):
    """Self-attention whose sources are a map of half the side, the sum of two scales (DCL-CsTP).

    S = DW3/2(DW3(X)) + DW5/2(X), the sources are a 1x1 convolution of S + DW3(S); DWk/s: a depth-wise convolution of
    kernel k and stride s. M is the product of ⌈side / 2⌉: 1 for sides of 2, where all cells read the same.

    Args:
        width, heads: as in SelfAttention.
        dims: spatial dimensions, 2 | 3.
    """

    def __init__(self, width: int, *, heads: int, dims: int) -> None:
        super().__init__(width, heads=heads)
        self.fine = _depthwise(width, kernel=3, stride=1, dims=dims)
        self.coarse = _depthwise(width, kernel=5, stride=2, dims=dims)
        self.down = _depthwise(width, kernel=3, stride=2, dims=dims)
        self.refine = _depthwise(width, kernel=3, stride=1, dims=dims)
        self.fuse = nn.Linear(width, width)  # a 1x1 convolution with bias, on tokens

    def sources(self, maps: Tensor) -> Tensor:
        """Tokens of the fused map, (B, M, C)."""
        scales = self.down(self.fine(maps)) + self.coarse(maps)
        fused: Tensor = self.fuse(tokenized(scales + self.refine(scales)))
        return fused


class TokenProjection(nn.Module):
    """One pre-norm transformer block over the cells, their mean, one Linear: (B, inputs, *S) -> (B, width).

    Args:
        attention: (B, C, *S) -> (B, N, C).
        inputs: channels of the maps; a 1x1 convolution makes them C = `tokens` where they differ.
        tokens: C, of the attention; the MLP has 2 C hidden units.
        width: of the output.
        dims: spatial dimensions, 2 | 3.
    """

    def __init__(self, attention: nn.Module, *, inputs: int, tokens: int, width: int, dims: int) -> None:
        super().__init__()
        self.reduce: nn.Module = nn.Identity()
        if inputs != tokens:
            self.reduce = convolution(inputs, tokens, kernel=1, stride=1, dims=dims)
        self.attention_norm, self.attention = nn.LayerNorm(tokens), attention
        self.mlp_norm = nn.LayerNorm(tokens)
        self.mlp = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.output = nn.Linear(tokens, width)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, width) of maps (B, inputs, *S), of more than one cell."""
        maps = self.reduce(maps)
        tokens = tokenized(maps)
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed.mT.reshape(maps.shape))
        tokens = tokens + self.mlp(self.mlp_norm(tokens))
        found: Tensor = self.output(pooled(tokens.mT))
        return found


class PooledMLP(nn.Module):
    """An MLP without norm on the mean over space, (B, C, *S) -> (B, widths[-1])."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.mlp = MLP(widths=widths, norm="none")

    def forward(self, maps: Tensor) -> Tensor:
        """(B, widths[-1]) of maps (B, widths[0], *S)."""
        found: Tensor = self.mlp(pooled(maps))
        return found


def head_of(kind: str, *, inputs: int, tokens: int, width: int, dims: int, heads: int) -> nn.Module:
    """The head (B, inputs, *S) -> (B, width) of a name, the `head` of the paper's Table 3.

    Args:
        kind: cstp | self_attention (keys and values of all cells) | mlp (pooled, one hidden layer, ReLU).
        inputs: channels of the encoder's map.
        tokens: channels of the tokens, hidden units of mlp.
        width: of the output.
        dims: spatial dimensions, 2 | 3.
        heads: of the attention; mlp has none.

    Raises:
        ConfigError: another kind, or heads that do not divide `tokens`.
    """
    one_of("method.head", kind, KINDS)
    if kind == "mlp":
        return PooledMLP([inputs, tokens, width])
    reduced = kind == "cstp"
    attention = CrossScaleAttention(tokens, heads=heads, dims=dims) if reduced else SelfAttention(tokens, heads=heads)
    return TokenProjection(attention, inputs=inputs, tokens=tokens, width=width, dims=dims)


def tokenized(maps: Tensor) -> Tensor:
    """The cells of maps as tokens, (B, C, *S) -> (B, N, C)."""
    return maps.flatten(2).mT


def _depthwise(channels: int, *, kernel: int, stride: int, dims: int) -> nn.Module:
    """A convolution of each channel by itself, ⌈side / stride⌉ cells per axis."""
    kind: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d if dims == 2 else nn.Conv3d
    return kind(channels, channels, kernel, stride=stride, padding=kernel // 2, groups=channels, bias=False)
