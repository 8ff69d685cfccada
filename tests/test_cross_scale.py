"""The heads of DCL-CsTP: attention against plain loops, what each head can see, numbers of parameters."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.errors import ConfigError
from medfl.models.cross_scale import KINDS, CrossScaleAttention, SelfAttention, head_of

DOUBLE = torch.float64
GRIDS = [(8, 8), (7, 7), (4, 4), (2, 2), (5, 8), (3, 3, 3), (2, 2, 2), (6, 5, 3), (2, 3, 4)]
CELLS = {"cstp": [(4, 5), (3, 4, 2)], "self_attention": [(4, 5), (3, 2, 2)]}
BY_GRID = [(kind, grid) for kind, grids in CELLS.items() for grid in grids]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def head(kind: str, *, inputs: int = 12, tokens: int = 8, width: int = 6, dims: int = 2, heads: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return head_of(kind, inputs=inputs, tokens=tokens, width=width, dims=dims, heads=heads)


def attention(kind: str, *, width: int = 4, dims: int = 2, heads: int = 1) -> SelfAttention:
    """In float64, with all parameters drawn: biases and norms do something."""
    made: SelfAttention = (
        CrossScaleAttention(width, heads=heads, dims=dims) if kind == "cstp" else SelfAttention(width, heads=heads)
    ).double()
    with torch.no_grad():
        for k, parameter in enumerate(made.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=k, dtype=DOUBLE))
    return made


def loop_depthwise(image: Tensor, weight: Tensor, stride: int) -> Tensor:
    """One image (C, *S): each cell of each channel is the sum over the window, cells outside are 0."""
    sides, kernel = image.shape[1:], weight.shape[-1]
    out = torch.zeros(len(image), *(-(-side // stride) for side in sides), dtype=image.dtype)
    for cell in product(*(range(side) for side in out.shape[1:])):
        for offset in product(range(kernel), repeat=len(sides)):
            at = tuple(stride * c + o - kernel // 2 for c, o in zip(cell, offset, strict=True))
            if all(0 <= a < side for a, side in zip(at, sides, strict=True)):
                out[:, *cell] += weight[:, 0, *offset] * image[:, *at]
    return out


def loop_norm(token: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean, variance = token.mean(), token.var(unbiased=False)
    return (token - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def tokens_of(image: Tensor) -> list[Tensor]:
    return [image[:, *cell] for cell in product(*(range(side) for side in image.shape[1:]))]


def loop_sources(block: SelfAttention, image: Tensor) -> list[Tensor]:
    """The cells of the fused map of two scales, or all cells where there is no reduction."""
    if not isinstance(block, CrossScaleAttention):
        return tokens_of(image)
    weights = {name: getattr(block, name).weight for name in ("fine", "coarse", "down", "refine")}
    fine = loop_depthwise(image, weights["fine"], 1)
    total = loop_depthwise(fine, weights["down"], 2) + loop_depthwise(image, weights["coarse"], 2)
    refined = total + loop_depthwise(total, weights["refine"], 1)
    return [block.fuse.weight @ token + block.fuse.bias for token in tokens_of(refined)]


def loop_attention(block: SelfAttention, image: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (N, C) and weights (heads, N, M) of one image (C, *S)."""
    sources = [loop_norm(token, block.source_norm) for token in loop_sources(block, image)]
    found, weights = [], []
    for token in tokens_of(image):
        query, read = block.query.weight @ loop_norm(token, block.query_norm), []
        for part in torch.arange(len(query)).chunk(block.heads):
            logits = [query[part] @ (block.key.weight @ source)[part] / math.sqrt(len(part)) for source in sources]
            shares = [math.exp(logit) / sum(math.exp(other) for other in logits) for logit in logits]
            values = [(block.value.weight @ source)[part] for source in sources]
            read.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            weights.append(shares)
        found.append(block.output.weight @ torch.cat(read) + block.output.bias)
    by_head = torch.tensor(weights, dtype=DOUBLE).view(len(found), block.heads, len(sources))
    return torch.stack(found), by_head.transpose(0, 1)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("kind", "grid"), BY_GRID)
def test_attention_is_the_one_of_plain_loops(kind: str, grid: tuple[int, ...], heads: int) -> None:
    block, maps = attention(kind, dims=len(grid), heads=heads), normal(2, 4, *grid, dtype=DOUBLE)
    with torch.no_grad():
        found, weights = block(maps), block.weights(maps)
        for k, image in enumerate(maps):
            tokens, shares = loop_attention(block, image)
            torch.testing.assert_close(found[k], tokens)
            torch.testing.assert_close(weights[k], shares)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_cell_shares_its_attention_among_half_the_cells_per_axis(grid: tuple[int, ...]) -> None:
    block, maps = attention("cstp", dims=len(grid), heads=2), normal(3, 4, *grid, dtype=DOUBLE)
    weights = block.weights(maps)
    cells, sources = math.prod(grid), math.prod(math.ceil(side / 2) for side in grid)
    assert weights.shape == (3, 2, cells, sources)
    assert sources < cells
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(3), torch.ones(3, 2, cells, dtype=DOUBLE))
    assert attention("self_attention", heads=2).weights(maps).shape == (3, 2, cells, cells)


