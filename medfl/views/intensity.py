"""The intensity part of a view: blur, gamma, scale, shift and noise, in this order, in one pass.

Gamma works on [0, 1], the image of the nominal range [-1, 1]: `u -> u ** gamma` with `u = (x + 1) / 2`. Values outside
the nominal range are left as they are, which keeps the map continuous and monotone and clips nothing.
"""

import functools
import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from medfl.views.chance import Chance

LEVELS = 12  # bits: the noise takes 4096 values, the quantiles of the normal distribution (up to 3.7 sd)
MULTIPLIERS = (0x7FEB352D, 0x846CA68B, 0x9E3779B9)


class Intensity:
    """What is drawn for the intensity part; see `configs/views/default.yaml` for units and defaults.

    Args:
        blur: standard deviation in voxels of a separable Gaussian, cut off at three of the largest.
        gamma: exponent on [0, 1].
        scale: factor.
        shift: summand.
        noise: standard deviation of Gaussian noise.

    Raises:
        ConfigError: a probability or bound that cannot be used.
    """

    def __init__(
        self,
        *,
        blur: Mapping[str, float],
        gamma: Mapping[str, float],
        scale: Mapping[str, float],
        shift: Mapping[str, float],
        noise: Mapping[str, float],
    ) -> None:
        self.blur = Chance(**blur).within("blur", lowest=0, highest=16)
        self.gamma = Chance(**gamma).within("gamma", lowest=0.05, highest=20)
        self.scale = Chance(**scale).within("scale", lowest=0)
        self.shift = Chance(**shift)
        self.noise = Chance(**noise).within("noise", lowest=0)
        self.radius = math.ceil(3 * self.blur.high) if self.blur.probability else 0

    def columns(self) -> int:
        """How many uniform columns `draw` takes."""
        return 10

    def draw(self, columns: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """Tone (R, 4): gamma, scale, shift, noise sd; and the blur's taps (R, 2 * radius + 1), a unit pulse if off."""
        sigma = self.blur.draw(columns, identity=0.0)
        identities = ((self.gamma, 1.0), (self.scale, 1.0), (self.shift, 0.0), (self.noise, 0.0))
        tone = torch.cat([chance.draw(columns, identity=identity) for chance, identity in identities], dim=1)
        distance = torch.arange(-self.radius, self.radius + 1)
        taps = torch.exp(-0.5 * (distance / sigma.clamp_min(0.05)) ** 2)
        return tone, taps / taps.sum(dim=1, keepdim=True)


def blur(images: Tensor, taps: Tensor) -> Tensor:
    """Images (R, C, *S) convolved along every axis with their row's taps (R, T); the border voxel is repeated."""
    radius = taps.shape[1] // 2
    if radius == 0:
        return images
    shape = (-1, *[1] * (images.ndim - 1))
    for axis in range(2, images.ndim):
        pad = [0, 0] * (images.ndim - 2)
        pad[2 * (images.ndim - 1 - axis)] = pad[2 * (images.ndim - 1 - axis) + 1] = radius
        padded, side = F.pad(images, pad, mode="replicate"), images.shape[axis]
        images = torch.zeros_like(images)
        for tap in range(taps.shape[1]):
            images.addcmul_(padded.narrow(axis, tap, side), taps[:, tap].view(shape))
    return images


def adjust(images: Tensor, tone: Tensor, noise: Tensor) -> Tensor:
    """Gamma, scale, shift and noise (unit variance, of the images' shape) with each row's tone (R, 4)."""
    gamma, scale, shift, sd = (column.view(-1, *[1] * (images.ndim - 1)) for column in tone.unbind(1))
    curved = 2 * ((images + 1) / 2).clamp(0, 1) ** gamma - 1
    images = torch.where(images.abs() < 1, curved, images)
    return images * scale + shift + sd * noise


def noise(salts: Tensor, count: int) -> Tensor:
    """Standard normal values (R, count), a pure function of (salts, position): equal on every device and backend.

    The hash of each position picks one of 4096 equally probable quantiles.
    """
    picked = shifted(hashed(salts, count), 32 - LEVELS)
    return quantiles(salts.device).index_select(0, picked.flatten()).view(picked.shape)


def hashed(salts: Tensor, count: int) -> Tensor:
    """32 random bits (R, count) int32: a counter-based hash of the position, keyed by two salts (R, 2) int32.

    Integers wrap at 32 bits.
    """
    first, second, third = (value - (1 << 32) if value >> 31 else value for value in MULTIPLIERS)
    bits = torch.arange(count, dtype=torch.int32, device=salts.device) ^ salts[:, :1]
    bits = (bits ^ shifted(bits, 16)) * first
    bits = (bits ^ shifted(bits, 15)) * second + salts[:, 1:]
    return (bits ^ shifted(bits, 16)) * third


def shifted(bits: Tensor, count: int) -> Tensor:
    """Unsigned shift to the right of int32."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


@functools.cache
def quantiles(device: torch.device) -> Tensor:
    """The (4096,) float32 midpoint quantiles of the normal distribution, scaled to unit variance."""
    levels = 1 << LEVELS
    middle = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    values: Tensor = torch.special.ndtri(middle)
    return (values / values.square().mean().sqrt()).float().to(device)
