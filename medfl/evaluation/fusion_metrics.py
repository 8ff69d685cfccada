"""How much of its sources a fused image keeps. Definitions differ from paper to paper: these are what the numbers mean.

Images have values in [0, 1]; all voxels count, the background too. Higher is better everywhere, but SFR and rSFe have
their ideal in the middle: below 1 (SFR) or 0 (rSFe) detail was lost, far above it was made up.
"""

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from medfl.data.sample import present
from medfl.evaluation import slice_metrics
from medfl.models import similarity

BINS = 256
SLICES = 12  # in the middle of a volume, for what is defined in 2D
LEAST_ERROR = 1e-10  # mean squared, so PSNR ends at 100 dB

Metric = Callable[[Tensor, Tensor], Tensor]


def ssim(fused: Tensor, source: Tensor) -> Tensor:
    """Structural similarity (B,) with a Gaussian window of 11 voxels, deviation 1.5, in 2D or 3D (Wang et al. 2004)."""
    return similarity.ssim(fused.expand_as(source), source, span=1.0).double()


def psnr(fused: Tensor, source: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10 log10(1 / MSE) in dB, (B,); 100 for equal images."""
    error = (fused.double() - source.double()).square().flatten(1).mean(1)
    return -10 * error.clamp_min(LEAST_ERROR).log10()


def nmi(fused: Tensor, source: Tensor) -> Tensor:
    """(H(x) + H(F)) / H(x, F) (Studholme et al. 1999), (B,): 1 for independent images, 2 where each gives the other.

    256 bins of equal width over [0, 1]. Few voxels make independent images look related: 1.01 at 200,000 of them.
    """
    one, two = (_bins(images) for images in (fused.expand_as(source), source))
    values = []
    for pair in one * BINS + two:
        joint = torch.bincount(pair, minlength=BINS**2).view(BINS, BINS).double() / len(pair)
        marginal = _entropy(joint.sum(0)) + _entropy(joint.sum(1))
        both = _entropy(joint)
        values.append(torch.where(both > 0, marginal / both, 2.0))  # two constants give each other
    return torch.stack(values)


def sfr(fused: Tensor, sources: Tensor) -> Tensor:
    """Spatial frequency of the fused image over the mean one of its sources, (B,); NaN for constant sources.

    SF² is the sum over axes of the mean squared difference of neighbours (Eskicioglu & Fisher 1995).
    """
    axes = torch.eye(fused.ndim - 2, dtype=torch.int64).tolist()
    one, each = (_frequency(_differences(images, axes)) for images in (fused, sources))  # (B, 1), (B, M)
    return one[:, 0] / _above_zero(each.where(present(sources), math.nan).nanmean(1))


def rsfe(fused: Tensor, sources: Tensor) -> Tensor:
    """Ratio of spatial frequency error (SF_F - SF_R) / SF_R (Zheng et al. 2007), (B,); NaN for constant sources.

    SF over the axes and all diagonals, each weighted 1 / distance; SF_R takes at each place the largest absolute
    difference of any source. Negative: detail was lost.
    """
    steps = _directions(fused.ndim - 2)
    weights = torch.tensor([1 / math.hypot(*step) for step in steps], dtype=torch.float64, device=fused.device)
    largest = [part.abs().amax(1, keepdim=True) for part in _differences(sources, steps)]
    own, ideal = (_frequency(parts, weights)[:, 0] for parts in (_differences(fused, steps), largest))
    return own / _above_zero(ideal) - 1


def over_sources(metric: Metric) -> Metric:
    """The mean over the modalities that a subject has, (B,), of a metric of fused (1, 1, *S) and source (P, 1, *S).

    NaN for a subject that has none.
    """

    def mean(fused: Tensor, sources: Tensor) -> Tensor:
        rows = zip(torch.split(fused, 1), sources, present(sources), strict=True)
        pairs = [(one, channels[held][:, None]) for one, channels, held in rows]
        nothing = fused.new_tensor(math.nan, dtype=torch.float64)
        return torch.stack([metric(one, source).nanmean() if len(source) else nothing for one, source in pairs])

    return mean


def on_slices(metric: Metric) -> Metric:
    """The mean of a 2D metric over the 12 middle axial slices, (B,); a 2D image is its own slice.

    Slices in which the source is constant are left out.
    """

    def mean(fused: Tensor, source: Tensor) -> Tensor:
        values = [
            metric(one, two).where(two.amax((1, 2)) > two.amin((1, 2)), math.nan)
            for one, two in zip(_slices(fused), _slices(source), strict=True)
        ]
        return torch.stack(values).nanmean(0)

    return mean


# name -> function of the fused image (B, 1, *S) and its sources (B, M, *S), zero where absent, that gives (B,)
FUSION: Mapping[str, Metric] = {
    "ssim": over_sources(ssim),
    "psnr": over_sources(psnr),
    "nmi": over_sources(nmi),
    "sfr": sfr,
    "rsfe": rsfe,
    "fsim": over_sources(on_slices(slice_metrics.fsim)),
    "vifp": over_sources(on_slices(slice_metrics.vifp)),
    "ifcp": over_sources(on_slices(slice_metrics.ifcp)),
}


def _bins(images: Tensor) -> Tensor:
    """The bin of each voxel, (B, N)."""
    return (images.flatten(1) * BINS).long().clamp(0, BINS - 1)


def _entropy(shares: Tensor) -> Tensor:
    return -torch.xlogy(shares, shares).sum()


def _directions(axes: int) -> list[list[int]]:
    """One step to each neighbour, without the opposite ones: 4 in 2D, 13 in 3D."""
    steps = itertools.product((0, 1, -1), repeat=axes)
    return [list(step) for step in steps if next((part for part in step if part), 0) > 0]


def _differences(images: Tensor, steps: list[list[int]]) -> list[Tensor]:
    """x(p + step) - x(p) wherever both are inside, for each step, of images (B, C, *S)."""
    return [_moved(images, step) - _moved(images, [-part for part in step]) for step in steps]


def _moved(images: Tensor, step: list[int]) -> Tensor:
    """The part of images (B, C, *S) that is inside after a step."""
    for axis, part in enumerate(step, start=2):
        images = images.narrow(axis, max(part, 0), images.shape[axis] - abs(part))
    return images


def _frequency(differences: list[Tensor], weights: Tensor | None = None) -> Tensor:
    """Spatial frequency (B, C) from differences in some directions, of weight 1 each if none are given."""
    power = torch.stack([part.double().square().flatten(2).mean(2) for part in differences], dim=2)
    return (power if weights is None else power * weights).sum(2).sqrt()


def _above_zero(values: Tensor) -> Tensor:
    return values.where(values > 0, math.nan)


def _slices(images: Tensor) -> list[Tensor]:
    """The middle slices of (B, 1, *S), each (B, H, W)."""
    if images.ndim == 4:
        return [images[:, 0]]
    depth = images.shape[-1]
    first = max(0, (depth - SLICES) // 2)
    return list(images[:, 0, ..., first : first + SLICES].unbind(-1))
