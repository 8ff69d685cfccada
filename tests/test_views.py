"""Views: the kernel against the torch reference, known transforms, and what each operation may do."""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from medfl import config
from medfl.config import build
from medfl.data.sample import UNLABELLED
from medfl.errors import ConfigError
from medfl.views import compose, nearest
from medfl.views.chance import Chance
from medfl.views.compose import Views
from medfl.views.intensity import noise, quantiles
from medfl.views.paired import Paired
from medfl.views.spatial import resample, rotations

DEFAULT = yaml.safe_load((Path(__file__).parents[1] / "configs/views/default.yaml").read_text())
SHAPES = [(3, 2, 9, 14), (5, 1, 7, 5, 11), (2, 3, 6, 17, 4), (2, 1, 2, 2), (70, 1, 8, 8, 8)]
ALWAYS = {
    "spatial.rotation": {"probability": 1.0, "low": -40.0, "high": 40.0},
    "spatial.translation": {"probability": 0.5, "low": -0.2, "high": 0.2},
    "intensity.blur": {"probability": 0.5, "low": 0.3, "high": 1.2},
}
OFF = {"spatial.flip": 0.0} | {
    f"{part}.{name}": {"probability": 0.0, "low": 1.0, "high": 1.0}
    for part, names in {
        "spatial": ("rotation", "crop", "translation"),
        "intensity": ("blur", "gamma", "scale", "shift", "noise"),
    }.items()
    for name in names
}


def make(changes: dict[str, Any] | None = None, *, backend: str = "auto") -> Views:
    """The default recipe with some of its keys ("part.name") replaced."""
    node = deepcopy(DEFAULT)
    for name, value in (changes or {}).items():
        part, key = name.split(".")
        node[part][key] = value
    views = build(node | {"backend": backend})
    assert isinstance(views, Views)
    return views


def only(name: str, value: Any, *, backend: str = "kernel") -> Views:
    return make(OFF | {name: value}, backend=backend)


def constant(value: float) -> dict[str, float]:
    return {"probability": 1.0, "low": value, "high": value}


