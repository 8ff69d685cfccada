"""How alike two images are, window by window: SSIM (Wang et al. 2004) and squared local correlation.

Windows slide as products with a matrix, axis by axis: 3 (2D) to 50 (3D) times as fast as MONAI's SSIM, with the same
values. Computed in float32 or better, also under autocast.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # of SSIM, in voxels
K1, K2 = 0.01, 0.03
FLOOR = 1e-5  # variance that counts as none, for images in [0, 1]: float32 still tells it from 0


def ssim(x: Tensor, y: Tensor, *, span: float) -> Tensor:
    """Mean structural similarity (B,) of images (B, C, *S) with values in [0, span]; at most 1, for equal images.

    Gaussian windows that lie inside of the image; an axis below 11 voxels takes a smaller one.
    """
    return ssim_by_channel(x, y, span=span).mean(1)


def ssim_by_channel(x: Tensor, y: Tensor, *, span: float) -> Tensor:
    """As `ssim`, of each channel (B, C). Where x has one channel, it is compared with every channel of y."""
    mean_x, mean_y, variance_x, variance_y, covariance = _moments(x, y, _gaussians)
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    similar: Tensor = brightness * (2 * covariance + c2) / (variance_x + variance_y + c2)
    return similar.flatten(2).mean(2)


def local_correlation(x: Tensor, y: Tensor, *, window: int = 9) -> Tensor:
    """Squared correlation (B, C, *S) in [0, 1] of two images in a box of `window` voxels around each voxel.

    1 where one is a linear function of the other, 0 where one is constant. At the border the box is cut. Where x has
    one channel, it is compared with every channel of y (B, C, *S).
    """
    _, _, variance_x, variance_y, covariance = _moments(x, y, lambda side, like: _boxes(side, window, like))
    spread = (variance_x.clamp_min(0) + FLOOR) * (variance_y.clamp_min(0) + FLOOR)
    found: Tensor = covariance**2 / spread
    return found


def _moments(x: Tensor, y: Tensor, windows: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, ...]:
    """Means, variances and covariance in each window; `windows` gives the weights along an axis (places, side)."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(wide), y.to(wide)
    parts = [x, y, x * x, y * y, x * y]
    maps = torch.cat(parts, dim=1)
    with torch.autocast(x.device.type, enabled=False):
        for axis in range(2, maps.dim()):
            maps = (maps.movedim(axis, -1) @ windows(maps.shape[axis], x).T).movedim(-1, axis)
    mean_x, mean_y, square_x, square_y, product = torch.split(maps, [part.shape[1] for part in parts], dim=1)
    return mean_x, mean_y, square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y


def _gaussians(side: int, like: Tensor) -> Tensor:
    """The Gaussian window at each place where it lies inside."""
    reach = min(WINDOW // 2, (side - 1) // 2)
    centres = torch.arange(reach, side - reach, device=like.device)
    distances = torch.arange(side, device=like.device) - centres[:, None]
    weights = torch.exp(-(distances**2).to(like.dtype) / (2 * SIGMA**2)).where(distances.abs() <= reach, 0.0)
    return weights / weights.sum(1, keepdim=True)


def _boxes(side: int, window: int, like: Tensor) -> Tensor:
    """The mean over a window around every voxel, as far as it lies inside."""
    places = torch.arange(side, device=like.device)
    weights = ((places - places[:, None]).abs() <= window // 2).to(like.dtype)
    return weights / weights.sum(1, keepdim=True)
