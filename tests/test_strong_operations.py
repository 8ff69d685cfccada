"""The operations of the strong views: each against its definition, and the photons against Poisson's law."""

import colorsys
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy import ndimage, stats
from torch import Tensor

from medfl import config
from medfl.views import operations, strong_kernel
from medfl.views.poisson import poisson
from medfl.views.tone import Numbers, Operation, Tone

TONE = yaml.safe_load((Path(__file__).parents[1] / "configs/views/eight.yaml").read_text())["tone"]
SHAPES = [(4, 1, 16, 16), (3, 3, 9, 14), (3, 1, 8, 8, 8), (2, 3, 7, 5, 11)]


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def salts(rows: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, 2), generator=torch.Generator().manual_seed(1)).int()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", [*set(Operation) - {Operation.AUTO_CONTRAST, Operation.EQUALIZE}])
def test_operations_of_no_strength_change_nothing(shape, operation):
    """Many photons are no noise; a histogram and percentiles have no strength."""
    one = (1.0, 1.0)
    jitter = {"brightness": one, "contrast": one, "saturation": one, "hue": (0.0, 0.0), "gamma": one}
    tone = Tone(jitter=jitter, percentiles=(0, 1), sharpness=one, sigma=one, brightness=one, photons=(1e6, 1e6))
    u, table = unit(*shape), tone.draw(iter(torch.rand(tone.columns(), shape[0])))
    atol = 0.006 if operation is Operation.PHOTONS else 2e-6
    torch.testing.assert_close(tone.changed(u, operation, table, salts(len(u))), u, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_operation_takes_its_own_numbers(shape):
    tone, u = config.build(TONE), unit(*shape)
    table = tone.draw(iter(unit(tone.columns(), shape[0], seed=2)))
    n = Numbers(*table.unbind(1))
    jittered = operations.contrasted(operations.brightened(u, n.jitter_brightness), n.jitter_contrast)
    if len(shape) == 5:
        jittered = operations.curved(jittered, n.jitter_gamma)
    elif shape[1] == 3:
        jittered = operations.recoloured(jittered, n.jitter_saturation, n.jitter_hue)
    expected = {
        Operation.JITTER: jittered,
        Operation.AUTO_CONTRAST: operations.stretched(u, 0.01, 0.99),
        Operation.EQUALIZE: operations.equalized(u),
        Operation.SHARPNESS: operations.sharpened(u, n.sharpness, n.sigma, radius=5),
        Operation.BRIGHTNESS: operations.brightened(u, n.brightness),
    }
    for operation, result in expected.items():
        torch.testing.assert_close(tone.changed(u, operation, table, salts(len(u))), result)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", Operation)
def test_the_kernel_does_what_the_reference_does(shape, operation):
    tone, u = config.build(TONE), unit(24, *shape[1:]) ** 2
    u[..., :2], u[0] = 0, 0.25  # background; one constant image
    table = tone.draw(iter(unit(tone.columns(), len(u), seed=2)))
    expected = tone.changed(u, operation, table, salts(len(u))).clamp(0, 1)
    strong_kernel.change(u, torch.full((len(u), 1), int(operation)), table, salts(len(u)), tone)
    far = ((u + 1) / 2 - expected).abs() > 2e-6
    assert far.float().mean() < 1e-4  # a rounding can decide a photon


@pytest.mark.parametrize("shape", SHAPES)
def test_equalising_is_the_textbooks_monotone_and_flat(shape):
    u = unit(*shape) ** 3
    u[u < 0.01] = 0  # background
    found = operations.equalized(u)
    for image, result in zip(u.flatten(0, 1).numpy(), found.flatten(0, 1).numpy(), strict=True):
        bins = np.minimum((image * 256).astype(int), 255)
        body = bins[bins > bins.min()]
        expected = np.searchsorted(np.sort(body), bins.ravel(), side="right") / len(body)
        np.testing.assert_allclose(result.ravel(), expected, atol=1e-6)
        assert np.all(np.diff(result.ravel()[np.argsort(image.ravel())]) >= 0)
    body = found[found > 0]
    assert stats.kstest(body.numpy(), "uniform").statistic < 0.06  # one dark bin holds up to 3 % of the voxels


def test_auto_contrast_takes_its_percentiles_to_black_and_white():
    u = 0.3 + 0.2 * unit(3, 2, 40, 50) * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1, 1)
    found = operations.stretched(u, 0.01, 0.99)
    for image, result in zip(u.flatten(0, 1).numpy(), found.flatten(0, 1).numpy(), strict=True):
        low, high = np.quantile(image, [0.01, 0.99], method="nearest")
        np.testing.assert_allclose(result, np.clip((image - low) / (high - low), 0, 1), atol=1e-5)
        assert abs((result == 0).mean() - 0.01) < 0.002
        assert abs((result == 1).mean() - 0.01) < 0.002