def images(*shape: int, seed: int = 0) -> Tensor:
    """Smooth images with values in [-1, 1], some of them beyond."""
    coarse = torch.randn(*shape[:2], *[4] * (len(shape) - 2), generator=torch.Generator().manual_seed(seed))
    mode = "bilinear" if len(shape) == 4 else "trilinear"
    return F.interpolate(coarse, shape[2:], mode=mode, align_corners=True) / 2


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_computes_the_reference(shape, padding):
    changes = ALWAYS | {"spatial.padding": padding}
    x = images(*shape)
    for key in range(3):
        fast = make(changes, backend="kernel")(x, key=key)
        slow = make(changes, backend="torch")(x, key=key)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_views_is_made_and_all_differ(count):
    x = images(3, 2, 9, 14)
    views = make(ALWAYS, backend="kernel")(x, key=4, count=count)
    assert [view.shape for view in views] == [x.shape] * count
    for i, first in enumerate(views):
        assert not any(torch.allclose(first, other, atol=1e-2) for other in views[i + 1 :])
    for fast, slow in zip(views, make(ALWAYS, backend="torch")(x, key=4, count=count), strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    if count == 2:
        assert all(map(torch.equal, views, make(ALWAYS, backend="kernel")(x, key=4)))
    longer = make(ALWAYS, backend="kernel")(torch.cat([x, x]), key=4, count=count)
    assert all(torch.equal(some, more[:3]) for some, more in zip(views, longer, strict=True))


@pytest.mark.parametrize("backend", ["kernel", "torch"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_with_every_operation_off_a_view_is_the_image(shape, backend):
    x = images(*shape)
    for view in make(OFF, backend=backend)(x, key=1):
        assert view.shape == x.shape
        torch.testing.assert_close(view, x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["kernel", "torch"])
def test_a_right_angle_and_a_shift_move_whole_voxels(backend):
    square, cube = images(2, 1, 6, 6), images(2, 1, 6, 6, 6)
    turned = only("spatial.rotation", constant(90.0), backend=backend)(square, key=0)[0]
    torch.testing.assert_close(turned, square.rot90(-1, (2, 3)), atol=1e-5, rtol=0)
    moved = only("spatial.translation", constant(1 / 6), backend=backend)(cube, key=0)[1]  # every axis by one voxel
    torch.testing.assert_close(moved[..., :5, :5, :5], cube[..., 1:, 1:, 1:], atol=1e-5, rtol=0)
    mirrored = only("spatial.flip", 1.0, backend=backend)(cube, key=0)[0]
    torch.testing.assert_close(mirrored, cube.flip(2, 3, 4), atol=1e-5, rtol=0)


def test_a_rotation_turns_voxels_and_shears_nothing_on_a_grid_with_unequal_sides():
    turn = rotations(torch.tensor([[0.3, -0.8, 1.1], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(turn @ turn.mT, torch.eye(3).expand(2, 3, 3))
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(2))
    maps = torch.cat([rotations(torch.tensor([[torch.pi / 2]])), torch.zeros(1, 2, 1)], dim=2)
    x = images(1, 1, 4, 8)
    inner = resample(x, maps, padding="zeros")[..., 2:6]  # the turned 4 x 4 middle still fits
    torch.testing.assert_close(inner, x[..., 2:6].rot90(-1, (2, 3)), atol=1e-5, rtol=0)


def test_the_crop_stays_inside_the_image():
    ramp = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 20)] * 2, indexing="ij"))[None]  # values = coordinates
    views = only("spatial.crop", {"probability": 1.0, "low": 0.6, "high": 1.0})(ramp.repeat(200, 1, 1, 1), key=4)[0]
    height = views[:, 0, -1, 0] - views[:, 0, 0, 0]
    width = views[:, 1, 0, -1] - views[:, 1, 0, 0]
    torch.testing.assert_close(height, width, atol=0.02, rtol=0)  # up to half a voxel at the border
    assert 0.55 < height.min() < 0.63
    assert 0.97 < height.max() <= 1
    assert views[:, 0, 0, 0].min() < 0.02
    assert views[:, 0, -1, 0].max() > 0.98


def test_equal_keys_give_equal_views_and_all_else_differs():
    x, views = images(4, 1, 8, 9, 10), make()
    first, again, other = views(x, key=7), views(x, key=7), views(x, key=8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(first, other, strict=True))
    assert not torch.allclose(first[0], first[1], atol=1e-2)
    same = views(x[:1].repeat(2, 1, 1, 1, 1), key=7)[0]
    assert not torch.allclose(same[0], same[1], atol=1e-2)


@pytest.mark.parametrize("backend", ["kernel", "torch"])
def test_a_view_depends_on_its_place_and_image_alone(backend):
    x, views = images(6, 2, 8, 9), make(ALWAYS, backend=backend)
    whole, part = views(x, key=5), views(torch.cat([x[:2], torch.zeros(1, 2, 8, 9)]), key=5)
    for all_views, some in zip(whole, part, strict=True):
        torch.testing.assert_close(some[:2], all_views[:2], atol=1e-6, rtol=0)


def test_the_number_of_threads_and_of_callers_changes_nothing():
    x, views, threads = images(12, 1, 24, 24, 24), make(ALWAYS, backend="kernel"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = views(x, key=2)
        torch.set_num_threads(3)
        with ThreadPoolExecutor(3) as sites:
            for together in sites.map(lambda _: views(x, key=2), range(3)):
                assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(OFF))
def test_switching_one_operation_off_leaves_the_draw_of_all_others(name):
    size, part = torch.Size([8, 8, 8]), name.split(".")[0]
    on, off = make(ALWAYS).draw(50, size, key=3), make(ALWAYS | {name: OFF[name]}).draw(50, size, key=3)
    assert torch.equal(on.salts, off.salts)
    assert torch.equal(on.maps, off.maps) == (part == "intensity")
    columns = ("gamma", "scale", "shift", "noise")
    for column, operation in enumerate(columns):
        assert torch.equal(on.tone[:, column], off.tone[:, column]) == (name != f"intensity.{operation}")


def test_the_draw_follows_the_config():
    draw = make({"spatial.flip": 0.0, "intensity.gamma": {"probability": 0.5, "low": 0.7, "high": 1.5}}).draw(
        4000, torch.Size([10, 10]), key=1
    )
    gamma, scale, shift, sd = draw.tone.unbind(1)
    assert scale.min() >= 0.6
    assert scale.max() <= 1.4
    assert abs(scale.mean() - 1) < 0.02  # standard error 0.0026
    assert abs(shift.std() - 0.3 / 3**0.5) < 0.01
    assert abs((gamma == 1).float().mean() - 0.5) < 0.03
    assert torch.all(sd == 0.05)
    side = torch.linalg.det(draw.maps[:, :, :2]).sqrt()
    assert abs(side.mean() - 0.8) < 0.01
    angle = torch.rad2deg(torch.atan2(draw.maps[:, 1, 0], draw.maps[:, 0, 0]))
    assert 14 < angle.abs().max() <= 15.001
    assert abs((angle == 0).float().mean() - 0.5) < 0.03


def test_noise_is_normal_white_and_of_its_row():
    salts = torch.randint(-(2**31), 2**31, (4, 2), generator=torch.Generator().manual_seed(0)).int()
    values = noise(salts, 1 << 16)
    torch.testing.assert_close(values.mean(1), torch.zeros(4), atol=0.02, rtol=0)  # standard error 0.004
    torch.testing.assert_close(values.var(1), torch.ones(4), atol=0.03, rtol=0)
    assert abs((values.abs() > 1.96).float().mean() - 0.05) < 0.004
    lags = torch.stack([(values * values.roll(lag, 1)).mean() for lag in (1, 2, 16, 28, 784)])
    assert lags.abs().max() < 0.02
    assert torch.corrcoef(values).triu(1).abs().max() < 0.02
    assert abs(quantiles(torch.device("cpu")).double().var(correction=0) - 1) < 1e-6


@pytest.mark.parametrize("backend", ["kernel", "torch"])
@pytest.mark.parametrize("gamma", [0.3, 1.5, 4.0])
def test_gamma_keeps_the_range_the_order_and_what_lies_outside(gamma, backend):
    x = torch.linspace(-1.5, 1.5, 3 * 4096).view(3, 1, 64, 64)
    view = only("intensity.gamma", constant(gamma), backend=backend)(x, key=0)[0]
    inside = x.abs() < 1
    torch.testing.assert_close(view[~inside], x[~inside], atol=1e-6, rtol=0)
    torch.testing.assert_close(view[inside], 2 * ((x[inside] + 1) / 2) ** gamma - 1, atol=2e-6, rtol=0)
    assert view[inside].abs().max() <= 1
    assert view.flatten().diff().min() >= -1e-6


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 1e6])
def test_constant_images_stay_finite_and_constant(value):
    x = torch.full((3, 1, 5, 6, 7), value)
    quiet = make(ALWAYS | {"intensity.noise": OFF["intensity.noise"]}, backend="kernel")
    assert all(torch.isfinite(view).all() for view in make(ALWAYS)(x, key=3))
    for view in quiet(x, key=3):
        spread = view.amax((1, 2, 3, 4)) - view.amin((1, 2, 3, 4))
        assert spread.max() <= 1e-5 * max(1.0, abs(value))


