"""DICOM images: one file, one file of several frames, or a folder with the files of one series.

Only the tags that `medfl.data.dicom_header` names are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medfl.data import dicom_header
from medfl.data.dicom_header import PIXELS, Array, Header, Plane
from medfl.errors import DataError

SAME_SIZE = 1e-3  # share by which pixel spacings of one volume may differ
EVEN = 0.05  # share of the gap by which one slice may lie off its place
ABOVE_ROUNDING = 0.01  # mm; positions are often written with two decimals
TOGETHER = 1e-3  # mm between two slices at one place

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class GeometryError(DataError):
    """Frames that do not make one volume."""


class Stored(NamedTuple):
    """What a file or folder holds. One frame is (rows, columns), several are (columns, rows, slices), colour last."""

    pixels: NDArray[np.float32]
    spacing: tuple[float, ...]  # mm along the axes; 1.0 where the file has none
    affine: Array | None  # (4, 4), from voxels to RAS mm; None: one frame, or frames whose place is not known
    dropped: int  # localisers
    colour: bool


@dataclass(frozen=True)
class Series:
    """The frames of one image in their order, localisers left out."""

    sides: tuple[int, int]
    samples: int
    inverted: bool
    planes: tuple[Plane, ...]
    affine: Array | None  # LPS
    dropped: int


def read(path: Path) -> Stored:
    """The values of one image, in the units of the scanner (HU for CT).

    Raises:
        DataError: as of `survey`, or a compression that no installed decoder reads.
    """
    series = survey(path)
    frames = _frames(series, path)
    values = frames[0] if _flat(series, path) else np.stack(frames, axis=2)
    if series.inverted:
        values = values.max() + values.min() - values
    colour, first = series.samples > 1, series.planes[0]
    if _flat(series, path):
        return Stored(values, first.spacing or (1.0, 1.0), None, series.dropped, colour)
    if series.affine is None:
        rows, columns = first.spacing or (1.0, 1.0)
        return Stored(values, (columns, rows, first.gap), None, series.dropped, colour)
    sides = tuple(float(mm) for mm in np.linalg.norm(series.affine[:3, :3], axis=0))
    return Stored(values, sides, LPS_TO_RAS @ series.affine, series.dropped, colour)


def survey(path: Path) -> Series:
    """The geometry of a file, or of the one series in a folder, without its pixels.

    Raises:
        DataError: no image, only localisers, damaged headers, or frames that do not make one volume: of mixed sizes or
            orientations, at one place, or with uneven gaps. No tag's text and no name inside the folder is shown.
    """
    headers = _headers(path)
    scouts = sum(header.localiser for header in headers)
    kept = [header for header in headers if not header.localiser]
    if not kept:
        raise DataError(f"{path}: holds only localiser images. Name the scan itself in the data list.")
    if len(kept) > 1 and any(len(header.planes) > 1 for header in kept):
        raise GeometryError(f"{path}: mixes multi-frame files with others. Give each image a folder of its own.")
    planes = [plane for header in kept for plane in header.planes]
    if len(kept) > 1:
        planes, strays = _without_strays(planes)
        kept = [header for header in kept if header.planes[0] in planes]
        scouts += strays
    first = kept[0]
    _check_alike(kept, planes, path)
    if not path.is_dir() and len(planes) == 1:
        return Series(first.sides, first.samples, first.inverted, tuple(planes), None, scouts)
    ordered, affine = _ordered(planes, path)
    return Series(first.sides, first.samples, first.inverted, tuple(ordered), affine, scouts)


def _headers(path: Path) -> list[Header]:
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    found = [one for file in files if (one := dicom_header.read(file, path)) is not None]
    if not found:
        what = "no DICOM image among its files" if path.is_dir() else "no DICOM image"
        raise DataError(f"{path}: is {what}. Correct the data list." if not path.is_dir() else f"{path}: has {what}.")
    return found


def _without_strays(planes: list[Plane]) -> tuple[list[Plane], int]:
    """Without single slices of another orientation, which are scouts; and how many they were."""
    groups: list[list[Plane]] = []
    for plane in planes:
        like = next((group for group in groups if group[0].same_orientation(plane)), None)
        if like is None:
            groups.append([plane])
        else:
            like.append(plane)
    if max(map(len, groups)) == 1:
        return planes, 0
    kept = [plane for group in groups if len(group) > 1 for plane in group]
    return kept, len(planes) - len(kept)


def _check_alike(headers: Sequence[Header], planes: Sequence[Plane], path: Path) -> None:
    first, plane = headers[0], planes[0]
    if any((one.sides, one.samples, one.inverted) != (first.sides, first.samples, first.inverted) for one in headers):
        raise GeometryError(f"{path}: mixes slices of several sizes or kinds. Give each series a folder of its own.")
    if not all(plane.same_orientation(other) for other in planes):
        raise GeometryError(f"{path}: mixes slices of several orientations. Give each series a folder of its own.")
    sizes = np.asarray([one.spacing or (1.0, 1.0) for one in planes])
    if (np.abs(sizes / sizes[0] - 1) > SAME_SIZE).any():
        raise GeometryError(f"{path}: mixes slices of several pixel spacings. Give each series a folder of its own.")


def _ordered(planes: Sequence[Plane], path: Path) -> tuple[list[Plane], Array | None]:
    """The slices along their normal, and the affine (LPS) of the volume; frames without a place keep their order."""
    first = planes[0]
    if all(plane.position is None for plane in planes) and len({plane.file for plane in planes}) == 1 < len(planes):
        return list(planes), None
    if first.orientation is None or any(plane.position is None for plane in planes):
        raise GeometryError(f"{path}: has slices without position or orientation. Export them with their geometry.")
    normal = np.cross(*first.orientation)
    ranked = sorted(planes, key=lambda plane: float(np.asarray(plane.position) @ normal))
    places = np.asarray([plane.position for plane in ranked])
    step = _step(places, normal, path) if len(ranked) > 1 else normal * first.gap
    rows, columns = first.spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.orientation[0] * columns, first.orientation[1] * rows
    affine[:3, 2], affine[:3, 3] = step, places[0]
    return ranked, affine


def _step(places: Array, normal: Array, path: Path) -> Array:
    """The vector from one slice to the next, (3,) mm, of places (n, 3) in order."""
    steps = np.diff(places, axis=0)
    gaps = steps @ normal
    if together := int((gaps < TOGETHER).sum()):
        raise GeometryError(
            f"{path}: {together} of {len(places)} slices lie at the place of another one (several phases, echoes or "
            "series). Give each its own folder."
        )
    usual = np.median(steps, axis=0)
    off = np.linalg.norm(steps - usual, axis=1)
    if (off > EVEN * np.linalg.norm(usual) + ABOVE_ROUNDING).any():
        raise GeometryError(
            f"{path}: its {len(places)} slices lie unevenly, {gaps.min():.3g} to {gaps.max():.3g} mm apart "
            f"(sidewise off by up to {off.max():.3g} mm). Slices may be missing: export the series again."
        )
    return np.asarray((places[-1] - places[0]) / (len(places) - 1))


def _flat(series: Series, path: Path) -> bool:
    return len(series.planes) == 1 and not path.is_dir()


def _frames(series: Series, path: Path) -> list[NDArray[np.float32]]:
    """The values of each slice: (rows, columns[, 3]) where there is one alone, else (columns, rows[, 3])."""
    import pydicom
    from pydicom.pixels.utils import pixel_array

    decoded: dict[Path, Any] = {}
    frames = []
    for plane in series.planes:
        if plane.file not in decoded:  # decompressed; YBR is turned into RGB
            decoded = {plane.file: pixel_array(pydicom.dcmread(plane.file, specific_tags=list(PIXELS)))}
        pixels = decoded[plane.file]
        stored = pixels[plane.frame] if pixels.ndim - (series.samples > 1) == 3 else pixels
        values = stored.astype(np.float32) if series.samples > 1 else stored * plane.slope + plane.intercept
        frames.append(np.asarray(values if _flat(series, path) else np.swapaxes(values, 0, 1), dtype=np.float32))
    return frames
