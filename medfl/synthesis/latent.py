"""A latent diffusion model of images of one shape: its networks together, and its two files."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medfl.config import build
from medfl.errors import ConfigError, DataError
from medfl.files import sha256, write_bytes, write_tensors
from medfl.models.diffusion import Schedule, cropped, padded
from medfl.study import Node

WEIGHTS, FACTS = "weights.safetensors", "architecture.json"


class Diffusion(nn.Module):
    """Autoencoder, denoiser of its latents, and the factor between them.

    Its weights can reproduce patients: they stay where they were trained.

    Args:
        autoencoder, denoiser: configuration nodes of `medfl.models.diffusion`.
        shape: (C, *S) of an image. Inside, sides are padded to what both networks can halve, and cropped again.
        scale: the denoiser sees latents times `scale`, which gives them unit variance.
        schedule: of the noise.

    Weights are drawn from torch's global generator: seed it for equal models.

    Raises:
        ConfigError: networks that cannot be built.
    """

    def __init__(
        self,
        *,
        autoencoder: Node,
        denoiser: Node,
        shape: Sequence[int],
        scale: float = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        self.nodes, self.shape, self.scale = {"autoencoder": autoencoder, "denoiser": denoiser}, tuple(shape), scale
        self.schedule = schedule or Schedule()
        dims = len(self.shape) - 1
        self.autoencoder: Any = build(autoencoder, spatial_dims=dims, in_channels=self.shape[0])
        latent = autoencoder["latent_channels"]
        self.denoiser = build(denoiser, spatial_dims=dims, latent_channels=latent)
        factor = 2 ** (len(autoencoder["channels"]) - 1)
        self.multiple = factor * 2 ** (len(denoiser["channels"]) - 1)
        self.latent_shape = (latent, *[-(-side // self.multiple) * self.multiple // factor for side in self.shape[1:]])

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the unscaled latents (B, *latent_shape) of images (B, *shape)."""
        mean, deviation = self.autoencoder.encode(padded(images, self.multiple))
        return mean, deviation

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, *shape) of unscaled latents; not clipped."""
        return cropped(self.autoencoder.decode(latents), self.shape[1:])

    def save(self, folder: Path) -> None:
        """Write weights, then architecture; a crash between the two leaves what `load` refuses.

        Raises:
            ResourceError: the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest = write_tensors(folder / WEIGHTS, self.state_dict())
        facts = {**self.nodes, "shape": self.shape, "scale": self.scale, "schedule": asdict(self.schedule)}
        write_bytes(folder / FACTS, json.dumps({**facts, "sha256": digest}, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The model that `save` wrote, on the CPU.

        Raises:
            DataError: a file is missing or damaged, or the two do not belong together.
        """
        try:
            facts = json.loads((folder / FACTS).read_bytes())
            if sha256(folder / WEIGHTS) != facts.pop("sha256"):
                raise ValueError(f"{WEIGHTS} does not match its SHA-256")
            with torch.random.fork_rng(devices=[]):
                model = cls(**{**facts, "schedule": Schedule(**facts["schedule"])})
            model.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError, SafetensorError) as error:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"no diffusion model can be read from {folder}: {line}. Train it again.") from None
        return model
