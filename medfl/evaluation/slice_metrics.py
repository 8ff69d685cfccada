"""How much of a grey image another one keeps, in 2D: FSIM, VIFP, and IFC in the pixel domain.

Images are (B, H, W) in [0, 1], B = 1 goes with any B; the constants of all three are for grey values of 0 to 255.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = 255.0
SCALES, ORIENTATIONS = 4, 4
SHORTEST_WAVE = 6  # pixels; doubled from scale to scale
RADIAL_SPREAD, ANGULAR_SPREAD = 0.55, math.pi / ORIENTATIONS / 1.2
LOW_PASS, LOW_PASS_ORDER = 0.45, 30  # cycles per pixel; Butterworth
NOISE_FACTOR = (math.sqrt(math.pi / 2) + 2 * math.sqrt(2 - math.pi / 2)) / 1.7  # Rayleigh mean + 2 deviations
LIKE_PHASE, LIKE_GRADIENT = 0.85, 160.0  # FSIM's T1 and T2
SIDE = 256  # pixels of the shorter side, to which FSIM scales larger images down
EYE_NOISE = 2.0  # variance of VIF's visual noise
ROUNDING = 1 / 12  # variance of rounding to whole grey values
WINDOWS = (17, 9, 5, 3)  # pixels, of VIFP
LEAST_SIDE = 41  # pixels that the coarsest window of VIFP needs
EPS = 1e-10


def fsim(first: Tensor, second: Tensor) -> Tensor:
    """Feature similarity (B,) (Zhang et al. 2011, eq. 5), symmetric, 1 for equal images; NaN without any feature.

    Σ S_PC S_G PC_m / Σ PC_m over pixels, PC_m the larger phase congruency of the two. Of the authors' code are the
    log-Gabor filters, the noise threshold and the reduction of images by whole factors of the shorter side / 256.
    """
    phase_one, gradient_one = _features(first)
    phase_two, gradient_two = _features(second)
    like = _alike(phase_one, phase_two, LIKE_PHASE) * _alike(gradient_one, gradient_two, LIKE_GRADIENT)
    weight = torch.maximum(phase_one, phase_two)
    return (like * weight).double().sum((-2, -1)) / weight.double().sum((-2, -1))


def vifp(image: Tensor, source: Tensor) -> Tensor:
    """Visual information fidelity in the pixel domain (B,): the share of the source's information that is in `image`.

    Sheikh & Bovik 2006, in the authors' form with Gaussian windows of 17, 9, 5, 3 pixels. 1 for equal images, above
    1 with more contrast. NaN for a constant source and for sides below 41 pixels.
    """
    if min(source.shape[-2:]) < LEAST_SIDE:
        return _nothing(source)
    kept = total = torch.zeros(())
    for gain, noise, variance in _channels(image, source):
        kept = kept + torch.log(1 + gain**2 * variance / (noise + EYE_NOISE)).sum((-2, -1))
        total = total + torch.log(1 + variance / EYE_NOISE).sum((-2, -1))
    return kept / total.where(total > 0, math.nan)


def ifcp(image: Tensor, source: Tensor) -> Tensor:
    """Information fidelity criterion, approximate, (B,): bits about the source in a pixel of `image`; not bounded.

    ½ Σ log2(1 + g² σ_x² / σ_v²) of Sheikh et al. 2005, but over the four pixel-domain scales of `vifp` and not over
    the bands of a steerable pyramid, for each window of the finest scale, and with σ_v² of at least 1/12, the
    rounding of 8-bit images. Not comparable with values from the pyramid. NaN for sides below 41 pixels.
    """
    if min(source.shape[-2:]) < LEAST_SIDE:
        return _nothing(source)
    bits = [
        0.5 * torch.log2(1 + gain**2 * variance / noise.clamp_min(ROUNDING))
        for gain, noise, variance in _channels(image, source)
    ]
    return torch.stack([scale.sum((-2, -1)) for scale in bits]).sum(0) / bits[0][0].numel()


def _nothing(source: Tensor) -> Tensor:
    return torch.full((len(source),), math.nan, dtype=torch.float64, device=source.device)


def _alike(first: Tensor, second: Tensor, constant: float) -> Tensor:
    return (2 * first * second + constant) / (first**2 + second**2 + constant)


def _features(images: Tensor) -> tuple[Tensor, Tensor]:
    """Phase congruency and Scharr gradient magnitude of each pixel."""
    reduction = max(1, round(min(images.shape[-2:]) / SIDE))
    grey = F.avg_pool2d(GREY * images.float(), reduction)
    scharr = grey.new_tensor([[3, 0, -3], [10, 0, -10], [3, 0, -3]]) / 16
    slopes = F.conv2d(grey[:, None], torch.stack([scharr, scharr.T])[:, None], padding=1)
    return _phase_congruency(grey), slopes.norm(dim=1)


def _phase_congruency(grey: Tensor) -> Tensor:
    """PC_2 of Kovesi (1999) as in FSIM's code: Σ max(energy - noise, 0) / Σ amplitude, (B, H, W) in [0, 1]."""
    filters, spread = (part.to(grey) for part in _log_gabor(*grey.shape[-2:]))
    response = torch.fft.ifft2(torch.fft.fft2(grey)[:, None, None] * filters)  # (B, O, S, H, W)
    amplitude = response.abs()
    total = response.sum(2, keepdim=True)
    turned = response * (total / (total.abs() + 1e-4)).conj()  # its argument is the deviation from the mean phase
    energy = (turned.real - turned.imag.abs()).sum(2)  # (B, O, H, W)
    finest = amplitude[:, :, 0].flatten(2).square()
    median = (finest.median(2).values - (-finest).median(2).values) / 2  # torch's median is the lower of the two
    threshold = NOISE_FACTOR * (median * spread).sqrt()[..., None, None]
    congruency: Tensor = (energy - threshold).clamp_min(0).sum(1) / amplitude.sum((1, 2)).clamp_min(EPS)
    return congruency