def test_a_voxel_that_is_no_number_stays_one():
    x = images(1, 1, 8, 8)
    x[0, 0, 4, 4] = torch.nan
    for backend in ("kernel", "torch"):
        assert only("intensity.gamma", constant(1.5), backend=backend)(x, key=0)[0][0, 0, 4, 4].isnan()


def test_what_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="need float32"):
        make()(torch.zeros(2, 1, 8, 8, dtype=torch.float64), key=0)
    with pytest.raises(ValueError, match="at least 2 voxels"):
        make()(torch.zeros(2, 1, 1, 8, 8), key=0)
    with pytest.raises(ValueError, match="got count=0, need at least 1"):
        make()(torch.zeros(2, 1, 8, 8), key=0, count=0)
    with pytest.raises(ConfigError, match=r"views\.backend: got 'fast'"):
        make(backend="fast")
    with pytest.raises(ConfigError, match="padding: got 'mirror'"):
        make({"spatial.padding": "mirror"})
    with pytest.raises(ConfigError, match="probability 2"):
        Chance(probability=2, low=0, high=1)
    with pytest.raises(ConfigError, match="crop got the bounds"):
        make({"spatial.crop": constant(0.0)})
    with pytest.raises(ConfigError, match="need finite low <= high"):
        Chance(probability=1, low=2, high=1)


def test_without_numba_auto_warns_once_and_kernel_is_refused(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "medfl.views.kernel", raising=False)
    monkeypatch.delattr("medfl.views.kernel", raising=False)
    cached = (compose.why_no_kernel, compose.warn_without_kernel)
    for function in cached:
        function.cache_clear()
    try:
        x = images(2, 1, 8, 8)
        with pytest.raises(ConfigError, match="needs numba"):
            make(backend="kernel")
        with caplog.at_level(logging.WARNING):
            first, _ = make()(x, key=0), make()(x, key=1)
        assert caplog.text.count("CPU kernel is missing") == 1
        assert all(torch.equal(a, b) for a, b in zip(first, make(backend="torch")(x, key=0), strict=True))
    finally:
        for function in cached:
            function.cache_clear()


@pytest.mark.parametrize("name", ["default", "strong"])
def test_every_config_makes_two_views(name):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(__file__).parents[1] / "configs/views"), version_base="1.3"):
        node = OmegaConf.to_container(hydra_compose(name), resolve=True)
    assert len(build(node)(images(2, 1, 8, 8, 8), key=0)) == 2


# with masks


