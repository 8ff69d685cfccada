"""The intensity operations of the strong views, for images u (R, C, *S) in [0, 1] and one number (R,) per row.

What is measured of an image (mean, percentiles, histogram) is measured of each channel by itself, as in PIL; three
channels in 2D are red, green and blue, and have one contrast. A constant image stays as it is where there is nothing
to stretch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from medfl.views.intensity import blur

LEVELS = 256
GREY = (0.299, 0.587, 0.114)  # luma of red, green, blue (ITU-R BT.601)
TINY = 1e-6


def is_colour(u: Tensor) -> bool:
    """Whether the channels are red, green and blue."""
    return u.ndim == 4 and u.shape[1] == len(GREY)


def grey_of(u: Tensor) -> Tensor:
    """Luma (R, 1, H, W)."""
    red, green, blue = (weight * u[:, channel, None] for channel, weight in enumerate(GREY))
    return red + green + blue


def blended(u: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """`other + factor * (u - other)`, clipped: 0 is the other image, 1 the image, above 1 leads away from the other."""
    return torch.lerp(other.expand_as(u), u, _per_row(factor, u)).clamp_(0, 1)


def brightened(u: Tensor, factor: Tensor) -> Tensor:
    """Times the factor."""
    return (u * _per_row(factor, u)).clamp_(0, 1)


def contrasted(u: Tensor, factor: Tensor) -> Tensor:
    """Contrast about the mean."""
    measured = grey_of(u) if is_colour(u) else u
    return blended(u, measured.mean(dim=tuple(range(2, u.ndim)), keepdim=True), factor)


def curved(u: Tensor, gamma: Tensor) -> Tensor:
    """u ** gamma."""
    return u ** _per_row(gamma, u)


def recoloured(u: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Saturation by its factor, then hue by a part of the colour circle; (R, 3, H, W).

    A channel of a colour of value V and chroma C is V - C clip(min(k, 4 - k), 0, 1), k = n + hue in sixths, mod 6.
    """
    u = blended(u, grey_of(u), saturation)
    red, green, blue = u.unbind(1)
    value, lowest = u.amax(1), u.amin(1)
    chroma = value - lowest
    divisor = chroma.clamp_min(TINY)
    sixths = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    sixths = torch.where(value == red, (green - blue) / divisor, sixths) + 6 * hue.view(-1, 1, 1)
    k = (sixths[:, None] + torch.arange(5.0, 0.0, -2.0, device=u.device).view(3, 1, 1)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def stretched(u: Tensor, low: float, high: float) -> Tensor:
    """The values between two quantiles (nearest rank) onto [0, 1]; as it is where they are within one grey level."""
    flat = u.flatten(2)  # (R, C, N)
    last = flat.shape[2] - 1
    bottom = flat.topk(1 + round(low * last), largest=False, sorted=False).values.amax(2, keepdim=True)
    top = flat.topk(1 + last - round(high * last), sorted=False).values.amin(2, keepdim=True)
    span = top - bottom
    wide = ((flat - bottom) / span.clamp_min(TINY)).clamp_(0, 1)
    return torch.where(span > 1 / LEVELS, wide, flat).view_as(u)


def equalized(u: Tensor) -> Tensor:
    """Histogram equalisation with 256 bins: each bin's share among the voxels above the lowest bin that is not empty.

    Those voxels are the body, where the background is one value; the lowest bin becomes 0.
    """
    flat = u.flatten(2)
    bins = (flat * LEVELS).long().clamp_(0, LEVELS - 1)
    counts = torch.zeros(*flat.shape[:2], LEVELS, dtype=torch.int32, device=u.device)
    counts.scatter_add_(2, bins, torch.ones((), dtype=torch.int32, device=u.device).expand_as(bins))
    reached = counts.cumsum(2)
    lowest = reached.masked_fill(reached == 0, flat.shape[2]).amin(2, keepdim=True)
    body = flat.shape[2] - lowest
    table = (reached - lowest).clamp_min(0) / body.clamp_min(1)
    return torch.where(body > 0, table.gather(2, bins), flat).view_as(u)


def sharpened(u: Tensor, factor: Tensor, sigma: Tensor, *, radius: int) -> Tensor:
    """Blend with a smoothed image: factor 1 is the image, 0 the smoothed, above 1 sharpens; the border is repeated."""
    taps, own = smoothing(sigma, u.ndim - 2, radius=radius)
    return blended(u, blur(u, taps) + own * u, factor)


def smoothing(sigma: Tensor, dims: int, *, radius: int) -> tuple[Tensor, float]:
    """Taps (R, T) along every axis, and the share of the image itself that is added to what they give.

    A plane is smoothed by [1 1 1; 1 5 1; 1 1 1] / 13, a volume by a Gaussian of `sigma` (R,) voxels cut at `radius`,
    which makes sharpening an unsharp mask.
    """
    if dims == 2:
        return torch.full((len(sigma), 3), 13**-0.5, device=sigma.device), 4 / 13
    distance = torch.arange(-radius, radius + 1, device=sigma.device)
    return F.softmax(-0.5 * (distance / sigma[:, None]) ** 2, dim=1), 0.0


def _per_row(values: Tensor, u: Tensor) -> Tensor:
    return values.view(-1, *[1] * (u.ndim - 1))