def test_sharpness_is_a_blend_with_the_smoothed_image():
    factor, sigma = torch.tensor([0.1, 1.3, 1.9]), torch.tensor([0.5, 1.0, 1.5])
    plane, volume = 0.3 + 0.2 * unit(3, 2, 9, 12), 0.3 + 0.2 * unit(3, 1, 12, 9, 10)
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = F.conv2d(F.pad(plane, (1, 1, 1, 1), mode="replicate").flatten(0, 1)[:, None], kernel[None, None])
    smooth = smooth.view_as(plane)
    expected = smooth + factor.view(3, 1, 1, 1) * (plane - smooth)
    found = operations.sharpened(plane, factor, sigma, radius=5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    found = operations.sharpened(volume, factor, sigma, radius=5)
    for row in range(3):
        image = volume[row, 0].double().numpy()
        soft = ndimage.gaussian_filter(image, float(sigma[row]), mode="nearest", radius=5)
        np.testing.assert_allclose(found[row, 0], soft + float(factor[row]) * (image - soft), atol=1e-5)


def test_brightness_contrast_and_gamma_are_their_formulas():
    u, factor = unit(3, 2, 8, 8), torch.tensor([0.6, 1.0, 1.4])
    column = factor.view(3, 1, 1, 1)
    torch.testing.assert_close(operations.brightened(u, factor), (u * column).clamp(0, 1))
    mean = u.mean((2, 3), keepdim=True)
    torch.testing.assert_close(operations.contrasted(u, factor), (mean + column * (u - mean)).clamp(0, 1))
    torch.testing.assert_close(operations.curved(u, factor), u**column)


def test_saturation_and_hue_turn_colours_and_leave_grey():
    u = unit(4, 3, 6, 5)
    u[0] = u[0, :1]  # grey
    u[1, :, :3] = u[1, :, :3].round()  # pure colours
    saturation, hue = torch.tensor([0.6, 1.0, 1.4, 0.8]), torch.tensor([0.3, -0.1, 0.1, 0.5])
    found = operations.recoloured(u, saturation, hue)
    grey = (u * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    mixed = (grey + saturation.view(4, 1, 1, 1) * (u - grey)).clamp(0, 1)
    for row, y, x in itertools.product(range(4), range(6), range(5)):
        h, s, v = colorsys.rgb_to_hsv(*mixed[row, :, y, x].tolist())
        expected = torch.tensor(colorsys.hsv_to_rgb((h + float(hue[row])) % 1, s, v))
        torch.testing.assert_close(found[row, :, y, x], expected, atol=2e-4 if s < 1e-3 else 1e-5, rtol=0)
    torch.testing.assert_close(found[0], u[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rate", [0.02, 0.7, 3.999, 4.0, 6.3, 15.0, 60.0, 200.0])
def test_the_photons_follow_poissons_law(rate):
    count = 1 << 18
    found = poisson(torch.full((4, 1, count // 64, 16), rate), salts(4)).flatten().double()
    assert torch.equal(found, found.round())
    grid = np.arange(int(found.max()) + 2)
    share = np.searchsorted(found.sort().values.numpy(), grid, side="right") / count
    assert np.abs(share - stats.poisson.cdf(grid, rate)).max() < 2 / count**0.5 + 4e-4
    assert abs(found.mean() - rate) < 5 * (rate / count) ** 0.5 + 2e-4 * rate
    noise = ((2 * rate**2 + rate) / count) ** 0.5  # standard error of the variance
    assert abs(found.var() - rate) < 5 * noise + 6e-4 * rate
    rows = found.view(4, -1) - rate
    lags = torch.stack([(rows * rows.roll(lag, 1)).mean() / rate for lag in (1, 16, 784)])
    assert lags.abs().max() < 0.012
    assert torch.corrcoef(rows).triu(1).abs().max() < 0.02


def test_photon_noise_has_the_specified_moments():
    tone = config.build(TONE | {"photons": [50, 50]})
    u, table = torch.full((8, 1, 128, 128), 0.3), tone.draw(iter(torch.rand(tone.columns(), 8)))
    y = tone.changed(u, Operation.PHOTONS, table, salts(8))
    assert abs(y.mean() - 0.3) < 0.001  # standard error 0.0002
    assert abs(y.var() - 0.006) < 0.0001
    black = tone.changed(torch.zeros_like(u), Operation.PHOTONS, table, salts(8))
    assert torch.count_nonzero(black) == 0