def paired(changes: dict[str, Any], *, channels: int = 1, backend: str = "auto") -> tuple[Paired, Views]:
    """Paired views, and the plain ones of the same recipe."""
    plain = make(changes, backend=backend)
    arguments = {"spatial": plain.spatial, "intensity": plain.intensity, "backend": backend}
    return Paired(channels=channels, **arguments), plain


def marked(*shape: int) -> Tensor:
    """Smooth images in [-1, 1] and labels of them as a last channel; those of the last image are not known."""
    x = images(*shape)
    labels = (x[:, :1] > -0.2).float() + (x[:, :1] > 0.3)
    labels[-1] = UNLABELLED
    return torch.cat([x, labels], dim=1)


@pytest.mark.parametrize("backend", ["kernel", "torch"])
@pytest.mark.parametrize("shape", [(6, 1, 40, 33), (4, 3, 40, 33), (4, 1, 24, 20, 26)])
def test_masks_move_with_their_images_which_are_those_of_the_plain_views(shape, backend):
    x, channels = marked(*shape), shape[1]
    moving = ALWAYS | {"spatial.flip": 0.5} | {name: OFF[name] for name in OFF if name.startswith("intensity")}
    both, plain = paired(moving, channels=channels, backend=backend)
    views, alone = both(x, key=3, count=2), plain(x[:, :channels], key=3, count=2)
    for view, expected in zip(views, alone, strict=True):
        assert torch.equal(view[:, :channels], expected)
        labels, image = view[:-1, channels], view[:-1, 0]
        assert set(labels.unique().tolist()) <= {0, 1, 2}
        assert bool((view[-1, channels] == UNLABELLED).all())
        assert not torch.equal(labels, x[:-1, channels])
        drawn = (image > -0.2).float() + (image > 0.3)
        assert (labels == drawn).float().mean() > 0.95  # up to half a voxel at the borders
        assert (labels - drawn).mean().abs() < 0.01
    full, plain = paired(ALWAYS, channels=channels, backend=backend)
    for view, expected, other in zip(full(x, key=3), plain(x[:, :channels], key=3), views, strict=True):
        assert torch.equal(view[:, :channels], expected)
        assert torch.equal(view[:, channels], other[:, channels])  # whatever is done to the grey values
    assert all(map(torch.equal, full(x[:, :channels], key=3), plain(x[:, :channels], key=3)))


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("shape", [(4, 2, 40, 33), (4, 1, 24, 20, 26), (3, 1, 1, 9, 12)])
def test_the_kernel_of_masks_takes_the_voxels_of_grid_sample(shape, padding):
    labels = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0)).float()
    dims = len(shape) - 2
    turn = torch.eye(dims) + 0.3 * torch.randn(8, dims, dims, generator=torch.Generator().manual_seed(1))
    shift = 3 * torch.randn(8, dims, 1, generator=torch.Generator().manual_seed(2))
    maps = torch.cat([turn, shift], dim=2)
    repeated = labels.repeat(3, *[1] * (dims + 1))[:8]
    expected = resample(repeated, maps, padding=padding, mode="nearest")
    for begin in range(shape[1]):
        found = torch.full_like(repeated, -1)
        nearest.fill(found, labels, maps, begin=begin, padding=padding)
        assert (
            float((found[:, begin:] != expected[:, begin:]).float().mean()) < 1e-3
        )  # places midway between two voxels
        assert (found[:, :begin] == -1).all()


@pytest.mark.parametrize("shape", [(3, 1, 9, 14), (2, 1, 7, 5, 11)])
def test_flips_move_masks_voxel_by_voxel_and_each_image_for_itself(shape):
    x = marked(*shape)
    flipped = paired(OFF | {"spatial.flip": 1.0})[0](x, key=0, count=1)[0]
    torch.testing.assert_close(flipped, x.flip(*range(2, x.ndim)), rtol=0, atol=2e-6)
    views = paired(ALWAYS)[0]
    alone = views(torch.cat([x[:1], torch.zeros_like(x[:1])]), key=5)
    for whole, part in zip(views(x, key=5), alone, strict=True):
        torch.testing.assert_close(part[0], whole[0], atol=1e-6, rtol=0)


def test_the_paired_recipe_follows_the_data():
    for words in (["data=phantom", "data.channels=3"], ["data=phantom", "data.spatial_dims=3"]):
        study = config.compose([*words, "views=paired"])
        views = build(study.views)
        assert (views.keeps_masks, views.channels) == (True, study.data["channels"])
    with pytest.raises(ValueError, match="got 1 channels, need the 3 of an image or more"):
        paired({}, channels=3)[0](torch.zeros(2, 1, 8, 8), key=0)
    with pytest.raises(ConfigError, match=r"views\.channels: got 0"):
        paired({}, channels=0)
