"""Crops of multi-modal scans, cut at random and often around the lesion: grey values stay as they are."""

import torch
from torch import Tensor

from medfl.data.sample import UNLABELLED, number, require, whole
from medfl.views import compose

KEPT = 2  # modalities that are never dropped
TRIES = 48  # voxels that are looked at before all are


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
        needed = 3 + self.channels + TRIES
        columns, _ = compose.uniforms(len(images), needed, key=key, count=count)
        drawn = torch.stack([next(columns) for _ in range(needed)]).to(images.device, non_blocking=True)
        gate, place, mirror, *rest = drawn.view(-1, count, len(images))
        drop, tried = rest[: self.channels], torch.stack(rest[self.channels :], dim=-1)
        flat = images.flatten(2)  # (B, C, P)
        at = (tried.double() * flat.shape[2]).long().clamp_max(flat.shape[2] - 1)  # (V, B, TRIES)
        values = flat.gather(2, at.transpose(0, 1).flatten(1)[:, None].expand(-1, flat.shape[1], -1))
        values = values.view(*flat.shape[:2], count, TRIES)
        centres = self._centres(flat, at, values, gate < self.foreground, place)
        kept = self._kept(self._had(flat, values), torch.stack(drop, dim=-1))
        mirrored = mirror < self.flip
        return [self._view(images, *parts) for parts in zip(centres, kept, mirrored, strict=True)]

    def _centres(self, flat: Tensor, at: Tensor, values: Tensor, lesion_wanted: Tensor, place: Tensor) -> Tensor:
        """Flat index (V, B) of the voxel in the middle of each crop: one of the allowed voxels, all alike.

        The first of a few tried voxels that is allowed, which is such a draw; only where none is, all are looked at.

        Args:
            flat: images (B, C, P).
            at: tried voxels (V, B, TRIES), with their values (B, C, V, TRIES).
            lesion_wanted, place: (V, B); `place` draws where all voxels are looked at.
        """
        centres, found = _first(at, (values[:, : self.channels] != 0).any(1).transpose(0, 1))
        for view, image in (~found).nonzero().tolist():
            inside = (flat[image, : self.channels] != 0).any(0)  # an image of zeros: anywhere
            centres[view, image] = _pick(inside if bool(inside.any()) else torch.ones_like(inside), place[view, image])
        if flat.shape[1] == self.channels:
            return centres
        at_lesion, found = _first(at, _lesion(values[:, -1]).transpose(0, 1))
        for view, image in (lesion_wanted & ~found).nonzero().tolist():
            if bool((lesion := _lesion(flat[image, -1])).any()):
                at_lesion[view, image], found[view, image] = _pick(lesion, place[view, image]), True
        return torch.where(lesion_wanted & found, at_lesion, centres)

    def _had(self, flat: Tensor, values: Tensor) -> Tensor:
        """Which modalities the images have, (B, M): those with a voxel that is not 0."""
        had = (values[:, : self.channels] != 0).flatten(2).any(2)
        image, channel = (~had).nonzero().unbind(1)
        had[image, channel] = (flat[image, channel] != 0).any(1)
        return had

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


def _lesion(labels: Tensor) -> Tensor:
    return (labels > 0) & (labels != UNLABELLED)


def _first(at: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The first allowed one of tried voxels (V, B, T), and whether there is one: both (V, B)."""
    place = allowed.byte().argmax(2, keepdim=True)  # of equal ones the first
    return at.gather(2, place).squeeze(2), allowed.any(2)


def _pick(chosen: Tensor, uniform: Tensor) -> Tensor:
    """Index () of one of the true voxels (P,), of which there is one at least, for a uniform ()."""
    counted = chosen.cumsum(0, dtype=torch.int32)  # int64 takes eight times as long
    wanted = 1 + (uniform.double() * counted[-1]).int()
    return torch.searchsorted(counted, wanted).clamp_max(len(chosen) - 1)


def _cut(image: Tensor, middle: list[int], sides: list[int]) -> Tensor:
    """The part (C, *sides) of an image (C, *S) around a voxel, moved inside where it would stick out."""
    for axis, (centre, side) in enumerate(zip(middle, sides, strict=True), start=1):
        start = min(max(centre - side // 2, 0), image.shape[axis] - side)
        image = image.narrow(axis, start, side)
    return image
