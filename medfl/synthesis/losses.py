"""Losses of latent diffusion: what each of the two networks learns from.

Reconstruction as in Rombach et al. 2022, with SSIM for their perceptual and adversarial terms, which need networks
trained on other images; noise prediction: Ho et al. 2020. Random numbers are drawn on the CPU, equal on every device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.models.diffusion import Schedule, cropped, padded
from medfl.models.similarity import ssim


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
