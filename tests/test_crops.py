"""Crops: where they lie, what they keep, and that each depends on its key, its place and its image alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl import config
from medfl.data.sample import UNLABELLED, present
from medfl.errors import ConfigError
from medfl.views.crops import Crops

GRIDS = [(20, 17), (14, 12, 10)]


def crops(**changes: Any) -> Crops:
    arguments = {"channels": 4, "size": 8, "depth": None, "foreground": 0.0, "dropout": 0.0, "flip": 0.0}
    return Crops(**(arguments | changes))


def scans(grid: tuple[int, ...], count: int = 6, channels: int = 4) -> torch.Tensor:
    return torch.rand(count, channels, *grid, generator=torch.Generator().manual_seed(0)) + 0.1


def numbered(grid: tuple[int, ...], count: int = 6, channels: int = 4) -> torch.Tensor:
    """Every voxel holds its number in its image, from 1."""
    voxels = torch.arange(1.0, torch.Size(grid).numel() + 1).view(grid)
    return voxels.expand(count, channels, *grid).clone()


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 24), depth=st.integers(1, 14) | st.none(), grid=st.sampled_from(GRIDS), key=st.integers(0))
def test_a_crop_is_a_part_of_its_image(size: int, depth: int | None, grid: tuple[int, ...], key: int) -> None:
    images = numbered(grid)
    (crop,) = crops(size=size, depth=depth)(images, key=key % 2**63)
    wanted = (size, size, depth or size)[: len(grid)]
    assert crop.shape == (6, 4, *[min(pair) for pair in zip(wanted, grid, strict=True)])
    for part in crop:
        corner = torch.unravel_index(part[0].flatten()[0].long() - 1, grid)
        window = tuple(slice(int(a), int(a) + n) for a, n in zip(corner, crop.shape[2:], strict=True))
        assert torch.equal(part, images[(0, slice(None), *window)])


@pytest.mark.parametrize("grid", GRIDS)
def test_an_image_depends_on_its_key_its_place_and_itself_alone(grid: tuple[int, ...]) -> None:
    images = scans(grid)
    before = images.clone()
    make = crops(dropout=0.5, flip=0.5)
    first, second = make(images, key=3, count=2)
    assert torch.equal(images, before)
    assert not torch.equal(first, second)
    assert torch.equal(make(images, key=3, count=2)[1], second)
    others = torch.cat([images[:3], scans(grid, 2) + 1])
    for crop, same in zip((first, second), make(others, key=3, count=2), strict=True):
        assert torch.equal(crop[:3], same[:3])
    assert not torch.equal(make(images, key=4, count=2)[0], first)


@pytest.mark.parametrize("grid", GRIDS)
def test_further_channels_are_cut_alike_and_never_dropped(grid: tuple[int, ...]) -> None:
    images = numbered(grid, count=40, channels=6)
    crop = crops(dropout=1.0, flip=0.5)(images, key=1)[0]
    assert torch.equal(crop[:, 4], crop[:, 5])
    assert bool((crop[:, 4:] > 0).all())
    kept = present(crop[:, :4])
    for part, which in zip(crop, kept, strict=True):
        assert torch.equal(part[:4][which], part[4].expand(int(which.sum()), *part[4].shape))


@pytest.mark.parametrize("grid", GRIDS)
def test_foreground_crops_hold_a_lesion_voxel_where_one_is_known(grid: tuple[int, ...]) -> None:
    images = torch.cat([scans(grid, 30), torch.zeros(30, 1, *grid)], dim=1)
    corner = (-1, *[0] * (len(grid) - 1))
    images[:10, 4, *corner] = 2
    images[10:20, 4] = UNLABELLED
    crop = crops(foreground=1.0, size=4)(images, key=0)[0]
    assert bool((crop[:10, 4] == 2).flatten(1).any(1).all())
    starts = {tuple(part[0].flatten()[:2].tolist()) for part in crop[10:]}
    assert len(starts) > 10  # elsewhere the place is free
    free = crops(foreground=0.0, size=4)(images, key=0)[0]
    assert float((free[:10, 4] == 2).flatten(1).any(1).float().mean()) < 0.6


def test_other_crops_are_centred_on_a_voxel_of_the_brain_and_an_empty_image_is_cut_too() -> None:
    images = torch.zeros(200, 4, 32, 32)
    images[:199, 2, 10:12, 20:22] = 0.5
    crop = crops(size=5)(images, key=0)[0]
    assert bool((crop[:199, 2, 2, 2] == 0.5).all())
    assert len({tuple(part.nonzero()[0].tolist()) for part in crop[:199]}) == 4  # each of the four voxels
    assert torch.equal(crop[199], torch.zeros(4, 5, 5))


def test_dropout_leaves_out_its_share_and_keeps_two() -> None:
    images = scans((8, 8), 4000)
    share = 1 - present(crops(dropout=0.2)(images, key=0)[0]).float().mean(0)
    # each by itself, up to the draws that would leave one or none
    fewer = 0.2**4 * 2 / 4 + 4 * 0.2**3 * 0.8 * 1 / 4
    torch.testing.assert_close(share, torch.full((4,), 0.2 - fewer), atol=0.02, rtol=0)
    assert torch.equal(present(crops(dropout=1.0)(images, key=0)[0]).sum(1), torch.full((4000,), 2))
    images[:, 1:] = 0
    images[:2000, 3] = 1
    had = present(images)
    assert torch.equal(present(crops(dropout=1.0)(images, key=0)[0]), had)


def test_flip_mirrors_the_first_axis() -> None:
    images = numbered((8, 8), 400)
    mirrored = crops(flip=1.0)(images, key=0)[0]
    assert torch.equal(mirrored, images.flip(2))
    some = crops(flip=0.5)(images, key=0)[0]
    share = float((some == images).flatten(1).all(1).float().mean())
    assert 0.4 < share < 0.6


def test_the_config_follows_the_data() -> None:
    built = config.build(config.compose(["data=brain", "views=crops", "data.spatial_dims=3", "data.depth=16"]).views)
    assert (built.channels, built.size, built.depth, built.keeps_masks) == (4, 64, 16, True)
    assert config.build(config.compose(["data=phantom", "views=crops"]).views).depth is None


def test_settings_and_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"views\.size: got 0, need an integer of at least 1"):
        crops(size=0)
    with pytest.raises(ConfigError, match=r"views\.dropout: got 1\.5, need a chance from 0 to 1"):
        crops(dropout=1.5)
    with pytest.raises(ValueError, match="got 3 channels, need the 4 modalities or more"):
        crops()(scans((8, 8), channels=3), key=0)
    with pytest.raises(ValueError, match="need at least 1 view"):
        crops()(scans((8, 8)), key=0, count=0)
