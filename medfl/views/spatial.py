"""The spatial part of a view: flips, rotation, resized crop and translation folded into one affine resampling.

Coordinates are voxels counted from the centre of the grid, in the order of the tensor's axes. A rotation is one of
the voxel grid: with strongly anisotropic voxels it shears the anatomy, so resample to near-isotropic spacing first.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medfl.errors import ConfigError
from medfl.views.chance import Chance

PADDINGS = ("border", "zeros")


class Spatial:
    """What is drawn for the spatial part; see `configs/views/default.yaml` for units and defaults.

    Args:
        flip: probability of mirroring, for each axis by itself.
        rotation: degrees; one angle in 2D, one about each axis in 3D.
        crop: side of the crop as a fraction of the image's side; it is placed uniformly and resized to the full grid.
        translation: shift of each axis as a fraction of its side, on top of the crop's place.
        padding: what lies outside the image, "border" (the nearest voxel) or "zeros".

    Raises:
        ConfigError: a probability, bound or padding that cannot be used.
    """

    def __init__(
        self,
        *,
        flip: float,
        rotation: Mapping[str, float],
        crop: Mapping[str, float],
        translation: Mapping[str, float],
        padding: str,
    ) -> None:
        if padding not in PADDINGS:
            raise ConfigError(f"views.spatial.padding: got {padding!r}, need one of {', '.join(PADDINGS)}.")
        self.flip = Chance(probability=flip, low=-1.0, high=-1.0)
        self.rotation = Chance(**rotation).within("rotation", lowest=-180, highest=180)
        self.crop = Chance(**crop).within("crop", lowest=0.01, highest=1)
        self.translation = Chance(**translation).within("translation", lowest=-1, highest=1)
        self.padding = padding

    def columns(self, dims: int) -> int:
        """How many uniform columns `draw` takes."""
        return 2 * dims + (1 + angles(dims)) + 2 + dims + (1 + dims)

    def draw(self, columns: Iterator[Tensor], size: Sequence[int]) -> Tensor:
        """Maps (R, d, d + 1) from a view's voxel to the image's: `source = A[:, :d] @ voxel + A[:, d]`."""
        dims, sides = len(size), torch.tensor(size, dtype=torch.float32)
        signs = torch.cat([self.flip.draw(columns, identity=1.0) for _ in size], dim=1)  # (R, d)
        turn = rotations(torch.deg2rad(self.rotation.draw(columns, identity=0.0, count=angles(dims))))
        side = self.crop.draw(columns, identity=1.0)  # (R, 1)
        place = torch.stack([next(columns) for _ in size], dim=1) * 2 - 1  # (R, d)
        shift = place * (1 - side) * sides / 2 + self.translation.draw(columns, identity=0.0, count=dims) * sides
        return torch.cat([(side * signs)[:, :, None] * turn, shift[:, :, None]], dim=2)


def angles(dims: int) -> int:
    """The number of rotation angles: one in 2D, three in 3D."""
    return 1 if dims == 2 else 3


def rotations(radians: Tensor) -> Tensor:
    """Rotation matrices: (R, 1) -> (R, 2, 2); (R, 3) -> (R, 3, 3), about the last axis first."""
    cos, sin = radians.cos(), radians.sin()
    if radians.shape[1] == 1:
        return torch.stack([cos, -sin, sin, cos], dim=2).view(-1, 2, 2)
    turn = torch.eye(3).expand(len(radians), 3, 3)
    for axis in range(3):
        first, second = (other for other in range(3) if other != axis)
        about = torch.eye(3).repeat(len(radians), 1, 1)
        about[:, first, first] = about[:, second, second] = cos[:, axis]
        about[:, first, second], about[:, second, first] = -sin[:, axis], sin[:, axis]
        turn = turn @ about
    return turn


def resample(images: Tensor, maps: Tensor, *, padding: str, mode: str = "bilinear") -> Tensor:
    """The reference: bi- or trilinear values, or the nearest, of images (R, C, *S) at `maps` (R, d, d + 1)."""
    sides = torch.tensor(images.shape[2:], dtype=torch.float32)
    dims = len(sides)
    # From voxels to [-1, 1] of each axis; torch counts the axes from the last.
    scale = torch.cat([sides, torch.tensor([2.0])]) / sides[:, None]
    theta = maps * scale.to(maps.device, non_blocking=True)
    theta = torch.cat([theta[:, :, :dims].flip(1, 2), theta[:, :, dims:].flip(1)], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode=mode, padding_mode=padding, align_corners=False)
