"""Encoders and heads: sizes of the papers, one code for 2D and 3D, and what each switch does."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from medfl import config
from medfl.errors import ConfigError
from medfl.models.encoders import Residual, ResNet, SqueezeExcite
from medfl.models.heads import MLP
from medfl.models.layers import groups


def encoder(**changes: Any) -> ResNet:
    """A thin ResNet-10 for 16^2 images, one channel, unless changed."""
    arguments: dict[str, Any] = {
        "blocks": [1, 1, 1, 1], "bottleneck": False, "base_width": 8, "se_ratio": 16, "norm": "batch", "stem": "auto",
        "zero_init_residual": False, "spatial_dims": 2, "in_channels": 1, "image_size": 16,
    }  # fmt: skip
    return ResNet(**(arguments | changes))


@pytest.mark.parametrize(
    ("blocks", "bottleneck", "millions", "excitation"),
    [([1] * 4, False, 14.36, 0.045), ([2] * 4, False, 33.16, 0.090), ([3, 4, 6, 3], True, 46.16, 2.53)],
)
def test_3d_encoders_have_the_published_number_of_parameters(
    blocks: list[int], bottleneck: bool, millions: float, excitation: float
) -> None:
    def count(se_ratio: int | None) -> float:
        with torch.device("meta"):
            shape = {"blocks": blocks, "bottleneck": bottleneck, "base_width": 64, "spatial_dims": 3, "image_size": 28}
            return sum(p.numel() for p in encoder(se_ratio=se_ratio, **shape).parameters()) / 1e6

    assert count(None) == pytest.approx(millions, abs=0.005)
    assert count(16) - count(None) == pytest.approx(excitation, rel=0.005)


@pytest.mark.parametrize(
    ("side", "stem", "sides"),
    [
        (28, "auto", (14, 7, 4, 2)),
        (64, "auto", (16, 8, 4, 2)),
        (48, "auto", (12, 6, 3, 2)),
        (47, "auto", (24, 12, 6, 3)),
        (23, "auto", (23, 12, 6, 3)),
        (9, "auto", (9, 5, 3, 2)),
        (28, "medmnist", (28, 14, 7, 4)),
        (28, "imagenet", (7, 4, 2, 1)),
    ],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_maps_have_the_sides_of_the_stem_rule(side: int, stem: str, sides: tuple[int, ...], dims: int) -> None:
    with torch.device("meta"):
        made = encoder(base_width=64, stem=stem, spatial_dims=dims, image_size=side)
        maps = made.maps(torch.empty(2, 1, *[side] * dims))
    expected = zip((64, 128, 256, 512), sides, strict=True)
    assert [tuple(m.shape) for m in maps] == [(2, width, *[s] * dims) for width, s in expected]
    assert made.map_sides == sides
    assert made.stage_widths == (64, 128, 256, 512)
    assert made.width == 512


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_3d_encoder_with_flat_kernels_is_the_2d_encoder(bottleneck: bool) -> None:
    flat, deep = (encoder(bottleneck=bottleneck, base_width=4, spatial_dims=d).eval() for d in (2, 3))
    state = {}
    for name, tensor in flat.state_dict().items():
        if tensor.dim() == 4:  # a kernel: put it in the middle slice
            kernel = torch.zeros(*tensor.shape[:2], tensor.shape[-1], *tensor.shape[2:])
            kernel[:, :, tensor.shape[-1] // 2] = tensor
            tensor = kernel
        state[name] = tensor
    deep.load_state_dict(state)
    image = torch.randn(2, 1, 16, 16)
    volume = image[:, :, None].expand(2, 1, 16, 16, 16)
    torch.testing.assert_close(deep(volume), flat(image))


def test_a_closed_gate_stops_the_residual_path_of_its_channel_only() -> None:
    block = Residual(8, 8, stride=1, bottleneck=False, se_ratio=16, norm="batch", dims=2).eval()
    maps = torch.randn(2, 8, 5, 5)
    before = block(maps)
    assert isinstance(block.excite, SqueezeExcite)
    with torch.no_grad():
        block.excite.expand.bias[3] = float("-inf")
    after = block(maps)
    torch.testing.assert_close(after[:, 3], maps[:, 3].relu())
    others = [k for k in range(8) if k != 3]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=0)
    assert not torch.allclose(before[:, 3], after[:, 3])


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_norms_other_than_batch_keep_samples_apart(norm: str) -> None:
    made, images = encoder(norm=norm).train(), torch.randn(4, 1, 16, 16)
    torch.testing.assert_close(made(images)[:2], made(images[:2]))
    assert not any("running" in name for name in made.state_dict())


@given(st.integers(1, 2048))
def test_groups_divide_the_channels(channels: int) -> None:
    assert channels % groups(channels) == 0
    assert 1 <= groups(channels) <= 32


def test_zero_init_residual_starts_every_block_as_its_shortcut() -> None:
    made = encoder(zero_init_residual=True, se_ratio=None)
    maps = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(made.layer1(maps), maps.relu())


def test_equal_seeds_give_equal_encoders() -> None:
    def seeded(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return encoder().state_dict()

    torch.testing.assert_close(seeded(1), seeded(1), rtol=0, atol=0)
    assert not torch.equal(seeded(1)["stem.0.weight"], seeded(2)["stem.0.weight"])


def test_the_description_builds_the_encoder_again() -> None:
    made = encoder(norm="group", image_size=28).eval()
    again = config.build(made.describe()).eval()
    again.load_state_dict(made.state_dict())
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(again(images), made(images), rtol=0, atol=0)
    assert made.describe()["stem"] == "small"  # resolved: the weights fit whatever the rule says later


def test_pooling_under_autocast_keeps_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder()(torch.randn(2, 1, 16, 16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": "big"}, "encoder.stem: got 'big', need one of auto, imagenet"),
        ({"norm": "layer"}, "encoder.norm: got 'layer', need one of batch, group, instance"),
        ({"spatial_dims": 1}, "encoder.spatial_dims: got 1, need one of 2, 3"),
        ({"blocks": [1, 1, 0, 1]}, "encoder.blocks: got .* need four counts"),
        ({"norm": "instance", "image_size": 8}, "encoder.norm=instance: layer4 has one voxel"),
    ],
)
def test_impossible_encoders_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(**changes)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 16, 16, 16)])
def test_images_of_another_kind_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need \(B, 1, H, W\)"):
        encoder()(torch.zeros(shape))


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm), ("none", None)])
def test_mlp_has_the_layers_it_is_asked_for(norm: str, kind: type[nn.Module] | None) -> None:
    head = MLP(widths=[6, 5, 3], norm=norm)
    expected = [nn.Linear, *([kind] if kind else []), nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head] == expected
    assert (head[0].bias is None) == (kind is not None)  # a norm's shift does the same
    assert head(torch.randn(4, 6)).shape == (4, 3)


def test_impossible_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"widths of a head: got \[4\]"):
        MLP(widths=[4], norm="batch")
    with pytest.raises(ConfigError, match="norm of a head: got 'group'"):
        MLP(widths=[4, 2], norm="group")
