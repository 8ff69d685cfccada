"""Reading one label map: file -> labels on the stored grid of its image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfl.data import volume
from medfl.data.volume import Scan
from medfl.errors import DataError

NOISY = (".jpg", ".jpeg")  # compression blurs what was a label
NOISE = 48.0  # grey values by which compression may part the channels of a grey JPEG file
ROUNDING = 1e-3  # of labels stored with a scale factor
SAME_PLACE = 1e-2  # mm by which affines of one grid may differ


def read(path: Path, values: Sequence[int], *, image: Scan, image_path: Path) -> Tensor:
    """Labels (*S) uint8 in the axes of the image: 0, or the place, from 1, of a stored value among `values`.

    JPEG files hold the nearest of 0 and the values. Palettes are numbers, not colours.

    Args:
        values: ascending, above 0.

    Raises:
        DataError: a file that cannot be used, a value that is not among `values`, or another grid than the image's.
    """
    scan = volume.stored(path, image.pixels.ndim - 1, _reader)
    _check_grid(scan, path, image, image_path)
    stored, levels = _single(scan.pixels, path).contiguous(), torch.tensor([0.0, *values])
    labels = torch.bucketize(stored, (levels[1:] + levels[:-1]) / 2)
    strange = stored[(stored - levels[labels]).abs() > ROUNDING]
    if len(strange) and not _noisy(path):
        known = ", ".join(f"{level:g}" for level in levels)
        raise DataError(
            f"{path}: holds the value {float(strange[0]):g}, data.regions and the background have {known}. "
            "Add it to a region, or correct the mask."
        )
    return labels.to(torch.uint8)


def _reader(path: Path) -> Scan:
    name = path.name.lower()
    if name.endswith(volume.NIFTI):
        return volume.nifti(path)
    if name.endswith(volume.PHOTOGRAPHS):
        return volume.photograph(path, _numbers)
    raise DataError(f"{path}: unknown format of a mask. Need {', '.join((*volume.PHOTOGRAPHS, *volume.NIFTI))}.")


def _numbers(image: Any) -> Any:
    return image if image.mode == "P" else volume.plain_mode(image)


def _noisy(path: Path) -> bool:
    return path.name.lower().endswith(NOISY)


def _single(pixels: Tensor, path: Path) -> Tensor:
    """The one channel (*S) of a mask (C, *S), which may be repeated."""
    spread = float((pixels.amax(0) - pixels.amin(0)).max())
    if spread > (NOISE if _noisy(path) else 0):
        raise DataError(f"{path}: got {len(pixels)} different channels, need one number per voxel. Convert the mask.")
    return pixels.mean(0) if spread else pixels[0]


def _check_grid(mask: Scan, path: Path, image: Scan, image_path: Path) -> None:
    same = mask.pixels.shape[1:] == image.pixels.shape[1:]
    if mask.affine is not None and image.affine is not None:
        same = same and np.allclose(mask.affine, image.affine, atol=SAME_PLACE)
    if not same:
        raise DataError(
            f"{path}: has the grid {_grid(mask)}, its image {image_path} has {_grid(image)}. "
            "Resample the mask onto the image."
        )


def _grid(scan: Scan) -> str:
    sides = " x ".join(map(str, scan.pixels.shape[1:]))
    return sides if scan.affine is None else f"{sides} with the affine {scan.affine[:3].round(3).tolist()}"
