"""Reading one scan and bringing it to the common grid: file -> (C, *S) raw values -> intensities -> grid.

Everything here knows one scan, not the data set. MONAI reads PNG, JPEG and NIfTI; DICOM is read by an allow-list
of tags (`medfl.data.dicom`).
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfl.data import dicom
from medfl.errors import DataError

NIFTI = (".nii", ".nii.gz")
PHOTOGRAPHS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
NORMALIZATIONS = ("percentile", "range", "zscore")
SAME = 1e-3  # by which a step of one voxel may differ from it
ASIDE = 1e-3  # voxels; else all voxels halfway between a label and the background would go to the background
PREAMBLE, MAGIC = 128, b"DICM"  # how a DICOM file begins
ZSCORE_LIMIT = 3.0  # standard deviations that become -1 and 1


class Scan(NamedTuple):
    """One file as stored. 2D is (H, W) with row 0 at the top; 3D is turned to RAS axes."""

    pixels: Tensor  # (C, *S) float32
    spacing: tuple[float, ...]  # mm; 1.0 where the format has none
    affine: NDArray[Any] | None = None  # (4, 4), from voxels to mm, where the format has one


def read(path: Path, spatial_dims: int) -> Scan:
    """One image: a photograph, a DICOM file, NIfTI, or a folder of DICOM slices.

    Raises:
        DataError: as of `stored`, or a constant image.
    """
    scan = stored(path, spatial_dims, decoded)
    if bool((scan.pixels == scan.pixels.flatten()[0]).all()):
        raise DataError(f"{path}: is constant (every value is {float(scan.pixels.flatten()[0]):g}). Leave it out.")
    return scan


def stored(path: Path, spatial_dims: int, reader: Callable[[Path], Scan]) -> Scan:
    """What a reader makes of a file.

    Raises:
        DataError: as of `opened`, of other dimensions or not finite.
    """
    scan = opened(path, reader)
    if scan.pixels.ndim != spatial_dims + 1:
        raise DataError(
            f"{path}: got an image of {scan.pixels.ndim - 1} dimensions, need {spatial_dims}. Set data.spatial_dims."
        )
    if not bool(torch.isfinite(scan.pixels).all()):
        raise DataError(f"{path}: holds NaN or infinite values. Repair the image or leave it out.")
    return scan


def opened(path: Path, reader: Callable[[Path], Scan]) -> Scan:
    """What a reader makes of a file, whatever its dimensions and values.

    Raises:
        DataError: the file is missing, of an unknown format or damaged.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file. Correct the data list or data.root.")
    try:
        return reader(path)
    except DataError:
        raise
    except Exception as error:  # the decoders raise whatever they like; the cause is always the file
        first = str(error).strip().splitlines()[:1]
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {''.join(first)}). Replace it.") from error


def decoded(path: Path) -> Scan:
    """What the file holds, whatever it is."""
    name = path.name.lower()
    if path.is_dir():
        return _dicom(path)
    if name.endswith(PHOTOGRAPHS):
        return photograph(path, plain_mode)
    if name.endswith(NIFTI):
        return nifti(path)
    if is_dicom(path):
        return _dicom(path)
    raise DataError(f"{path}: unknown format. Need {', '.join(PHOTOGRAPHS)}, .nii, .nii.gz, .dcm or a DICOM folder.")


def is_dicom(path: Path) -> bool:
    """Whether a path is read as DICOM: by its ending, or by its first bytes, as scanners name files by numbers."""
    name = path.name.lower()
    if path.is_dir() or name.endswith((".dcm", ".dicom")):
        return True
    if name.endswith((*PHOTOGRAPHS, *NIFTI)) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(PREAMBLE + len(MAGIC)).endswith(MAGIC)


def photograph(path: Path, convert: Callable[[Any], Any]) -> Scan:
    """A PNG, JPEG, BMP or TIFF file, its PIL image converted first."""
    from monai.data.image_reader import PILReader

    reader = PILReader(converter=convert, reverse_indexing=False)
    pixels, _ = reader.get_data(reader.read(path))
    tensor = torch.from_numpy(np.asarray(pixels).astype(np.float32))
    return Scan(tensor[None] if tensor.ndim == 2 else tensor.movedim(-1, 0), (1.0, 1.0))


def plain_mode(image: Any) -> Any:
    """Palettes become colours, an alpha channel is dropped."""
    modes = {"P": "RGB", "RGBA": "RGB", "PA": "RGB", "LA": "L", "1": "L", "CMYK": "RGB", "YCbCr": "RGB"}
    return image.convert(modes[image.mode]) if image.mode in modes else image


def nifti(path: Path) -> Scan:
    """A volume or plane with its affine."""
    from monai.data.image_reader import NibabelReader

    return _upright(NibabelReader(), path)


def _upright(reader: Any, path: Path) -> Scan:
    """What a reader of volumes gives, turned to RAS axes."""
    pixels, header = reader.get_data(reader.read(path))
    image = torch.from_numpy(np.asarray(pixels).astype(np.float32))
    last = header["original_channel_dim"] in (-1, image.ndim - 1)
    return _turned(image.movedim(-1, 0) if last else image[None], np.asarray(header["affine"], dtype=np.float64))


def _turned(image: Tensor, affine: NDArray[Any]) -> Scan:
    """An image (C, *S) with its affine; volumes in RAS axes."""
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Orientation

    if image.ndim == 4:
        turned: Any = Orientation(axcodes="RAS", labels=None)(MetaTensor(image, affine=torch.as_tensor(affine)))
        image, affine = torch.from_numpy(np.asarray(turned)), np.asarray(turned.affine)
    return Scan(image, tuple(float(mm) for mm in np.linalg.norm(affine[:3, : image.ndim - 1], axis=0)), affine)


