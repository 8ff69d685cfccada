"""The decoder: logits of the images' size for every stem and side, gradients everywhere, the encoder's own maps."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from medfl.models.decoder import Decoder, pyramid
from medfl.models.encoders import STEMS, ResNet
from medfl.models.layers import pooled


def encoder(**changes: Any) -> ResNet:
    """A thin ResNet-10, one channel, unless changed."""
    arguments: dict[str, Any] = {
        "blocks": [1, 1, 1, 1], "bottleneck": False, "base_width": 4, "se_ratio": None, "norm": "batch", "stem": "auto",
        "zero_init_residual": False, "spatial_dims": 2, "in_channels": 1, "image_size": 33,
    }  # fmt: skip
    return ResNet(**(arguments | changes))


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("stem", sorted(STEMS))
@pytest.mark.parametrize("size", [(47, 34), (48, 48), (33, 35, 38)])
def test_logits_have_the_size_of_the_images_and_every_weight_a_gradient(
    size: tuple[int, ...], stem: str, norm: str
) -> None:
    torch.manual_seed(0)
    net = encoder(stem=stem, norm=norm, spatial_dims=len(size), in_channels=2)
    decoder = Decoder(net, labels=3)
    images = torch.randn(2, 2, *size)
    logits = decoder(pyramid(net, images))
    assert logits.shape == (2, 3, *size)
    (logits * torch.randn_like(logits)).mean().backward()
    for name, parameter in [*net.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.abs().sum() > 0), name
    kinds = {type(module).__name__ for module in decoder.modules() if "Norm" in type(module).__name__}
    assert kinds == {{"batch": f"BatchNorm{len(size)}d", "group": "GroupNorm", "instance": "InstanceNorm"}[norm]}


@pytest.mark.parametrize("stem", sorted(STEMS))
@pytest.mark.parametrize("bottleneck", [False, True])
def test_the_pyramid_ends_with_the_encoders_maps_and_begins_at_the_full_side(stem: str, bottleneck: bool) -> None:
    net = encoder(stem=stem, bottleneck=bottleneck).eval()
    images = torch.randn(2, 1, 37, 45)
    maps = pyramid(net, images)
    assert maps[0].shape[2:] == images.shape[2:]
    assert all(map(torch.equal, maps[-4:], net.maps(images)))
    torch.testing.assert_close(pooled(maps[-1]), net(images))
    sides = [part.shape[2] for part in maps]
    assert all(-(-one // 2) == two for one, two in pairwise(sides))  # each halves the one before


def test_the_background_is_likely_at_the_start_and_the_size_is_as_told() -> None:
    net = encoder(spatial_dims=3)
    start = Decoder(net, labels=4)(pyramid(net, torch.randn(2, 1, 33, 33, 33))).softmax(1).mean((0, 2, 3, 4))
    assert start[0] > 0.8
    with torch.device("meta"):
        paper = encoder(blocks=[3, 4, 6, 3], bottleneck=True, base_width=64, in_channels=3, image_size=256)
        decoder = Decoder(paper, labels=2)
    assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(5.3, abs=0.05)
    assert [up[1].convolution.out_channels for up in decoder.up] == [16, 32, 64, 128, 256]
