"""Views of every image, drawn at once and made at once: a pure function of the images and a key."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from medfl.errors import ConfigError
from medfl.views import intensity as tones
from medfl.views import spatial as places
from medfl.views.intensity import Intensity
from medfl.views.spatial import Spatial

BACKENDS = ("auto", "torch", "kernel")
COUNT = 2  # views of an image, unless a method takes another number
WORD = 1 << 32
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """All random numbers of a batch; row v * B + i is view v of image i."""

    count: int  # V, views of each image
    maps: Tensor  # (VB, d, d + 1)
    tone: Tensor  # (VB, 4)
    taps: Tensor  # (VB, T)
    salts: Tensor  # (VB, 2) int32


class Views:
    """Augmented views of a batch, by one affine resampling and one intensity pass each.

    What image i becomes depends on the key, its place i in the batch and itself alone: not on the batch's size or
    its other images, nor on the device (up to rounding of the interpolation) or the number of threads.

    Args:
        spatial, intensity: what is drawn.
        backend: "kernel" is the fused CPU code, "torch" works on every device; "auto" takes the kernel on the CPU.

    Raises:
        ConfigError: an unknown backend, or "kernel" where numba cannot be imported.
    """

    def __init__(self, *, spatial: Spatial, intensity: Intensity, backend: str) -> None:
        refuse_backend(backend)
        self.spatial, self.intensity, self.backend = spatial, intensity, backend

    @torch.no_grad()
    def __call__(self, images: Tensor, *, key: int, count: int = COUNT) -> list[Tensor]:
        """`count` views, each (B, C, *S), of images (B, C, H, W) or (B, C, D, H, W), float32 on any device.

        Raises:
            ValueError: images of another type or shape, or no view asked for.
            ConfigError: the backend "kernel" and images that are not on the CPU.
        """
        refuse_images(images)
        draw = self.draw(len(images), images.shape[2:], key=key, count=count)
        return self.render(images, draw)

    def draw(self, images: int, size: torch.Size, *, key: int, count: int = COUNT) -> Draw:
        """The random numbers of so many images on a grid of `size`, on the CPU: the same for every device.

        Raises:
            ValueError: a count below 1.
        """
        needed = self.spatial.columns(len(size)) + self.intensity.columns()
        columns, salts = uniforms(images, needed, key=key, count=count)
        maps = self.spatial.draw(columns, size)
        tone, taps = self.intensity.draw(columns)
        return Draw(count, maps, tone, taps, salts)

    def render(self, images: Tensor, draw: Draw) -> list[Tensor]:
        """The views of `images` that were drawn."""
        make = self.compiled if compiles(self.backend, images.device) else self._torch
        return list(make(images.detach(), draw).view(draw.count, *images.shape).unbind(0))

    def compiled(self, images: Tensor, draw: Draw, channels: int | None = None) -> Tensor:
        """The views (V B, C, *S) by the CPU kernel, of the first channels alone: the others are left open."""
        from medfl.views import kernel

        return kernel.render(
            images,
            draw.maps,
            tone=draw.tone,
            taps=draw.taps,
            salts=draw.salts,
            padding=self.spatial.padding,
            channels=channels,
        )

    def _torch(self, images: Tensor, draw: Draw) -> Tensor:
        """The reference, and the code for accelerators: the host never waits for the device."""
        maps, tone, taps, salts = (
            x.to(images.device, non_blocking=True) for x in (draw.maps, draw.tone, draw.taps, draw.salts)
        )
        rows = images.repeat(draw.count, *[1] * (images.ndim - 1))
        views = tones.blur(places.resample(rows, maps, padding=self.spatial.padding), taps)
        return tones.adjust(views, tone, tones.noise(salts, views[0].numel()).view_as(views))


def uniforms(images: int, columns: int, *, key: int, count: int) -> tuple[Iterator[Tensor], Tensor]:
    """Columns of U[0, 1), each (VB,), and the salts (VB, 2) int32 of B images with V = `count` views.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"views: got count={count}, need at least 1 view of each image.")
    generator = torch.Generator().manual_seed(key)
    # Image by image, so that a longer batch begins like a shorter one.
    words = torch.randint(WORD, (images, count, columns + 2), generator=generator)
    words = words.transpose(0, 1).flatten(0, 1)  # (VB, columns + 2)
    values = (words >> 8).float() / (WORD >> 8)  # 24 bits: exact in float32, below 1
    return iter(values.unbind(1)), (words[:, -2:] - WORD // 2).int().contiguous()


def refuse_images(images: Tensor) -> None:
    """ValueError for images of a type or shape that has no views."""
    if images.ndim not in (4, 5) or images.dtype != torch.float32 or min(images.shape[2:]) < 2:
        raise ValueError(
            f"views: got {images.dtype} {tuple(images.shape)}, need float32 (B, C, H, W) or (B, C, D, H, W) "
            "with at least 2 voxels along each axis."
        )


def refuse_backend(backend: str) -> None:
    """ConfigError for a backend that does not exist or cannot run here."""
    if backend not in BACKENDS:
        raise ConfigError(f"views.backend: got {backend!r}, need one of {', '.join(BACKENDS)}.")
    if backend == "kernel" and (reason := why_no_kernel()):
        raise ConfigError(f"views.backend=kernel needs numba, which failed: {reason}. Install it or set auto.")


def compiles(backend: str, device: torch.device) -> bool:
    """Whether the kernel makes the views of images on `device`.

    Raises:
        ConfigError: the backend "kernel" and a device that is not the CPU.
    """
    if backend == "kernel" and device.type != "cpu":
        raise ConfigError(f"views.backend=kernel works on the CPU, got images on {device}. Set auto or torch.")
    if backend == "auto" and device.type == "cpu":
        return not warn_without_kernel()
    return backend == "kernel"


@cache
def why_no_kernel() -> str:
    """Why the kernel cannot be imported; empty if it can."""
    try:
        from medfl.views import kernel  # noqa: F401
    except (ImportError, OSError, RuntimeError, SystemError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@cache
def warn_without_kernel() -> bool:
    """Whether the kernel is missing, said once in the log."""
    if reason := why_no_kernel():
        log.warning("views.backend=auto: the CPU kernel is missing (%s); the slower torch backend is used.", reason)
    return bool(reason)
