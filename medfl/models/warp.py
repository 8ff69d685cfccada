"""Affine maps and displacement fields in 2D and 3D, in voxels and in the order of the array's axes.

A field u (B, d, *S) moves an image by F'(p) = F(p + u(p)); a field of zeros leaves it as it is, exactly.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATION, SHEAR = math.radians(20), math.radians(10)  # limits of each angle
SCALE, TRANSLATION = 0.25, 0.1  # limits of the change of scale, and of the translation in half sides


def affine_numbers(dims: int) -> tuple[int, int, int, int]:
    """How many numbers rotation, scale, translation and shear take: 3, 3, 3, 6 in 3D and 1, 2, 2, 2 in 2D."""
    return dims * (dims - 1) // 2, dims, dims, dims * (dims - 1)


def bounded_affine(rotation: Tensor, scale: Tensor, translation: Tensor, shear: Tensor) -> Tensor:
    """Affine maps (B, d, d + 1) from any numbers; from zeros the identity [I|0].

    tanh holds angles of rotation to 20 and of shear to 10 degrees, scales to 0.75 to 1.25 and translations to a tenth
    of the half side, all about the centre of the image.

    Args:
        rotation, scale, translation, shear: (B, n) with n as in `affine_numbers`.
    """
    return affine(
        ROTATION * rotation.tanh(),
        1 + SCALE * scale.tanh(),
        TRANSLATION * translation.tanh(),
        SHEAR * shear.tanh(),
    )


def affine(rotation: Tensor, scale: Tensor, translation: Tensor, shear: Tensor) -> Tensor:
    """[R H diag(s) | t] (B, d, d + 1): first scales, then shears, then rotates, then translates.

    Args:
        rotation: angles in radians in the planes of axes (0, 1), (0, 2), (1, 2), from the first axis to the second,
            as one rotation exp(Σ angle · generator).
        scale: factor of each axis.
        translation: along each axis, in half sides.
        shear: angles in radians; the tangents are H's entries off the diagonal, row by row.
    """
    dims = scale.shape[1]
    planes, others = torch.triu_indices(dims, dims, 1), 1 - torch.eye(dims)
    upper = torch.zeros(planes.shape[1], dims, dims)
    upper[range(len(upper)), planes[1], planes[0]] = 1
    off = torch.zeros(dims * (dims - 1), dims, dims)
    off[range(len(off)), *others.nonzero().T] = 1
    with torch.autocast(scale.device.type, enabled=False):
        turn = torch.matrix_exp(torch.tensordot(rotation, (upper - upper.mT).to(scale), dims=1))
        slant = torch.eye(dims).to(scale) + torch.tensordot(shear.tan(), off.to(scale), dims=1)
        return torch.cat([turn @ slant * scale[:, None], translation[..., None]], dim=2)


def positions(sides: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates of every voxel, (1, d, *S)."""
    axes = [torch.arange(side, dtype=like.dtype, device=like.device) for side in sides]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def affine_field(maps: Tensor, points: Tensor) -> Tensor:
    """Displacement (B, d, *S) by which affine maps (B, d, d + 1) move points (B or 1, d, *S) of a grid of sides S."""
    sides = points.shape[2:]
    half = (torch.tensor(sides) - 1).to(points) / 2
    about = points.flatten(2) - half[:, None]
    with torch.autocast(points.device.type, enabled=False):
        moved = maps[..., :-1] @ about + (maps[..., -1] * half)[..., None] - about
    return moved.view(*moved.shape[:2], *sides)


def compose(local: Tensor, maps: Tensor) -> Tensor:
    """One field for "affine map first, then local field": u(p) = u_l(p) + u_A(p + u_l(p))."""
    return local + affine_field(maps, positions(local.shape[2:], local) + local)


def warp(images: Tensor, field: Tensor) -> Tensor:
    """Images (B, C, *S) at p + u(p), interpolated linearly; beyond the border its values go on.

    In float32 or better, also under autocast.
    """
    wide = torch.promote_types(images.dtype, torch.float32)
    field = field.to(wide)
    sides = field.shape[2:]
    span = (torch.tensor(sides) - 1).clamp_min(1).to(field).view(-1, *[1] * len(sides))
    grid = (positions(sides, field) + field) * 2 / span - 1
    return F.grid_sample(
        images.to(wide), grid.flip(1).movedim(1, -1), mode="bilinear", padding_mode="border", align_corners=True
    )


def jacobian(field: Tensor) -> Tensor:
    """Determinant (B, *(S - 1)) of the map p + u(p) by forward differences; not above 0 where it folds."""
    dims = field.shape[1]
    inner = [slice(0, -1)] * dims
    columns = []
    for axis in range(dims):
        step = field.diff(dim=axis + 2)
        columns.append(step[(..., *(slice(None) if other == axis else part for other, part in enumerate(inner)))])
    maps = torch.stack(columns, dim=2) + torch.eye(dims).to(field).view(1, dims, dims, *[1] * dims)  # (B, d, d, ...)
    if dims == 2:
        return maps[:, 0, 0] * maps[:, 1, 1] - maps[:, 0, 1] * maps[:, 1, 0]
    volume: Tensor = (maps[:, 0] * torch.linalg.cross(maps[:, 1], maps[:, 2], dim=1)).sum(1)
    return volume
