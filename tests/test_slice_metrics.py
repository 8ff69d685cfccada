"""FSIM, VIFP and IFCP against their authors' code, written out as loops over scales and orientations."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.signal import convolve2d
from torch import Tensor
from torch.nn import functional as F

from medfl.evaluation.slice_metrics import fsim, ifcp, vifp
from tests.test_fusion_metrics import blurred, noisy, textures

Floats = NDArray[np.float64]


def frequencies(side: int) -> Floats:
    if side % 2:
        return np.arange(-(side - 1) / 2, (side - 1) / 2 + 1) / (side - 1)
    return np.arange(-side / 2, side / 2) / side


def congruency(image: Floats) -> Floats:
    """Kovesi's phasecong2, as Zhang et al. call it."""
    rows, columns = image.shape
    x, y = np.meshgrid(frequencies(columns), frequencies(rows))
    plain = np.sqrt(x**2 + y**2)
    low_pass = np.fft.ifftshift(1 / (1 + (plain / 0.45) ** 30))
    radius, theta = np.fft.ifftshift(plain), np.fft.ifftshift(np.arctan2(-y, x))
    radius[0, 0] = 1
    energies, amplitudes = np.zeros_like(image), np.zeros_like(image)
    for o in range(4):
        angle = o * np.pi / 4
        ds = np.sin(theta) * np.cos(angle) - np.cos(theta) * np.sin(angle)
        dc = np.cos(theta) * np.cos(angle) + np.sin(theta) * np.sin(angle)
        spread = np.exp(-(np.abs(np.arctan2(ds, dc)) ** 2) / (2 * (np.pi / 4 / 1.2) ** 2))
        filters, responses, inverse = [], [], []
        for s in range(4):
            centre = 1 / (6 * 2**s)
            gabor = np.exp(-(np.log(radius / centre) ** 2) / (2 * np.log(0.55) ** 2)) * low_pass
            gabor[0, 0] = 0
            filters.append(gabor * spread)
            responses.append(np.fft.ifft2(np.fft.fft2(image) * filters[-1]))
            inverse.append(np.fft.ifft2(filters[-1]).real * np.sqrt(rows * columns))
        even, odd = sum(r.real for r in responses), sum(r.imag for r in responses)
        size = np.sqrt(even**2 + odd**2) + 1e-4
        energy = np.zeros_like(image)
        for r in responses:
            energy += (r.real * even + r.imag * odd) / size - np.abs(r.real * odd - r.imag * even) / size
        power = -np.median(np.abs(responses[0]) ** 2) / np.log(0.5) / np.sum(filters[0] ** 2)
        squares = sum(np.sum(f**2) for f in inverse)
        products = sum(np.sum(inverse[i] * inverse[j]) for i in range(4) for j in range(i + 1, 4))
        tau = np.sqrt((2 * power * squares + 4 * power * products) / 2)
        noise = tau * np.sqrt(np.pi / 2) + 2 * np.sqrt((2 - np.pi / 2) * tau**2)
        energies += np.maximum(energy - noise / 1.7, 0)
        amplitudes += sum(np.abs(r) for r in responses)
    share: Floats = energies / amplitudes
    return share


def gradient(image: Floats) -> Floats:
    kernel = np.array([[3, 0, -3], [10, 0, -10], [3, 0, -3]]) / 16
    slope: Floats = np.hypot(convolve2d(image, kernel, "same"), convolve2d(image, kernel.T, "same"))
    return slope


def authors_fsim(first: Tensor, second: Tensor) -> float:
    a, b = (255 * image.double().numpy() for image in (first, second))
    pc_a, pc_b, g_a, g_b = congruency(a), congruency(b), gradient(a), gradient(b)
    like_pc = (2 * pc_a * pc_b + 0.85) / (pc_a**2 + pc_b**2 + 0.85)
    like_g = (2 * g_a * g_b + 160) / (g_a**2 + g_b**2 + 160)
    weight = np.maximum(pc_a, pc_b)
    return float((like_pc * like_g * weight).sum() / weight.sum())


