"""One subject's scans of several modalities, its brain and its tumour mask, on one grid.

The first modality's file gives the grid, in RAS axes; files on another grid are resampled onto it by their affines,
then all are brought to the wanted spacing about their common centre. Masks follow by majority: the nearest voxel would
be half a voxel off wherever the new grid lies between two of the old one, as at twice the spacing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfl.data import volume
from medfl.data.label_map import ROUNDING, SAME_PLACE
from medfl.data.volume import majority, resampler
from medfl.errors import DataError

NORMALIZATIONS = ("robust", "code")
CONVENTIONS = {  # label in the file -> 1 necrotic or non-enhancing core, 2 oedema, 3 enhancing tumour
    "brats2013": {1: 1, 2: 2, 3: 1, 4: 3},
    "brats2017": {1: 1, 2: 2, 4: 3},
    "brats2023": {1: 1, 2: 2, 3: 3},
}
LABELS = 4  # with the background
REGIONS: Mapping[str, tuple[int, ...]] = {"et": (3,), "tc": (1, 3), "wt": (1, 2, 3)}  # of our labels, as BraTS has them
WINDOW = (0.5, 99.5)  # percentiles inside the brain that become 0 and 1
NEGATIVE = 0.2  # largest share of values below 0, of those that are not 0, where the background is known by its 0


@dataclass(frozen=True, kw_only=True)
class Files:
    """What a data list names for one subject; None: it has no such file."""

    name: str
    images: tuple[Path | None, ...]
    brain: Path | None
    mask: Path | None
    convention: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Images (M, X, Y, Z) in [0, 1], 0 outside the brain and where a modality is missing; brain (X, Y, Z) bool; mask
    (X, Y, Z) uint8, None where nobody has drawn one; and the files that were resampled onto the first one's grid.
    """

    images: Tensor
    brain: Tensor
    mask: Tensor | None
    moved: tuple[Path, ...]


def load(files: Files, *, spacing: Sequence[float | None], normalize: str) -> Subject:
    """Read everything of a subject.

    Args:
        spacing: mm along x, y and z; None keeps that axis as it is stored.
        normalize: "robust": the 0.5th and 99.5th percentile inside the brain become 0 and 1. "code": least and largest
            value of the volume.

    Raises:
        DataError: naming the subject and the file.
    """
    try:
        return _load(files, spacing, normalize)
    except DataError as error:
        raise DataError(f"subject {files.name!r}: {error}") from error


def _load(files: Files, spacing: Sequence[float | None], normalize: str) -> Subject:
    scans = [path and read(path) for path in files.images]
    reference = next((scan for scan in scans if scan is not None), None)
    if reference is None:
        raise DataError("has no file of any modality. Fill a cell or remove the row.")
    grid = _Grid(reference, spacing)
    brain = _brain(files, scans, grid)
    images = torch.zeros(len(scans), *grid.shape)
    for row, (path, scan) in enumerate(zip(files.images, scans, strict=True)):
        if path is not None:
            images[row] = _normalized(grid.image(scan, path), brain, normalize, path)
    mask = None if files.mask is None else grid.labels(read(files.mask), files.mask, files.convention)
    return Subject(images=images, brain=brain, mask=mask, moved=tuple(dict.fromkeys(grid.moved)))


