"""Views of images with their masks: moved together, while intensity is the image's alone."""

import torch
from torch import Tensor

from medfl.data.sample import require, whole
from medfl.views import compose, spatial
from medfl.views.compose import Views
from medfl.views.intensity import Intensity
from medfl.views.spatial import Spatial


class Paired:
    """The views of `Views`, and their masks by the same maps with the nearest value; the contract is that of `Views`.

    Args:
        channels: of the image, the first ones. Further ones, such as a mask, keep their values.
        spatial, intensity, backend: as of `Views`.

    Raises:
        ConfigError: a setting that cannot be used.
    """

    keeps_masks = True

    def __init__(self, *, channels: int, spatial: Spatial, intensity: Intensity, backend: str) -> None:
        require("views", {"channels": (channels, whole(channels), "an integer of at least 1")})
        self.channels = channels
        self.views = Views(spatial=spatial, intensity=intensity, backend=backend)

    @torch.no_grad()
    def __call__(self, images: Tensor, *, key: int, count: int = compose.COUNT) -> list[Tensor]:
        """`count` views, each (B, C, *S), of images (B, C, H, W) or (B, C, D, H, W), float32 on any device.

        Raises:
            ValueError: images of another type or shape, fewer channels than an image has, or no view asked for.
            ConfigError: the backend "kernel" and images that are not on the CPU.
        """
        compose.refuse_images(images)
        if images.shape[1] < self.channels:
            raise ValueError(f"views: got {images.shape[1]} channels, need the {self.channels} of an image or more.")
        draw = self.views.draw(len(images), images.shape[2:], key=key, count=count)
        if compose.compiles(self.views.backend, images.device):
            made = self._compiled(images.detach(), draw)
            return list(made.view(count, *images.shape).unbind(0))
        views = self.views.render(images[:, : self.channels], draw)
        masks = images[:, self.channels :]
        if not masks.shape[1]:
            return views
        moved = self._moved(masks, draw.maps).view(count, *masks.shape)
        return [torch.cat(pair, dim=1) for pair in zip(views, moved, strict=True)]

    def _compiled(self, images: Tensor, draw: compose.Draw) -> Tensor:
        """All views (V B, C, *S), images and masks, each made where it stays."""
        from medfl.views import nearest

        made = self.views.compiled(images, draw, self.channels)
        if images.shape[1] > self.channels:
            nearest.fill(made, images, draw.maps, begin=self.channels, padding=self.views.spatial.padding)
        return made

    def _moved(self, masks: Tensor, maps: Tensor) -> Tensor:
        """The masks (V B, C, *S) of all views at `maps`."""
        padding = self.views.spatial.padding
        repeated = masks.repeat(len(maps) // len(masks), *[1] * (masks.ndim - 1))
        return spatial.resample(repeated, maps.to(masks.device, non_blocking=True), padding=padding, mode="nearest")
