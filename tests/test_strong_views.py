"""The eight strong augmentations: what is drawn, what a view depends on, and what it may become."""

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from medfl import config
from medfl.errors import ConfigError
from medfl.views.crop import ResizedCrop
from medfl.views.spatial import resample
from medfl.views.strong import EightViews, parts
from medfl.views.tone import Numbers, Operation

EIGHT = yaml.safe_load((Path(__file__).parents[1] / "configs/views/eight.yaml").read_text())
SHAPES = [(4, 1, 16, 16), (3, 3, 9, 14), (3, 1, 8, 8, 8), (2, 3, 7, 5, 11)]
CPU = torch.device("cpu")
WHOLE = {"spatial.area": [1.0, 1.0], "spatial.side": [1.0, 1.0]}


def make(changes: dict[str, Any] | None = None) -> EightViews:
    """The recipe of the config with some of its keys ("part.name") replaced."""
    node = deepcopy(EIGHT)
    for name, value in (changes or {}).items():
        *path, key = name.split(".")
        owner = node
        for part in path:
            owner = owner[part]
        owner[key] = value
    views = config.build(node)
    assert isinstance(views, EightViews)
    return views


def images(*shape: int, seed: int = 0) -> Tensor:
    """Smooth images around [-1, 1], some values beyond."""
    coarse = torch.randn(*shape[:2], *[4] * (len(shape) - 2), generator=torch.Generator().manual_seed(seed))
    mode = "bilinear" if len(shape) == 4 else "trilinear"
    return F.interpolate(coarse, shape[2:], mode=mode, align_corners=True) * 0.7