def read(path: Path) -> Any:
    """One volume as MONAI's MetaTensor, float32 (1, X, Y, Z) in RAS axes with its affine.

    Raises:
        DataError: the file is missing, of an unknown format, damaged, no volume, or not finite.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file. Correct the data list or data.root.")
    if not (path.is_dir() or path.name.lower().endswith((".nii", ".nii.gz"))):
        raise DataError(f"{path}: unknown format. Need .nii, .nii.gz or a DICOM folder.")
    try:
        image = _reader(path)
    except DataError:
        raise
    except Exception as error:  # the decoders raise whatever they like; the cause is always the file
        first = str(error).strip().splitlines()[:1]
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {''.join(first)}). Replace it.") from error
    if image.ndim != 4:
        raise DataError(f"{path}: got {image.ndim - 1} axes, need one volume of 3. Write one file per modality.")
    if not bool(torch.isfinite(image).all()):
        raise DataError(f"{path}: holds NaN or infinite values. Repair the image or leave it out.")
    return image


def _reader(path: Path) -> Any:
    from monai.data.image_reader import NibabelReader
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import Orientation

    if path.is_dir():
        scan = volume.decoded(path)
        return MetaTensor(scan.pixels, affine=None if scan.affine is None else torch.as_tensor(scan.affine))
    reader: Any = NibabelReader()
    pixels, header = reader.get_data(reader.read(path))
    image = torch.from_numpy(np.asarray(pixels).astype(np.float32))[None]
    if image.ndim != 4:
        return image
    return Orientation(axcodes="RAS", labels=None)(MetaTensor(image, affine=torch.as_tensor(header["affine"])))


class _Grid:
    """The grid of a subject: its methods bring volumes onto it; `moved` are those that had another one."""

    def __init__(self, reference: Any, spacing: Sequence[float | None]) -> None:
        self._reference = reference
        stored = np.linalg.norm(np.asarray(reference.affine)[:3, :3], axis=0)
        self._steps = [1.0 if mm is None else mm / float(had) for mm, had in zip(spacing, stored, strict=True)]
        sides = zip(reference.shape[1:], self._steps, strict=True)
        self.shape = tuple(max(1, round(length / step)) for length, step in sides)
        self.moved: list[Path] = []

    def image(self, scan: Any, path: Path) -> Tensor:
        """Linear, without aliasing, (X, Y, Z) with its least value at 0."""
        return self._placed(scan - scan.min(), path)

    def inside(self, scan: Any, path: Path) -> Tensor:
        """Where a volume of false and true fills more than half of a voxel, (X, Y, Z) bool."""
        return self._placed(scan.float(), path) > 0.5

    def labels(self, scan: Any, path: Path, convention: str) -> Tensor:
        """The label that fills most of a voxel, (X, Y, Z) uint8."""
        return majority(self._placed(where, path) for where in _where(scan, convention, path))

    def _placed(self, scan: Any, path: Path) -> Tensor:
        values = self._onto(scan, path)
        for axis, (side, step) in enumerate(zip(self.shape, self._steps, strict=True)):
            if step != 1:
                weights = resampler(values.shape[axis], side, torch.tensor(step))
                values = torch.movedim(torch.movedim(values, axis, -1) @ weights.T, -1, axis)
        return values

    def _onto(self, scan: Any, path: Path) -> Tensor:
        from monai.transforms.spatial.array import SpatialResample

        same = scan.shape == self._reference.shape
        if not (same and np.allclose(scan.affine, self._reference.affine, atol=SAME_PLACE)):
            self.moved.append(path)
            resample: Any = SpatialResample(mode="bilinear", padding_mode="zeros", align_corners=False)
            scan = resample(scan, dst_affine=self._reference.affine, spatial_size=self._reference.shape[1:])
        plain: Tensor = scan.as_tensor()[0]
        return plain.float()


def _brain(files: Files, scans: Sequence[Any], grid: _Grid) -> Tensor:
    if files.brain is not None:
        brain = grid.inside(read(files.brain) > 0.5, files.brain)
        if not bool(brain.any()):
            raise DataError(f"{files.brain}: no voxel is above 0.5. Replace the brain mask.")
        return brain
    brain = torch.zeros(grid.shape, dtype=torch.bool)
    for path, scan in zip(files.images, scans, strict=True):
        if path is not None:
            _refuse_negative(scan, path)
            brain |= grid.inside(scan > 0, path)
    if not bool(brain.any()):
        raise DataError("no voxel of any modality is above 0. Set data.brain to a column of brain masks.")
    return brain


def _refuse_negative(scan: Tensor, path: Path) -> None:
    below = int((scan < 0).sum()) / max(1, int((scan != 0).sum()))
    if below > NEGATIVE:
        raise DataError(
            f"{path}: {below:.0%} of its values are below 0, so that the brain cannot be told by values above 0. "
            "Set data.brain to a column of brain masks."
        )


def _normalized(image: Tensor, brain: Tensor, how: str, path: Path) -> Tensor:
    inside = image[brain]
    if how == "code":
        low, high = float(image.min()), float(image.max())
    else:
        low, high = (float(value) for value in np.percentile(inside.numpy(), WINDOW))
    if low == high:  # almost all of it has one value
        low, high = float(inside.min()), float(inside.max())
    if low == high:
        raise DataError(
            f"{path}: is constant ({low:g}) inside the brain, {int(brain.sum())} voxels. "
            "Check that its affine puts it where the other files are, or empty its cell."
        )
    return ((image - low) / (high - low)).clamp(0, 1) * brain


def _where(scan: Any, convention: str, path: Path) -> list[Any]:
    """For the background and each of our labels where it is drawn, 0 and 1 in the shape of the scan.

    Raises:
        DataError: a label that the convention does not have.
    """
    meaning = {0: 0} | CONVENTIONS[convention]
    found = [torch.zeros_like(scan) for _ in range(LABELS)]
    for stored, label in meaning.items():
        found[label] += (scan - stored).abs() < ROUNDING
    strange = scan[sum(found) == 0]
    if len(strange):
        known = ", ".join(map(str, meaning))
        raise DataError(
            f"{path}: holds the label {float(strange[0]):g}, {convention} has {known}. "
            "Set data.labels, or data.convention to a column with the convention of each row."
        )
    return found
