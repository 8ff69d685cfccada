"""Losses of latent diffusion: what each of the two networks learns from.

Reconstruction as in Rombach et al. 2022, with SSIM for their perceptual and adversarial terms, which need networks
trained on other images; noise prediction: Ho et al. 2020. Random numbers are drawn on the CPU, equal on every device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.methods.base import full_precision
from medfl.models.diffusion import Schedule, cropped, padded

WINDOW, SIGMA = 11, 1.5  # of SSIM, in voxels
K1, K2 = 0.01, 0.03


def reconstruction(
    network: Any, images: Tensor, generator: torch.Generator, *, multiple: int, kl: float, ssim_weight: float
) -> Tensor:
    """L1 + kl KL + w (1 - SSIM) of an autoencoder.

    Args:
        images: (B, C, *S) in [-1, 1]; padded to sides that `multiple` divides, and compared without the padding.
        kl: weight of the divergence from N(0, 1), summed over an image's latents.
        ssim_weight: w.
    """
    mean, deviation = (part.float() for part in network.encode(padded(images, multiple)))
    made = cropped(network.decode(mean + deviation * _normal(mean, generator)), images.shape[2:]).float()
    divergence = 0.5 * (mean**2 + deviation**2 - 1 - 2 * deviation.log()).flatten(1).sum(1).mean()
    unlike = 1 - ssim((made + 1) / 2, (images + 1) / 2, span=1.0).mean()
    total: Tensor = F.l1_loss(made, images) + kl * divergence + ssim_weight * unlike
    return total


def prediction(
    network: Any,
    mean: Tensor,
    deviation: Tensor,
    generator: torch.Generator,
    *,
    schedule: Schedule,
    scale: float,
) -> Tensor:
    """Mean squared error of the noise that a denoiser finds in latents N(mean, deviation²), both (B, C, *S).

    The latents are drawn anew: of a draw that is repeated, the denoiser learns the draw itself.
    """
    z = scale * (mean + deviation * _normal(mean, generator))
    t = torch.randint(schedule.length, (len(z),), generator=generator)
    noise = _normal(z, generator)
    found = network(schedule.add_noise(z, noise, t), timesteps=t.to(z.device))
    return F.mse_loss(found.float(), noise)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device, non_blocking=True)


@full_precision
def ssim(x: Tensor, y: Tensor, *, span: float) -> Tensor:
    """Mean structural similarity (B,) of images (B, C, *S) with values in [0, span]; at most 1, for equal images.

    Gaussian windows that lie inside of the image (Wang et al. 2004); an axis below 11 voxels takes a smaller one.
    Filters axis by axis, as products: 3 (2D) to 50 (3D) times as fast as MONAI's, with the same values.
    """
    maps = torch.stack([x, y, x * x, y * y, x * y])  # (5, B, C, *S)
    for axis in range(3, maps.dim()):
        maps = (maps.movedim(axis, -1) @ _windows(maps.shape[axis], like=x).T).movedim(-1, axis)
    mean_x, mean_y, square_x, square_y, product = maps.flatten(2)
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    spread = square_x - mean_x**2 + square_y - mean_y**2
    similar: Tensor = brightness * (2 * (product - mean_x * mean_y) + c2) / (spread + c2)
    return similar.mean(1)


def _windows(side: int, *, like: Tensor) -> Tensor:
    """The Gaussian window at each of its places along an axis, (places, side)."""
    reach = min(WINDOW // 2, (side - 1) // 2)
    centres = torch.arange(reach, side - reach, device=like.device)
    distances = torch.arange(side, device=like.device) - centres[:, None]
    weights = torch.exp(-(distances**2).to(like.dtype) / (2 * SIGMA**2)).where(distances.abs() <= reach, 0.0)
    return weights / weights.sum(1, keepdim=True)
