"""Is this an image at all? Spread, saturation and spectrum of a candidate, against the range of the real images."""

from dataclasses import dataclass

import torch
from torch import Tensor

TAIL = 0.005  # of the real images, cut off at each end of a range
SATURATED = 0.99  # grey values in [-1, 1] count as saturated from here on
BINS = 3  # frequencies that a slope needs


@dataclass(frozen=True)
class Range:
    """What a statistic of a sane image lies in, ends included."""

    low: float
    high: float


def ranges(real: Tensor) -> dict[str, Range]:
    """Range of each statistic over the real images (n, C, *S), without its outermost 0.5 % at each end.

    Wider by 1 / sqrt(n) of itself at each end: a quantile so far out is hardly known from few images. Saturation has
    no lower end: real background is often exactly black, and a decoder's never is.
    """
    found = {}
    for name, values in statistics(real).items():
        low, high = values.quantile(values.new_tensor([TAIL, 1 - TAIL])).tolist()
        room = (high - low) / len(real) ** 0.5
        found[name] = Range(0.0 if name == "saturated" else low - room, high + room)
    return found


def sane(images: Tensor, allowed: dict[str, Range]) -> Tensor:
    """Which images (B, C, *S) are finite with every statistic in its range, bool (B,)."""
    good = images.isfinite().flatten(1).all(1)
    for name, values in statistics(images).items():
        good &= (values >= allowed[name].low) & (values <= allowed[name].high)  # NaN is in no range
    return good.cpu()


def statistics(images: Tensor) -> dict[str, Tensor]:
    """Each (B,): the deviation of the grey values, the share of saturated ones, and the spectral slope."""
    voxels = images.flatten(1)
    return {
        "std": voxels.std(dim=1),
        "saturated": (voxels.abs() >= SATURATED).float().mean(dim=1),
        "slope": spectral_slope(images),
    }


def spectral_slope(images: Tensor) -> Tensor:
    """Slope of log power over log radial frequency, (B,): 0 for white noise, -2 to -5 for anatomy.

    Over the lower half of the frequencies: every decoder smooths the upper half, which is for the realism test to
    judge. A Hann window keeps the borders, which do not meet, out of it.
    """
    power = radial_power(images)
    power = power[:, : max(BINS, power.shape[1] // 2)]
    frequency = torch.arange(1, power.shape[1] + 1, device=power.device).log()
    frequency = frequency - frequency.mean()
    logs = power.clamp_min(1e-12).log()
    slope: Tensor = (logs - logs.mean(dim=1, keepdim=True)) @ frequency / frequency.square().sum()
    return slope


def radial_power(images: Tensor) -> Tensor:
    """Mean power at 1, 2, ... cycles per the image's smallest side, (B, side // 2); mean over channels."""
    size = images.shape[2:]
    axes = list(range(2, images.ndim))
    centred = images - images.mean(dim=axes, keepdim=True)
    for axis, side in zip(axes, size, strict=True):
        window = torch.hann_window(side + 2, periodic=False, device=images.device)[1:-1]
        centred = centred * window.view([-1 if axis == at else 1 for at in range(images.ndim)])
    power = torch.fft.fftn(centred, dim=axes).abs().square().mean(dim=1).flatten(1)  # (B, P)
    count = max(BINS, min(size) // 2)
    grid = torch.meshgrid(*[torch.fft.fftfreq(side) for side in size], indexing="ij")
    radius = (torch.stack(grid).norm(dim=0) * 2 * count).round().long().flatten()
    inside = ((radius >= 1) & (radius <= count)).to(images.device)
    member = torch.nn.functional.one_hot(radius.clamp(0, count), count + 1).float().to(images.device)
    member = member[:, 1:] * inside[:, None]  # (P, count)
    mean: Tensor = power @ member / member.sum(dim=0).clamp_min(1)
    return mean