@pytest.mark.parametrize("shape", SHAPES)
def test_views_are_a_pure_function_of_image_place_and_key(shape):
    x, views = images(*shape), make()
    kept = x.clone()
    first, again, other = (views(x, key=key, count=3) for key in (7, 7, 8))
    assert torch.equal(x, kept)
    assert all(map(torch.equal, first, again))
    for one, two in [*zip(first, other, strict=True), *itertools.combinations(first, 2)]:
        assert one.shape == x.shape
        assert not torch.allclose(one, two, atol=1e-2)
    assert all(view.min() >= -1 and view.max() <= 1 for view in first)
    same = views(x[:1].expand_as(x), key=7)[0]
    assert not torch.allclose(same[0], same[1], atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_neither_the_batch_nor_the_backend_changes_an_image(shape):
    x = images(*shape)
    whole = make()(x, key=5, count=3)
    alone = make()(x[:1], key=5, count=3)
    slow = make({"backend": "torch"})(x, key=5, count=3)
    for all_views, one, reference in zip(whole, alone, slow, strict=True):
        # Rounding moves a few voxels over the edge of a histogram bin or of a photon count.
        assert ((one - all_views[:1]).abs() < 1e-5).float().mean() > 0.995
        assert ((reference - all_views).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.parametrize("size", [(12, 20), (8, 10, 12)])
def test_the_draw_follows_the_config(size):
    draw = make().draw(4000, torch.Size(size), key=1, count=3)
    picked = draw.chosen >= 0
    number = picked.sum(1)
    shares = torch.stack([(number == k).float().mean() for k in range(5)])
    torch.testing.assert_close(shares, torch.tensor([0, 0, 1, 1, 1]) / 3, atol=0.02, rtol=0)  # standard error 0.004
    for operation in Operation:
        times = (draw.chosen == operation).sum(1)
        assert times.max() == 1
        assert abs(times.float().mean() - 3 / 7) < 0.02
        assert abs((draw.chosen[:, 0] == operation).float().mean() - 1 / 7) < 0.02
    drawn = Numbers(*draw.table.unbind(1))
    assert 20 <= drawn.photons.min() < 21 < 190 < drawn.photons.max() <= 200.001
    assert abs(drawn.photons.log().mean() - np.log(20 * 200) / 2) < 0.02
    assert abs(drawn.jitter_hue.mean()) < 0.002
    assert 0.1 <= drawn.sharpness.min() < 0.11 < 1.89 < drawn.sharpness.max() <= 1.9
    assert 0.5 <= drawn.sigma.min() < 0.51 < 1.49 < drawn.sigma.max() <= 1.5


@pytest.mark.parametrize("size", [(12, 20), (8, 10, 12)])
def test_a_crop_keeps_its_law_and_stays_inside_the_image(size):
    draw = make().draw(4000, torch.Size(size), key=2)
    linear, shift = draw.maps[:, :, :-1], draw.maps[:, :, -1]
    share = linear.norm(dim=2)  # rows of diag(share) @ rotation
    turn = linear / share[:, :, None]
    torch.testing.assert_close(turn @ turn.mT, torch.eye(len(size)).expand_as(turn), atol=1e-5, rtol=0)
    assert torch.all(shift.abs() <= (1 - share) * torch.tensor(size) / 2 + 1e-4)
    turned = (turn - torch.eye(len(size))).abs().amax((1, 2)) > 1e-6
    assert torch.equal(turned, (draw.chosen == Operation.ROTATE).any(1))
    if len(size) == 2:
        degrees = torch.rad2deg(torch.atan2(turn[:, 1, 0], turn[:, 0, 0]))
        assert 29.5 < degrees.abs().max() <= 30.001
        area, ratio = share.prod(1), share[:, 1] / share[:, 0]
        assert 0.3 <= area.min() < 0.31 < 0.99 < area.max() <= 1
        assert abs(area.mean() - 0.65) < 0.01
        assert 0.7499 <= ratio.min() < 0.76 < 1.32 < ratio.max() <= 1.3334
        assert abs(ratio.log().mean()) < 0.01
        wide = make({"spatial.ratio": [1.0, 1.3]}).draw(50, torch.Size(size), key=2).maps[:, :, :2].norm(dim=2)
        assert torch.all(wide[:, 1] > wide[:, 0] - 1e-6)
    else:
        assert torch.all((share.amin(0) < 0.51) & (share.amin(0) >= 0.4999))
        assert torch.corrcoef(share.T).triu(1).abs().max() < 0.05


def test_only_chosen_rows_are_turned_and_a_crop_shows_its_part():
    bounds = {"area": [1, 1], "ratio": [0.75, 1.3333], "side": [0.5, 0.5], "padding": "border"}
    place = ResizedCrop(**bounds, rotation_2d=[90, 90], rotation_3d=[0, 0])
    columns = iter(torch.rand(5, 2))
    x = images(2, 1, 6, 6)
    seen = resample(x, place.draw(columns, (6, 6), torch.tensor([True, False])), padding="border")
    torch.testing.assert_close(seen, torch.stack([x[0].rot90(-1, (1, 2)), x[1]]), atol=1e-5, rtol=0)
    cube = images(1, 1, 8, 8, 8)
    corner = iter(torch.zeros(9, 1))  # each uniform number 0: the first place along every axis
    seen = resample(cube, place.draw(corner, (8, 8, 8), torch.tensor([True])), padding="border")
    expected = F.interpolate(cube[..., :4, :4, :4], (8, 8, 8), mode="trilinear")
    torch.testing.assert_close(seen[..., :7, :7, :7], expected[..., :7, :7, :7], atol=1e-5, rtol=0)


def test_every_row_gets_its_operations_in_its_order_with_the_photons_last():
    chosen = make().draw(40, torch.Size((8, 8)), key=3, count=3).chosen
    steps: list[list[int]] = [[] for _ in chosen]
    for operation, rows in parts(chosen, CPU):
        for row in rows.tolist():
            steps[row].append(operation)
    for drawn, found in zip(chosen.tolist(), steps, strict=True):
        tones = [operation for operation in drawn if operation not in (-1, Operation.ROTATE, Operation.PHOTONS)]
        assert found == tones + [Operation.PHOTONS] * (Operation.PHOTONS in drawn)
    assert parts(torch.full((4, 2), -1), CPU) == []


def test_without_operations_and_crop_a_view_is_the_clipped_image():
    for shape in SHAPES:
        x = images(*shape)
        for view in make(WHOLE | {"chosen": [0, 0]})(x, key=1):
            torch.testing.assert_close(view, x.clamp(-1, 1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("value", [-1.0, 0.1, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(6, 1, 8, 8), (6, 3, 8, 8), (6, 1, 5, 6, 7)])
def test_constant_images_stay_finite_and_without_noise_constant(shape, value):
    x = torch.full(shape, value)
    for view in make({"chosen": [7, 7]})(x, key=3):
        assert torch.isfinite(view).all()
    for view in make({"chosen": [7, 7], "tone.photons": [1e6, 1e6]})(x, key=3):
        spread = view.flatten(2).amax(2) - view.flatten(2).amin(2)
        assert spread.max() < 0.03


def test_what_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="need float32"):
        make()(torch.zeros(2, 1, 8, 8, dtype=torch.float64), key=0)
    with pytest.raises(ValueError, match="got count=0"):
        make()(torch.zeros(2, 1, 8, 8), key=0, count=0)
    refused = {
        "chosen": ([2, 8], "need 0 <= fewest <= most <= 7"),
        "backend": ("fast", r"views\.backend: got 'fast'"),
        "spatial.padding": ("mirror", "padding: got 'mirror'"),
        "spatial.area": ([0.0, 1.0], "area got the bounds"),
        "spatial.ratio": ([1.2, 1.3], "need bounds around 1"),
        "tone.photons": ([200.0, 20.0], "photons got the bounds"),
        "tone.brightness": ([1.0], "need two finite numbers"),
        "tone.jitter": ({"hue": [0, 0]}, "jitter has brightness, contrast, gamma, saturation too many or too few"),
    }
    for name, (value, message) in refused.items():
        with pytest.raises(ConfigError, match=message):
            make({name: value})


@pytest.mark.parametrize("dims", [2, 3])
def test_the_config_composes_and_builds(dims):
    study = config.compose(["views=eight", "data=phantom", f"data.spatial_dims={dims}"])
    views = config.build(study.views)
    assert len(views(images(2, 1, *[8] * dims), key=0, count=3)) == 3
