"""How alike two images are voxel by voxel, after the best flip, small turn and small shift. 2D and 3D.

An image of the reference set is a template: its centre, as large as leaves room for every shift. So nothing that a
shift or a turn brought in at the border is ever compared.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medfl.views.spatial import angles, resample, rotations

SIDE = {2: 32, 3: 24}  # the largest side at which voxels are compared
STRIDE = 3  # voxels averaged to one where all templates are compared
SHIFT = 1 / 8  # of a side, to either direction
TURNS = {2: (-8.0, -4.0, 4.0, 8.0), 3: (-7.0, 7.0)}  # degrees, about each axis
COARSE_TURNS: dict[int, tuple[float, ...]] = {2: (-7.0, 7.0), 3: ()}
FLAT = 1e-3  # of a window's norm per root voxel: below, there is nothing to compare
CHUNK = 16  # images compared with all templates at once


@dataclass(frozen=True)
class Templates:
    """A reference set, ready to be compared with.

    Attributes:
        images: (n, C, *s), as `prepared` gives them.
        rows: (n, D) unit rows, the coarse templates.
    """

    images: Tensor
    rows: Tensor

    @classmethod
    def of(cls, images: Tensor) -> "Templates":
        """Templates of images (n, C, *S) in [-1, 1]."""
        small = prepared(images)
        centre = [(margin, 1) for margin in margins(small)]
        return cls(small, torch.cat([_windows(part, centre)[:, 0] for part in torch.split(small, CHUNK)]))


def prepared(images: Tensor) -> Tensor:
    """Images at the side at which they are compared, smoothed by about one voxel against noise."""
    size, dims = images.shape[2:], images.ndim - 2
    scale = min(1.0, SIDE[dims] / max(size))
    if scale < 1:
        images = F.interpolate(images, [max(1, round(side * scale)) for side in size], mode="area")
    for axis in range(2, images.ndim):
        side = images.shape[axis]
        for _ in range(2):  # twice (1, 2, 1) / 4: a deviation of one voxel
            at = torch.arange(side, device=images.device)
            before, after = ((at + step).clamp(0, side - 1) for step in (-1, 1))
            images = images / 2 + (images.index_select(axis, before) + images.index_select(axis, after)) / 4
    return images


def likeliest(images: Tensor, templates: Templates, count: int) -> Tensor:
    """The `count` templates most alike at a coarse resolution, (B, count): all of them are compared, at all shifts."""
    dims, count = images.ndim - 2, min(count, len(templates.rows))
    found = []
    for part in torch.split(prepared(images), CHUNK):
        spans = [(0, 2 * margin + 1) for margin in margins(part)]
        best = part.new_full((len(part), len(templates.rows)), -1.0)
        for variant in variants(part, COARSE_TURNS[dims]):
            best = torch.maximum(best, (_windows(variant, spans) @ templates.rows.T).amax(dim=1))
        found.append(best.topk(count, dim=1).indices)
    return torch.cat(found) if found else torch.empty(0, count, dtype=torch.int64)


def aligned(images: Tensor, templates: Templates, choice: Tensor) -> Tensor:
    """NCC (B, K) of each image with the templates `choice` (B, K), at the best flip, turn and shift."""
    found = [
        _correlation(torch.cat(list(variants(image[None], TURNS[images.ndim - 2]))), templates.images[row]).amax(dim=0)
        for image, row in zip(prepared(images), choice.to(images.device), strict=True)
    ]
    return torch.stack(found) if found else torch.empty(choice.shape)


def variants(images: Tensor, turns: Sequence[float]) -> Iterator[Tensor]:
    """The images unturned and turned by each angle about each axis, each of these in every mirror image."""
    axes = range(2, images.ndim)
    subsets = [part for count in range(len(axes) + 1) for part in itertools.combinations(axes, count)]
    steps = [(0, 0.0), *itertools.product(range(angles(len(axes))), turns)]
    for axis, degrees in steps:
        turned_by = moved(images, axis=axis, degrees=degrees) if degrees else images
        yield from (turned_by.flip(part) if part else turned_by for part in subsets)


def margins(images: Tensor) -> list[int]:
    """The largest shift of each axis, in voxels."""
    return [int(side * SHIFT) for side in images.shape[2:]]


def moved(images: Tensor, *, axis: int = 0, degrees: float = 0.0, zoom: float = 1.0) -> Tensor:
    """Images (B, C, *S) turned about one axis (2D: the only one) and enlarged by `zoom`; the border repeats."""
    dims = images.ndim - 2
    turn = torch.zeros(1, angles(dims))
    turn[0, axis] = math.radians(degrees)
    maps = torch.cat([rotations(turn) / zoom, torch.zeros(1, dims, 1)], dim=2).to(images.device)
    return resample(images, maps.expand(len(images), -1, -1), padding="border")


def _windows(images: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Unit rows (B, W, D): the coarse windows that start at `first, ..., first + count - 1` along each axis."""
    dims = images.ndim - 2
    room = margins(images)
    steps = [STRIDE if side >= 4 * STRIDE else 1 for side in images.shape[2:]]
    pooled = (F.avg_pool2d if dims == 2 else F.avg_pool3d)(images, steps, stride=1)
    for k, ((first, count), step, margin) in enumerate(zip(spans, steps, room, strict=True)):
        length = (images.shape[2 + k] - 2 * margin - step) // step * step + 1
        starts = pooled.narrow(2 + k, first, count + length - 1).unfold(2 + k, length, 1)
        pooled = starts[..., ::step]
    pooled = pooled.movedim(1, 1 + dims).flatten(1, dims).flatten(3)  # (B, W, C, D / C)
    return _unit((pooled - pooled.mean(dim=3, keepdim=True)).flatten(2))


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; of a constant window, zeros."""
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > FLAT * rows.shape[-1] ** 0.5, rows / norm.clamp_min(1e-12), 0.0)


def _correlation(images: Tensor, references: Tensor) -> Tensor:
    """Zero-mean normalised cross-correlation (V, K) of images (V, C, *s) with the centres of references (K, C, *s).

    The largest over all shifts, exact: numerators by FFT, where the zeros around a centre leave no wrap-around;
    denominators from the mean and mean square below the centre.
    """
    room, size = margins(images), images.shape[2:]
    axes = list(range(2, images.ndim))
    centre = references
    for axis, margin in zip(axes, room, strict=True):
        centre = centre.narrow(axis, margin, references.shape[axis] - 2 * margin)
    centred = centre - centre.mean(dim=axes, keepdim=True)
    unit = _unit(centred.flatten(1)).view_as(centre)
    padded = F.pad(unit, [margin for margin in reversed(room) for _ in range(2)])
    product = torch.fft.rfftn(images, dim=axes)[:, None] * torch.fft.rfftn(padded, dim=axes).conj()[None]
    top = torch.fft.irfftn(product.sum(dim=2), s=size, dim=axes)  # (V, K, *s)
    for axis, margin in zip(axes, room, strict=True):
        top = top.index_select(axis, torch.arange(-margin, margin + 1, device=top.device) % size[axis - 2])
    pool = F.avg_pool2d if len(size) == 2 else F.avg_pool3d
    mean, square = (pool(power, centre.shape[2:], stride=1) for power in (images, images.square()))
    count = centre[0, 0].numel()
    bottom = ((square - mean.square()).clamp_min(0).sum(dim=1) * count).sqrt()[:, None]  # (V, 1, *shifts)
    flat = bottom <= FLAT * (count * images.shape[1]) ** 0.5
    return torch.where(flat, 0.0, top / bottom.clamp_min(1e-12)).flatten(2).amax(dim=2)
