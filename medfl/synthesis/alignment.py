"""How alike two images are voxel by voxel, after the best flip, small turn and small shift. 2D and 3D.

An image of the reference set is a template: its centre, as large as leaves room for every shift and for a rim, where
smoothing has mixed in what lies at the border. So nothing that a shift or a turn brought in there is ever compared.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medfl.views.spatial import angles, resample, rotations

SIDE = {2: 32, 3: 20}  # the largest side at which voxels are compared
STRIDE = 3  # voxels averaged to one where all templates are compared
SHIFT = 1 / 8  # of a side, to either direction
RIM = 1  # voxels at every border; where they were compared, copies shifted by all of the margin had an NCC down to .985
TURNS = {2: (-8.0, -4.0, 4.0, 8.0), 3: (-7.0, 7.0)}  # degrees, about each axis
COARSE_TURNS: dict[int, tuple[float, ...]] = {2: (-7.0, 7.0), 3: ()}
FLAT = 1e-3  # of a window's norm per root voxel: below, there is nothing to compare
CHUNK = 16  # images compared with all templates at once
LEFT = 1024  # templates compared at all shifts, or a quarter if that is more; of 4,700, it lost none of the best five
TOGETHER = {2: 8, 3: 1}  # images aligned at once


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
        centre = [(room, 1) for room in _rooms(small)]
        return cls(small, torch.cat([_windows(part, centre)[:, 0] for part in torch.split(small, CHUNK)]))


def prepared(images: Tensor) -> Tensor:
    """Images at the side at which they are compared, smoothed by about one voxel of it against noise.

    The smoothing comes before the resampling: so a shift by a part of a voxel stays a shift.
    """
    size, dims = images.shape[2:], images.ndim - 2
    factor = max(1.0, max(size) / SIDE[dims])
    if int(factor) > 1:
        pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
        images = pool(images, [min(int(factor), side) for side in size])
    rest = factor / int(factor)  # below 2
    images = _smoothed(images, passes=math.ceil(2 * rest**2))
    if rest > 1:
        small = [max(1, round(side / factor)) for side in size]
        images = F.interpolate(images, small, mode="bilinear" if dims == 2 else "trilinear")
    return images


def likeliest(images: Tensor, templates: Templates, count: int) -> Tensor:
    """The `count` templates most alike at a coarse resolution, (B, count).

    All of them are compared at every other shift, which no shift is farther from than a voxel along each axis, and the
    best of those at all shifts.
    """
    rows, dims = templates.rows, images.ndim - 2
    count, left = min(count, len(rows)), min(len(rows), max(LEFT, len(rows) // 4))
    found = []
    for part in torch.split(prepared(images), CHUNK):
        shifts = margins(part)
        spans = [(room - margin, 2 * margin + 1) for room, margin in zip(_rooms(part), shifts, strict=True)]
        sparse = _every_other(shifts).to(part.device)
        windows = [_windows(variant, spans) for variant in variants(part, COARSE_TURNS[dims])]  # (B, W, D) each
        best = part.new_full((len(part), len(rows)), -1.0)
        for each in windows:
            best = torch.maximum(best, (each[:, sparse] @ rows.T).amax(dim=1))
        for every, near in zip(torch.cat(windows, dim=1), best.topk(left, dim=1).indices, strict=True):
            found.append(near[(every @ rows[near].T).amax(dim=0).topk(count).indices])
    return torch.stack(found) if found else torch.empty(0, count, dtype=torch.int64)


def aligned(images: Tensor, templates: Templates, choice: Tensor) -> Tensor:
    """NCC (B, K) of each image with the templates `choice` (B, K), at the best flip, turn and shift."""
    dims = images.ndim - 2
    parts = (torch.split(each, TOGETHER[dims]) for each in (prepared(images), choice.to(images.device)))
    found = [
        _correlation(torch.stack(list(variants(part, TURNS[dims])), dim=1), templates.images[rows]).amax(dim=1)
        for part, rows in zip(*parts, strict=True)
        if len(part)
    ]
    return torch.cat(found) if found else torch.empty(choice.shape)


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


def _rooms(images: Tensor) -> list[int]:
    """Voxels between a template and the border, by axis."""
    return [margin + RIM if margin else 0 for margin in margins(images)]


def _every_other(shifts: Sequence[int]) -> Tensor:
    """Places of the odd ones among the shifts 0, ..., 2 * margin of each axis, in the order of `_windows`.

    All of a margin of one: its images are so small that one voxel is much.
    """
    odd = [(torch.arange(2 * margin + 1) % 2 == 1) | (margin < 2) for margin in shifts]
    return torch.stack(torch.meshgrid(*odd, indexing="ij")).all(dim=0).flatten().nonzero()[:, 0]


def _smoothed(images: Tensor, *, passes: int) -> Tensor:
    """Each pass is (1, 2, 1) / 4 along every axis: a variance of half a voxel; the border repeats."""
    for axis in range(2, images.ndim):
        side = images.shape[axis]
        at = torch.arange(side, device=images.device)
        before, after = ((at + step).clamp(0, side - 1) for step in (-1, 1))
        for _ in range(passes):
            images = images / 2 + (images.index_select(axis, before) + images.index_select(axis, after)) / 4
    return images


def _windows(images: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Unit rows (B, W, D): the coarse windows that start at `first, ..., first + count - 1` along each axis."""
    dims = images.ndim - 2
    steps = [STRIDE if side >= 4 * STRIDE else 1 for side in images.shape[2:]]
    pooled = (F.avg_pool2d if dims == 2 else F.avg_pool3d)(images, steps, stride=1)
    for k, ((first, count), step, room) in enumerate(zip(spans, steps, _rooms(images), strict=True)):
        length = (images.shape[2 + k] - 2 * room - step) // step * step + 1
        starts = pooled.narrow(2 + k, first, count + length - 1).unfold(2 + k, length, 1)
        pooled = starts[..., ::step]
    pooled = pooled.movedim(1, 1 + dims).flatten(1, dims).flatten(3)  # (B, W, C, D / C)
    return _unit((pooled - pooled.mean(dim=3, keepdim=True)).flatten(2))


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; of a constant window, zeros."""
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > FLAT * rows.shape[-1] ** 0.5, rows / norm.clamp_min(1e-12), 0.0)


def _correlation(images: Tensor, references: Tensor) -> Tensor:
    """Zero-mean normalised cross-correlation (B, V, K) of images (B, V, C, *s) with the centres of (B, K, C, *s).

    The largest over all shifts, exact: numerators by FFT, where the zeros around a centre leave no wrap-around;
    denominators from the mean and mean square below the centre.
    """
    shifts, rooms, size = margins(images[0]), _rooms(images[0]), images.shape[3:]
    axes = list(range(3, images.ndim))
    centre = references
    for axis, room in zip(axes, rooms, strict=True):
        centre = centre.narrow(axis, room, references.shape[axis] - 2 * room)
    centred = centre - centre.mean(dim=axes, keepdim=True)
    unit = _unit(centred.flatten(2)).view_as(centre)
    padded = F.pad(unit, [room for room in reversed(rooms) for _ in range(2)])
    product = torch.fft.rfftn(images, dim=axes)[:, :, None] * torch.fft.rfftn(padded, dim=axes).conj()[:, None]
    top = torch.fft.irfftn(product.sum(dim=3), s=size, dim=axes)  # (B, V, K, *s)
    for axis, margin in zip(axes, shifts, strict=True):
        top = top.index_select(axis, torch.arange(-margin, margin + 1, device=top.device) % size[axis - 3])
    for axis, margin, room in zip(axes, shifts, rooms, strict=True):
        images = images.narrow(axis, room - margin, size[axis - 3] - 2 * (room - margin))
    mean, square = (_window_means(power, centre.shape[3:]) for power in (images, images.square()))
    count = centre[0, 0, 0].numel()
    bottom = ((square - mean.square()).clamp_min(0).sum(dim=2) * count).sqrt()[:, :, None]  # (B, V, 1, *shifts)
    flat = bottom <= FLAT * (count * images.shape[2]) ** 0.5
    return _peak(torch.where(flat, 0.0, top / bottom.clamp_min(1e-12)))


def _peak(maps: Tensor) -> Tensor:
    """The largest value (B, V, K) of maps (B, V, K, *shifts) between the shifts too: a parabola along each axis."""
    best = maps
    for axis in range(3, maps.ndim):
        inner = maps.shape[axis] - 2
        if inner < 1:
            continue
        left, middle, right = (maps.narrow(axis, start, inner) for start in range(3))
        bend = 2 * middle - left - right
        top = (middle >= left) & (middle >= right) & (bend > 0)
        gain = torch.where(top, (left - right).square() / (8 * bend.clamp_min(1e-12)), 0.0)
        best = best + F.pad(gain, [0, 0] * (maps.ndim - 1 - axis) + [1, 1])
    return best.flatten(3).amax(dim=3).clamp_max(1.0)


def _window_means(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Means over every window of the size, as `avg_pool` with stride 1; one axis at a time, much faster in 3D."""
    for axis, side in enumerate(size, start=maps.ndim - len(size)):
        sums = F.pad(maps.cumsum(axis), [0, 0] * (maps.ndim - 1 - axis) + [1, 0])
        count = maps.shape[axis] - side + 1
        maps = (sums.narrow(axis, side, count) - sums.narrow(axis, 0, count)) / side
    return maps
