"""Parts of a latent diffusion model in 2D and 3D: two networks, the noise schedule, the DDIM step, padding.

Latent diffusion: Rombach et al. 2022; the networks are MONAI's, whose import takes seconds and so waits for the first
call. DDPM: Ho et al. 2020; DDIM: Song et al. 2021. Its step is our own: MONAI's clips latents by default and strides by
other steps than it lists.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.errors import ConfigError
from medfl.models.layers import groups

SPREAD = 0.7  # s of `Schedule.steps`, for latents of unit variance whose parts spread by about 0.5 to 1


def autoencoder(
    *,
    channels: Sequence[int],
    res_blocks: int,
    attention: bool,
    latent_channels: int,
    spatial_dims: int,
    in_channels: int,
) -> nn.Module:
    """MONAI's AutoencoderKL; group norms only, so it has no buffers.

    Args:
        channels: width of each level; sides halve from level to level, so three levels shrink by 4.
        res_blocks: residual blocks of each level.
        attention: attend over all positions of the last level, in encoder and decoder.
        latent_channels: of the latents.
        spatial_dims, in_channels: of the images.

    Raises:
        ConfigError: a width, or a number of blocks, below 1.
    """
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    _refuse_empty("autoencoder", channels, res_blocks, latent_channels)
    network: nn.Module = AutoencoderKL(
        spatial_dims=spatial_dims,
        in_channels=in_channels,
        out_channels=in_channels,
        channels=tuple(channels),
        num_res_blocks=[res_blocks] * len(channels),
        attention_levels=[False] * len(channels),
        latent_channels=latent_channels,
        norm_num_groups=groups(math.gcd(*channels)),
        with_encoder_nonlocal_attn=attention,
        with_decoder_nonlocal_attn=attention,
        use_flash_attention=attention,
    )
    return network


def denoiser(
    *,
    channels: Sequence[int],
    res_blocks: int,
    head_channels: Sequence[int],
    latent_channels: int,
    spatial_dims: int,
) -> nn.Module:
    """MONAI's DiffusionModelUNet, unconditional: `network(latents (B, C, *S), timesteps=(B,))` gives the noise in them.

    Args:
        channels: width of each level; sides halve from level to level, and must do so without a rest.
        res_blocks: residual blocks of each level.
        head_channels: channels of an attention head at each level, 0: no attention there. The last is also that of
            the bottom, which always attends.
        latent_channels, spatial_dims: of the latents.

    Raises:
        ConfigError: a width, or a number of blocks, below 1; heads that do not divide a width.
    """
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    _refuse_empty("denoiser", channels, res_blocks, latent_channels)
    fit = len(head_channels) == len(channels) and head_channels[-1] > 0
    if not fit or any(head and width % head for width, head in zip(channels, head_channels, strict=True)):
        raise ConfigError(
            f"denoiser.head_channels: got {list(head_channels)} for channels {list(channels)}, need one number for "
            "each level that divides its width, or 0, and not 0 for the last."
        )
    network: nn.Module = DiffusionModelUNet(
        spatial_dims=spatial_dims,
        in_channels=latent_channels,
        out_channels=latent_channels,
        channels=tuple(channels),
        num_res_blocks=res_blocks,
        attention_levels=[head > 0 for head in head_channels],
        num_head_channels=tuple(head_channels),
        norm_num_groups=groups(math.gcd(*channels)),
        use_flash_attention=True,
    )
    return network


def _refuse_empty(name: str, channels: Sequence[int], res_blocks: int, latent_channels: int) -> None:
    if not channels or min(*channels, res_blocks, latent_channels) < 1:
        raise ConfigError(
            f"{name}: got channels {list(channels)}, res_blocks {res_blocks}, latent_channels {latent_channels}; need "
            "one or more levels, and every number at least 1."
        )


@dataclass(frozen=True)
class Schedule:
    """ᾱ_t, the share of the variance that is left of the clean latents at t = 0..T-1; t = -1 is clean, ᾱ = 1.

    Args:
        length: T.
        first, last: β_0 and β_{T-1}; √β is linear in t ("scaled linear").
    """

    length: int = 1000
    first: float = 0.0015
    last: float = 0.0195

    @cached_property
    def kept(self) -> Tensor:
        """ᾱ (T,) float64, on the CPU."""
        beta = torch.linspace(math.sqrt(self.first), math.sqrt(self.last), self.length, dtype=torch.float64) ** 2
        return torch.cumprod(1 - beta, dim=0)

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """√ᾱ_t z + √(1 - ᾱ_t) noise, both (B, ...), with t (B,) int64 on the CPU."""
        kept = self.kept[t].reshape(-1, *[1] * (z.dim() - 1))
        return kept.sqrt().to(z) * z + (1 - kept).sqrt().to(z) * noise

    def ddim_step(self, z: Tensor, epsilon: Tensor, t: int, t_next: int) -> Tensor:
        """From level t to t_next along the noise found at t; η = 0: nothing is drawn. Nothing is clipped."""
        signal, noise = self._levels(t)
        signal_next, noise_next = self._levels(t_next)
        ratio = signal_next / signal
        return ratio * z + (noise_next - ratio * noise) * epsilon

    def steps(self, count: int) -> list[tuple[int, int]]:
        """`count` pairs (t, t_next) from T - 1 to -1, at equal steps of the angle atan(√(1 - ᾱ) / s√ᾱ).

        On data N(0, s²) and with the exact denoiser, `ddim_step` multiplies the standard deviation by the cosine of
        the angle between its two levels. So equal angles lose the least: 50 steps lose 2.7 % at s = 0.5, where equal
        steps of t lose 7.3 %. With as many steps as levels the two are the same.

        Raises:
            ConfigError: no step, or more than levels.
        """
        if not 1 <= count <= self.length:
            raise ConfigError(f"sampler_steps: got {count}, need 1 to {self.length}.")
        angles = torch.atan2((1 - self.kept).sqrt(), SPREAD * self.kept.sqrt())
        wanted = torch.linspace(float(angles[-1]), float(angles[0]), count, dtype=torch.float64).flip(0)
        nearest, places = (wanted[:, None] - angles).abs().argmin(1), torch.arange(count)
        rising = torch.cummax(nearest - places, dim=0).values + places  # levels of low noise are far apart: none twice
        chosen = torch.minimum(rising, self.length - count + places).flip(0).tolist()
        return list(zip(chosen, [*chosen[1:], -1], strict=True))

    def _levels(self, t: int) -> tuple[float, float]:
        """√ᾱ_t and √(1 - ᾱ_t)."""
        kept = 1.0 if t < 0 else float(self.kept[t])
        return math.sqrt(kept), math.sqrt(1 - kept)


def padded(images: Tensor, multiple: int) -> Tensor:
    """Images (B, C, *S) in the middle of the next larger sides that `multiple` divides; their borders are repeated."""
    margins: list[int] = []
    for side in reversed(images.shape[2:]):
        missing = -side % multiple
        margins += [missing // 2, missing - missing // 2]
    return F.pad(images, margins, mode="replicate") if any(margins) else images


def cropped(images: Tensor, sides: Sequence[int]) -> Tensor:
    """The middle of images (B, C, *S): the reverse of `padded`."""
    for axis, side in enumerate(sides, start=2):
        images = images.narrow(axis, (images.shape[axis] - side) // 2, side)
    return images
