import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medfl.evaluation.fusion_metrics import FUSION, SLICES, nmi, on_slices, over_sources, psnr, rsfe, sfr, ssim
from medfl.models import similarity

Floats = NDArray[np.float64]
PAIRS = {"ssim": 1.0, "psnr": 100.0, "nmi": 2.0, "fsim": 1.0, "vifp": 1.0}  # name -> value for equal images
ALL = {**PAIRS, "sfr": 1.0, "rsfe": 0.0}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def textures(count: int, *size: int, seed: int = 0, coarse: int = 3) -> Tensor:
    """Smooth random textures (count, *size) in [0, 1] on an ellipsoid of a brain; 0 around it."""
    grids = torch.rand(count, 1, *[side // coarse + 1 for side in size], generator=rng(seed))
    mode = "bilinear" if len(size) == 2 else "trilinear"
    values = 0.1 + 0.9 * F.interpolate(grids, size, mode=mode, align_corners=True)[:, 0]
    axes = torch.meshgrid(*[torch.linspace(-1.1, 1.1, side) for side in size], indexing="ij")
    return values * (sum(axis**2 for axis in axes) < 1)


def noisy(images: Tensor, spread: float, seed: int = 9) -> Tensor:
    return (images + spread * torch.randn(images.shape, generator=rng(seed))).clamp(0, 1)


def blurred(images: Tensor) -> Tensor:
    """(B, C, *S) averaged over 3 voxels along each axis."""
    pool = F.avg_pool2d if images.ndim == 4 else F.avg_pool3d
    return pool(images, 3, 1, 1, count_include_pad=False)


# whole images


def test_psnr_of_known_errors() -> None:
    x = 0.5 * torch.rand(3, 1, 6, 7, 8, generator=rng())
    torch.testing.assert_close(psnr(x + 0.1, x), torch.full((3,), 20.0, dtype=torch.float64), rtol=0, atol=1e-4)
    half = x.clone()
    half[..., :4] += 0.2  # half of the voxels
    assert psnr(half, x)[0] == pytest.approx(-10 * math.log10(0.02), abs=1e-4)
    assert psnr(x, x).tolist() == [100.0] * 3


def test_ssim_is_the_losses_own_for_each_source() -> None:
    x = textures(3, 20, 18, 16)[:, None]
    values = ssim(x[:1], x)
    assert values[0] == pytest.approx(1, abs=1e-6)
    for row in range(3):
        assert values[row] == pytest.approx(float(similarity.ssim(x[:1], x[row : row + 1], span=1.0)), abs=1e-6)


def counted_nmi(first: Tensor, second: Tensor) -> float:
    def bins(image: Tensor) -> list[int]:
        return [min(int(value * 256), 255) for value in image.flatten().tolist()]

    def entropy(items: list[Any]) -> float:
        return -sum(n / len(items) * math.log2(n / len(items)) for n in Counter(items).values())

    a, b = bins(first), bins(second)
    return (entropy(a) + entropy(b)) / entropy(list(zip(a, b, strict=True)))


def test_nmi_is_that_of_counted_pairs() -> None:
    x = textures(2, 12, 11, 10)[:, None]
    values = nmi(noisy(x, 0.02), x)
    for row in range(2):
        assert values[row] == pytest.approx(counted_nmi(noisy(x, 0.02)[row], x[row]), abs=1e-9)


def test_nmi_ends_at_two_and_one() -> None:
    x, y = torch.rand(2, 1, 1, 80, 80, 80, generator=rng())
    assert nmi(x, x).item() == pytest.approx(2)
    assert nmi(1 - x, x).item() == pytest.approx(2, abs=1e-3)  # another contrast of the same image
    assert nmi(x, y).item() == pytest.approx(1, abs=0.01)
    assert nmi(torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).tolist() == [2.0]


def spatial_frequency(image: Floats) -> float:
    """From its definition, pair by pair of neighbours."""
    power = 0.0
    for axis in range(image.ndim):
        squares = []
        for place in np.ndindex(*image.shape):
            other = list(place)
            other[axis] += 1
            if other[axis] < image.shape[axis]:
                squares.append((image[tuple(other)] - image[place]) ** 2)
        power += sum(squares) / len(squares)
    return math.sqrt(power)


def frequency_error(fused: Floats, sources: list[Floats]) -> float:
    """rSFe, voxel by voxel over all directions, of which each has an opposite: they are counted once."""
    power = {"fused": 0.0, "ideal": 0.0}
    for step in itertools.product((-1, 0, 1), repeat=fused.ndim):
        if step <= (0,) * fused.ndim:
            continue
        own, ideal = [], []
        for place in np.ndindex(*fused.shape):
            other = tuple(p + s for p, s in zip(place, step, strict=True))
            if all(0 <= o < side for o, side in zip(other, fused.shape, strict=True)):
                own.append(abs(fused[other] - fused[place]))
                ideal.append(max(abs(source[other] - source[place]) for source in sources))
        for name, values in (("fused", own), ("ideal", ideal)):
            power[name] += sum(v**2 for v in values) / len(values) / math.sqrt(sum(s * s for s in step))
    return math.sqrt(power["fused"] / power["ideal"]) - 1


@pytest.mark.parametrize("size", [(9, 8), (6, 5, 7)])
def test_frequency_ratios_are_those_of_loops(size: tuple[int, ...]) -> None:
    x = torch.rand(2, 3, *size, generator=rng())
    fused = x.mean(1, keepdim=True)
    for row in range(2):
        one, each = fused[row, 0].double().numpy(), [s.double().numpy() for s in x[row]]
        ratio = spatial_frequency(one) / np.mean([spatial_frequency(source) for source in each])
        assert sfr(fused, x)[row] == pytest.approx(ratio, rel=1e-6)
        assert rsfe(fused, x)[row] == pytest.approx(frequency_error(one, each), abs=1e-6)


@pytest.mark.parametrize("size", [(40, 40), (20, 20, 20)])
def test_frequency_ratios_tell_lost_from_added_detail(size: tuple[int, ...]) -> None:
    x = textures(1, *size)[None]
    dull = blurred(x)
    sharp = x + (x - dull)
    assert sfr(dull, x) < 1 < sfr(sharp, x)
    assert rsfe(dull, x) < 0 < rsfe(sharp, x)
    assert sfr(torch.zeros_like(x), x).item() == 0
    assert rsfe(torch.zeros_like(x), x).item() == -1
    assert math.isnan(sfr(x, torch.ones_like(x)).item())
    assert math.isnan(rsfe(x, torch.ones_like(x)).item())


# all of them


@pytest.mark.parametrize("size", [(48, 44), (44, 42, 14)])
def test_equal_images_have_the_best_value(size: tuple[int, ...]) -> None:
    x = textures(1, *size)[None]
    found = {name: metric(x, x).item() for name, metric in FUSION.items()}
    assert {name: found[name] for name in ALL} == pytest.approx(ALL, abs=1e-5)
    worse = {name: metric(noisy(x, 0.2), x).item() for name, metric in FUSION.items()}
    assert all(worse[name] < found[name] - 0.01 for name in (*PAIRS, "ifcp"))


@pytest.mark.parametrize("name", sorted(FUSION))
@pytest.mark.parametrize("size", [(44, 42), (42, 41, 13)])
def test_an_absent_modality_changes_nothing(name: str, size: tuple[int, ...]) -> None:
    metric = FUSION[name]
    x = textures(6, *size).view(2, 3, *size)
    fused = x.mean(1, keepdim=True)
    with_hole = torch.stack([x[0] * torch.tensor([1, 0, 1]).view(3, *[1] * len(size)), x[1]])
    values = metric(fused, with_hole)
    assert values.shape == (2,)
    assert bool(torch.isfinite(values).all())
    torch.testing.assert_close(values[:1], metric(fused[:1], x[:1, [0, 2]]))
    torch.testing.assert_close(values[1:], metric(fused[1:], x[1:]))
    if name not in ("sfr", "rsfe"):
        each = [metric(fused[1:], x[1:, m : m + 1]).item() for m in range(3)]
        assert values[1] == pytest.approx(np.mean(each), abs=1e-6)
        assert math.isnan(metric(fused[:1], torch.zeros_like(x[:1])).item())


def test_a_metric_of_slices_is_the_mean_over_those_in_the_middle() -> None:
    x = torch.rand(1, 1, 5, 6, 20, generator=rng())
    x[..., 7] = 0  # nothing there: left out
    seen: list[Tensor] = []

    def brightness(one: Tensor, two: Tensor) -> Tensor:
        assert torch.equal(one, two)
        seen.append(two)
        return two.mean((1, 2))

    value = on_slices(brightness)(x, x)
    assert torch.equal(torch.stack(seen, -1)[:, None], x[..., 4:16])
    assert len(seen) == SLICES
    assert value.item() == pytest.approx(x[..., [4, 5, 6, *range(8, 16)]].mean().item(), abs=1e-6)
    assert on_slices(brightness)(x[..., :3], x[..., :3]).item() == pytest.approx(x[..., :3].mean().item(), abs=1e-6)
    assert over_sources(on_slices(brightness))(x[..., 0], x[..., 0]).item() == pytest.approx(x[..., 0].mean().item())