def _dicom(path: Path) -> Scan:
    return of_dicom(dicom.read(path))


def of_dicom(found: dicom.Stored) -> Scan:
    """A file, or the series in a folder; several frames without a known place stay in their order."""
    tensor = torch.from_numpy(np.ascontiguousarray(found.pixels))
    tensor = tensor.movedim(-1, 0) if found.colour else tensor[None]
    return Scan(tensor, found.spacing) if found.affine is None else _turned(tensor, found.affine)


def match_channels(image: Tensor, channels: int, path: Path) -> Tensor:
    """`image` (C, *S) with the wanted channels: grey is repeated, colour that is grey in truth is reduced.

    Raises:
        DataError: any other difference.
    """
    got = len(image)
    if got == channels:
        return image
    if got == 1 and channels == 3:
        return image.expand(3, *image.shape[1:])
    if got == 3 and channels == 1 and torch.equal(image[0], image[1]) and torch.equal(image[0], image[2]):
        return image[:1]
    raise DataError(f"{path}: got {got} channels, need {channels}. Set data.channels={got} or convert the images.")


def normalize(image: Tensor, how: str, window: tuple[float, float] | None) -> Tensor:
    """Intensities (C, *S) in [-1, 1]; every choice but `window` looks at this scan alone.

    Args:
        how: "percentile": the 0.5th and 99.5th become -1 and 1, the rest is clipped. "range": least and
            largest. "zscore": (x - mean) / SD, clipped at 3 SD and divided by 3.
        window: (low, high) in stored units (HU in CT) that become -1 and 1; replaces `how`.

    Raises:
        DataError: nothing is left inside the window or between the percentiles.
    """
    if window is None and how == "zscore":
        spread = image.std().clamp_min(torch.finfo(torch.float32).tiny)
        return ((image - image.mean()) / spread).clamp(-ZSCORE_LIMIT, ZSCORE_LIMIT) / ZSCORE_LIMIT
    if window is not None:
        low, high = window
    elif how == "range":
        low, high = float(image.min()), float(image.max())
    else:
        low, high = (float(value) for value in np.percentile(image.numpy(), (0.5, 99.5)))
        if low == high:  # almost all of it is background
            low, high = float(image.min()), float(image.max())
    scaled = (image.clamp(low, high) - low) / (high - low) * 2 - 1
    if bool((scaled == scaled.flatten()[0]).all()):
        raise DataError(f"got no value inside the window {low:g} to {high:g}. Widen data.window.")
    return scaled


def to_grid(image: Tensor, size: int, steps: tuple[float, ...]) -> Tensor:
    """`image` (C, *S) on a grid of `size` along each axis, centred; beyond its border its least value.

    Where voxels stay as large as they are, they stay as they are: centred up to half a voxel.

    Args:
        steps: input voxels per output voxel, per axis. Crops, pads and resizes in one linear map per axis.
    """
    floor = image.min()
    return _placed(image - floor, size, steps) + floor


def labels_to_grid(labels: Tensor, size: int, steps: tuple[float, ...]) -> Tensor:
    """`labels` (*S) uint8 on the grid of `to_grid`: what fills most of a voxel; 0 beyond the border."""
    every = range(int(labels.max()) + 1)
    return majority(_placed((labels == label).float()[None], size, steps, aside=ASIDE)[0] for label in every)


def majority(shares: Iterable[Tensor]) -> Tensor:
    """The label, 0, 1, ..., with the largest share of a voxel, uint8, from each one's shares; the lowest of equals."""
    parts = iter(shares)
    most = next(parts)
    labels = torch.zeros_like(most, dtype=torch.uint8)
    for label, share in enumerate(parts, start=1):
        labels[share > most] = label
        most = torch.maximum(most, share)
    return labels


def _placed(values: Tensor, size: int, steps: tuple[float, ...], *, aside: float = 0.0) -> Tensor:
    """As `to_grid`, with 0 beyond the border, from `aside` voxels further along each axis."""
    for axis, step in enumerate(steps, start=1):
        length = values.shape[axis]
        between = 0.5 if abs(step - 1) < SAME and (length - size) % 2 else 0.0  # would mix all neighbours half and half
        weights = resampler(length, size, torch.tensor(step), between + aside)
        values = torch.movedim(torch.movedim(values, axis, -1) @ weights.T, -1, axis)
    return values


def resampler(length: int, size: int, step: Tensor, aside: float = 0.0) -> Tensor:
    """Linear resampling as a matrix, (..., size, length) for `step` (...): input voxels per output voxel.

    The centres of both grids meet, `aside` input voxels further on.

    A triangle filter as wide as the step (at least two voxels) keeps fine detail from aliasing. Rows sum to
    1 inside the image and fade to 0 beyond its border.
    """
    step = step.to(torch.float32)[..., None, None]
    centre = (torch.arange(size)[:, None] - (size - 1) / 2) * step + (length - 1) / 2 + aside  # (..., size, 1)
    width = step.clamp_min(1.0)
    weights = (1 - (torch.arange(length) - centre).abs() / width).clamp_min(0)
    whole = weights.sum(-1, keepdim=True).clamp_min(1e-6)
    inside = ((length - 0.5 - centre) / width + 0.5).clamp(0, 1) * ((centre + 0.5) / width + 0.5).clamp(0, 1)
    return weights / whole * inside


def fit_steps(shape: tuple[int, ...], spacing: tuple[float, ...], size: int, fit: str) -> tuple[float, ...]:
    """Voxels per output voxel that keep proportions in mm.

    `fit="crop"`: the shortest side fills the grid and the others are cropped; "pad": the longest side fills
    it.
    """
    extents = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    target = (min(extents) if fit == "crop" else max(extents)) / size
    return tuple(target / mm for mm in spacing)