@pytest.mark.parametrize("side", range(1, 10))
def test_both_scales_have_half_the_side_rounded_up(side: int) -> None:
    block = CrossScaleAttention(2, heads=1, dims=2)
    for layer, kernel in ((block.down, 3), (block.coarse, 5)):
        assert (layer.kernel_size[0], layer.stride[0], layer.padding[0]) == (kernel, 2, kernel // 2)
        assert (side + 2 * (kernel // 2) - kernel) // 2 + 1 == math.ceil(side / 2)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_take_odd_even_and_unequal_sides(kind: str, grid: tuple[int, ...]) -> None:
    made, maps = head(kind, dims=len(grid)), normal(3, 12, *grid)
    found = made(maps)
    assert found.shape == (3, 6)
    torch.testing.assert_close(made(maps[1:2]), found[1:2])  # an image's output is its own
    assert not list(made.buffers())


@pytest.mark.parametrize("grid", [(8, 8), (4, 4, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_only_cstp_sees_where_things_are(kind: str, grid: tuple[int, ...]) -> None:
    made, maps = head(kind, dims=len(grid)), normal(4, 12, *grid)
    order = torch.randperm(math.prod(grid), generator=seeded(1))
    with torch.no_grad():
        change = float((made(maps.flatten(2)[..., order].view(maps.shape)) - made(maps)).abs().amax())
    assert change > 1e-3 if kind == "cstp" else change < 1e-5


@pytest.mark.parametrize("grid", [(8, 8), (4, 5, 6)])
@pytest.mark.parametrize("kind", ["cstp", "self_attention"])
def test_one_cell_reaches_every_token(kind: str, grid: tuple[int, ...]) -> None:
    block, maps = attention(kind, dims=len(grid)), normal(1, 4, *grid, dtype=DOUBLE)
    corner = maps.clone()
    corner[0, 0, *(side - 1 for side in grid)] += 1
    with torch.no_grad():
        change = (block(corner) - block(maps)).abs().amax(2)
    assert float(change.min()) > 1e-9  # rounding is 1e-15


@pytest.mark.parametrize(("kind", "dims"), [*product(KINDS, (2, 3))])
def test_every_parameter_and_the_maps_have_a_gradient(kind: str, dims: int) -> None:
    made, maps = head(kind, dims=dims).double(), normal(2, 12, *[3] * dims, dtype=DOUBLE).requires_grad_()
    made(maps).square().sum().backward()
    for name, tensor in [("maps", maps), *made.named_parameters()]:
        assert tensor.grad is not None, name
        assert float(tensor.grad.abs().amax()) > 1e-9, name


def test_a_gradient_is_that_of_finite_differences_and_the_same_twice() -> None:
    block = attention("cstp", heads=2)
    maps = normal(1, 4, 3, 4, dtype=DOUBLE).requires_grad_()
    assert torch.autograd.gradcheck(block, (maps,))
    made, images = head("cstp"), normal(5, 12, 7, 8)
    gradients = [torch.autograd.grad(made(images).square().sum(), list(made.parameters())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_token_projection_is_attention_then_mlp_each_after_a_norm_and_added() -> None:
    made, maps = head("cstp").double(), normal(2, 12, 4, 3, dtype=DOUBLE)

    def normed(tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, [8])

    tokens = torch.einsum("oi,bihw->bhwo", made.reduce.weight[:, :, 0, 0], maps)  # (B, H, W, C)
    tokens = tokens + made.attention(normed(tokens).permute(0, 3, 1, 2)).view(tokens.shape)
    first, _, second = made.mlp
    hidden = F.gelu(normed(tokens) @ first.weight.T + first.bias)
    tokens = tokens + hidden @ second.weight.T + second.bias
    expected = tokens.mean((1, 2)) @ made.output.weight.T + made.output.bias
    torch.testing.assert_close(made(maps), expected)
    assert first.out_features == 16


def test_mlp_is_two_linears_on_the_mean_over_space() -> None:
    made, maps = head("mlp"), normal(3, 12, 4, 5)
    first, _, second = made.mlp
    hidden = (maps.mean((2, 3)) @ first.weight.T + first.bias).clamp_min(0)
    torch.testing.assert_close(made(maps), hidden @ second.weight.T + second.bias)


def test_maps_of_the_tokens_width_are_not_projected() -> None:
    assert isinstance(head("cstp", inputs=8).reduce, nn.Identity)


@pytest.mark.parametrize(
    ("inputs", "width", "dims", "millions"),
    [(2048, 2048, 2, 4.49), (2048, 128, 2, 3.51), (512, 512, 2, 2.66), (2048, 2048, 3, 4.57)],
)
def test_cstp_has_its_number_of_parameters(inputs: int, width: int, dims: int, millions: float) -> None:
    with torch.device("meta"):
        made = head("cstp", inputs=inputs, tokens=512, width=width, dims=dims, heads=1)
    assert sum(p.numel() for p in made.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("grid", [(1, 1), (1, 1, 1)])
def test_a_single_cell_has_nothing_to_attend_to(grid: tuple[int, ...]) -> None:
    maps = normal(2, 12, *grid)
    for kind in ("cstp", "self_attention"):
        with pytest.raises(ValueError, match=r"1\); over a single cell .* constant.*data\.size.*encoder\.stem"):
            head(kind, dims=len(grid))(maps)
    assert head("mlp", dims=len(grid))(maps).shape == (2, 6)


def test_unknown_heads_and_indivisible_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.head: got 'transformer', need one of cstp, mlp, self_attention"):
        head("transformer")
    for kind, heads in product(("cstp", "self_attention"), (3, 0, -2)):
        with pytest.raises(ConfigError, match=rf"method\.heads: got {heads}, need a divisor of the 8 channels"):
            head(kind, heads=heads)
