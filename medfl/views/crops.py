"""Crops of multi-modal scans, cut at random and often around the lesion: grey values stay as they are."""

import functools

import torch
from torch import Tensor

from medfl.data.sample import UNLABELLED, number, require, whole
from medfl.views import compose

KEPT = 2  # modalities that are never dropped


class Crops:
    """Random crops of a batch, mirrored and without some modalities by chance; the contract is that of `Views`.

    Args:
        channels: modalities M, the first channels. Further ones, such as a mask, are cropped and mirrored alike.
        size: side of the crop along the first two axes, voxels; a shorter axis stays whole.
        depth: along the last axis in 3D; null: as `size`.
        foreground: chance that a crop is centred on a voxel where the last further channel is above 0 and known;
            else, and where there is none, on a voxel where a modality is not 0.
        dropout: chance that a modality is zeroed, for each that the image has; two, or all it has, are kept.
        flip: chance of mirroring the first axis (left and right).

    Raises:
        ConfigError: a setting that cannot be used.
    """

    keeps_masks = True

    def __init__(
        self, *, channels: int, size: int, depth: int | None, foreground: float, dropout: float, flip: float
    ) -> None:
        shares = {"foreground": foreground, "dropout": dropout, "flip": flip}
        require(
            "views",
            {
                "channels": (channels, whole(channels), "an integer of at least 1"),
                "size": (size, whole(size), "an integer of at least 1"),
                "depth": (depth, depth is None or whole(depth), "an integer of at least 1, or null"),
                **{name: (got, number(got) and got <= 1, "a chance from 0 to 1") for name, got in shares.items()},
            },
        )
        self.channels, self.size, self.depth = channels, size, depth
        self.foreground, self.dropout, self.flip = foreground, dropout, flip

    @torch.no_grad()
    def __call__(self, images: Tensor, *, key: int, count: int = 1) -> list[Tensor]:
        """`count` crops, each (B, C, *crop), of images (B, C, H, W) or (B, C, H, W, D), float32 on any device.

        Raises:
            ValueError: images of another type or shape, fewer channels than modalities, or no view asked for.
        """
        compose.refuse_images(images)
        if images.shape[1] < self.channels:
            raise ValueError(f"crops: got {images.shape[1]} channels, need the {self.channels} modalities or more.")
        columns, _ = compose.uniforms(len(images), 3 + self.channels, key=key, count=count)
        drawn = torch.stack([next(columns) for _ in range(3 + self.channels)]).to(images.device)
        gate, place, mirror, *drop = drawn.view(-1, count, len(images))
        seen = images[:, : self.channels].ne(0)
        centres = self._centres(images, seen, gate < self.foreground, place)
        kept = self._kept(seen.flatten(2).any(2), torch.stack(drop, dim=-1))
        mirrored = mirror < self.flip
        return [self._view(images, *parts) for parts in zip(centres, kept, mirrored, strict=True)]

    def _centres(self, images: Tensor, seen: Tensor, lesion_wanted: Tensor, place: Tensor) -> Tensor:
        """Flat index (V, B) of the voxel in the middle of each crop, for (V, B) gates and uniforms.

        Args:
            seen: (B, M, *S), where a modality is not 0.
        """
        # by hand: any(1) takes three times as long
        inside = functools.reduce(torch.logical_or, seen.unbind(1)).flatten(1)  # (B, P)
        inside = inside | ~inside.any(1, keepdim=True)  # an image of zeros: anywhere
        centres = _pick(inside, place)
        if images.shape[1] == self.channels:
            return centres
        last = images[:, -1].flatten(1)
        lesion = (last > 0) & (last != UNLABELLED)
        return torch.where(lesion_wanted & lesion.any(1), _pick(lesion, place), centres)

    def _kept(self, had: Tensor, uniform: Tensor) -> Tensor:
        """Which modalities stay, (V, B, M), of those that the images have (B, M)."""
        ranked = uniform.masked_fill(~had, -1).argsort(dim=-1, descending=True, stable=True)
        first = ranked.argsort(dim=-1) < KEPT
        return had & (first | (uniform >= self.dropout))

    def _view(self, images: Tensor, centres: Tensor, kept: Tensor, mirrored: Tensor) -> Tensor:
        grid = images.shape[2:]
        sides = [min(side, length) for side, length in zip(self._sides(len(grid)), grid, strict=True)]
        middles = torch.stack(torch.unravel_index(centres, grid), dim=1).tolist()
        crops = torch.stack([_cut(image, middle, sides) for image, middle in zip(images, middles, strict=True)])
        crops[:, : self.channels].mul_(kept.view(*kept.shape, *[1] * len(grid)))
        return torch.where(mirrored.view(-1, *[1] * (crops.ndim - 1)), crops.flip(2), crops)

    def _sides(self, dims: int) -> tuple[int, ...]:
        return (self.size, self.size, self.depth or self.size)[:dims]


def _pick(chosen: Tensor, uniform: Tensor) -> Tensor:
    """Flat index (V, B) of one of the true voxels of (B, P), for uniforms (V, B); of a row without any, the last."""
    counted = chosen.cumsum(1, dtype=torch.int32)  # int64 takes eight times as long
    wanted = 1 + (uniform.T.double() * counted[:, -1:]).int()  # (B, V)
    return torch.searchsorted(counted, wanted.contiguous()).clamp_max(chosen.shape[1] - 1).T


def _cut(image: Tensor, middle: list[int], sides: list[int]) -> Tensor:
    """The part (C, *sides) of an image (C, *S) around a voxel, moved inside where it would stick out."""
    for axis, (centre, side) in enumerate(zip(middle, sides, strict=True), start=1):
        start = min(max(centre - side // 2, 0), image.shape[axis] - side)
        image = image.narrow(axis, start, side)
    return image