@pytest.mark.parametrize("size", [(64, 64), (51, 64), (63, 45)])
def test_fsim_is_the_authors_code(size: tuple[int, int]) -> None:
    x = textures(2, *size, coarse=6)
    for changed in (noisy(x, 0.05), x.flip(0), x**2, blurred(x[:, None])[:, 0]):
        values = fsim(changed, x)
        for row in range(2):
            assert values[row] == pytest.approx(authors_fsim(changed[row], x[row]), abs=1e-4)
        torch.testing.assert_close(fsim(x, changed), values, rtol=0, atol=1e-6)


def test_fsim_reduces_large_images() -> None:
    x = textures(1, 512, 520, coarse=30)
    small = F.avg_pool2d(x, 2)
    assert fsim(noisy(x, 0.1), x).item() == pytest.approx(fsim(F.avg_pool2d(noisy(x, 0.1), 2), small).item(), abs=1e-5)


def windows(image: Floats, size: int) -> Floats:
    offsets = np.arange(size) - size // 2
    kernel = np.exp(-np.add.outer(offsets**2, offsets**2) / (2 * (size / 5) ** 2))
    filtered: Floats = convolve2d(image, kernel / kernel.sum(), "valid")
    return filtered


def authors_channels(distorted: Floats, reference: Floats) -> list[tuple[Floats, Floats, Floats]]:
    """g, σ_v² and σ_x² at each scale of vifp_mscale, guard by guard."""
    found = []
    for scale in range(1, 5):
        size = 2 ** (5 - scale) + 1
        if scale > 1:
            reference, distorted = windows(reference, size)[::2, ::2], windows(distorted, size)[::2, ::2]
        mu1, mu2 = windows(reference, size), windows(distorted, size)
        s1 = np.maximum(windows(reference**2, size) - mu1**2, 0)
        s2 = np.maximum(windows(distorted**2, size) - mu2**2, 0)
        s12 = windows(reference * distorted, size) - mu1 * mu2
        g = s12 / (s1 + 1e-10)
        sv = s2 - g * s12
        g[s1 < 1e-10] = 0
        sv[s1 < 1e-10] = s2[s1 < 1e-10]
        s1[s1 < 1e-10] = 0
        g[s2 < 1e-10] = 0
        sv[s2 < 1e-10] = 0
        sv[g < 0] = s2[g < 0]
        g[g < 0] = 0
        sv[sv <= 1e-10] = 1e-10
        found.append((g, sv, s1))
    return found


@pytest.mark.parametrize("size", [(41, 41), (60, 47)])
def test_vifp_and_ifcp_are_the_authors_model(size: tuple[int, int]) -> None:
    x = textures(2, *size, coarse=6)
    for changed in (noisy(x, 0.05), x.flip(0), 1 - x, blurred(x[:, None])[:, 0]):
        vif, ifc = vifp(changed, x), ifcp(changed, x)
        for row in range(2):
            a, b = (255 * image[row].double().numpy() for image in (changed, x))
            scales = authors_channels(a, b)
            kept = sum(np.log10(1 + g**2 * s / (v + 2)).sum() for g, v, s in scales)
            whole = sum(np.log10(1 + s / 2).sum() for _, _, s in scales)
            assert vif[row] == pytest.approx(kept / whole, abs=1e-6)
            bits = sum(0.5 * np.log2(1 + g**2 * s / np.maximum(v, 1 / 12)).sum() for g, v, s in scales)
            assert ifc[row] == pytest.approx(bits / scales[0][0].size, abs=1e-6)


def test_slice_metrics_fall_with_noise_and_know_their_limits() -> None:
    x = textures(1, 64, 64, coarse=8)
    for metric in (fsim, vifp, ifcp):
        values = [metric(noisy(x, spread), x).item() for spread in (0.0, 0.02, 0.1, 0.3)]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1] + 0.1
    assert vifp((1.5 * (x - 0.3) + 0.3), x).item() > 1  # more contrast
    assert math.isnan(vifp(x, torch.zeros_like(x)).item())
    for metric in (vifp, ifcp):
        assert math.isnan(metric(x[:, :40], x[:, :40]).item())