@lru_cache(maxsize=4)
def _log_gabor(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Filters (O, S, H, W) over frequencies, and how noise spreads through them (O,).

    The noise's energy is this spread times the median squared response at the finest scale.
    """
    y, x = torch.meshgrid(_frequencies(height), _frequencies(width), indexing="ij")
    radius, angle = torch.hypot(x, y), torch.atan2(-y, x)
    low_pass = 1 / (1 + (radius / LOW_PASS) ** LOW_PASS_ORDER)
    radius[0, 0] = 1.0
    waves = SHORTEST_WAVE * 2.0 ** torch.arange(SCALES, dtype=torch.float64)[:, None, None]
    radial = torch.exp(-((radius * waves).log() ** 2) / (2 * math.log(RADIAL_SPREAD) ** 2)) * low_pass  # (S, H, W)
    radial[:, 0, 0] = 0.0
    turns = torch.arange(ORIENTATIONS, dtype=torch.float64)[:, None, None] * math.pi / ORIENTATIONS
    deviation = torch.remainder(angle - turns + math.pi, 2 * math.pi) - math.pi
    filters = torch.exp(-(deviation**2) / (2 * ANGULAR_SPREAD**2))[:, None] * radial
    answers = torch.fft.ifft2(filters).real.sum(1) * math.sqrt(height * width)
    spread = answers.square().sum((1, 2)) / (math.log(2) * filters[:, 0].square().sum((1, 2)))
    return filters, spread


def _frequencies(side: int) -> Tensor:
    """Cycles per pixel in the order of the FFT; of an odd side over side - 1, as in Kovesi's code."""
    steps = torch.arange(side, dtype=torch.float64) - side // 2
    shifted: Tensor = torch.fft.ifftshift(steps / (side - side % 2))
    return shifted


def _channels(image: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """g, σ_v² and σ_x² of the model image = g source + noise in each window, at four scales."""
    one, two = GREY * image.double(), GREY * source.double()
    for size in WINDOWS:
        if size < WINDOWS[0]:
            one, two = (_filtered(part, size)[..., ::2, ::2] for part in (one, two))
        mean_one, mean_two = _filtered(one, size), _filtered(two, size)
        spread = (_filtered(one * one, size) - mean_one**2).clamp_min(0)
        variance = (_filtered(two * two, size) - mean_two**2).clamp_min(0)
        covariance = _filtered(one * two, size) - mean_one * mean_two
        usable = (variance >= EPS) & (spread >= EPS) & (covariance > 0)
        gain = torch.where(usable, covariance / (variance + EPS), 0.0)
        noise = (spread - gain * covariance).clamp_min(EPS)
        yield gain, noise, variance.where(variance >= EPS, 0.0)


def _filtered(images: Tensor, size: int) -> Tensor:
    """Gaussian windows of `size` pixels, deviation size / 5, that lie inside the image; axis by axis, as products."""
    rows, columns = (_windows(side, size).to(images.device) for side in images.shape[-2:])
    return rows @ images @ columns.T


@lru_cache(maxsize=32)
def _windows(side: int, size: int) -> Tensor:
    """The window at each of its places along an axis, (places, side)."""
    offsets = torch.arange(side) - torch.arange(size // 2, side - size // 2)[:, None]
    weights = torch.exp(-(offsets.double() ** 2) / (2 * (size / 5) ** 2)).where(offsets.abs() <= size // 2, 0.0)
    return weights / weights.sum(1, keepdim=True)
