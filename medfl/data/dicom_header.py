"""What may be read of one DICOM file: the tags named here, so that no name, date, identifier or private tag gets in.

Values are taken from the raw bytes, as numbers or as one of a few known words; a text that is neither is named by its
tag alone.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.errors import DataError

Array = NDArray[np.float64]
Numbers = dict[str, list[float]]

NUMBERS = (
    *("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "RescaleSlope", "RescaleIntercept"),
    *("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "ImagerPixelSpacing"),
    *("NominalScannedPixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
)
KIND, COLOUR = "ImageType", "PhotometricInterpretation"
PIXELS = (
    *("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "FloatPixelData"),
    *("DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)
PER_FRAME, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
GROUPS = {  # of enhanced multi-frame images -> what they say
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SpacingBetweenSlices", "SliceThickness"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
BINARY = ("Rows", "Columns", "SamplesPerPixel")  # 16 bits each; the other numbers are written as text
LENGTHS = {"ImageOrientationPatient": 6, "ImagePositionPatient": 3, "PixelSpacing": 2, "ImagerPixelSpacing": 2}
LENGTHS |= {"NominalScannedPixelSpacing": 2}
# Without PALETTE COLOR: its numbers are places in a table, not intensities.
COLOURS = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
SCOUTS = {"LOCALIZER", "SCOUT", "TOPOGRAM"}

SAME_DIRECTION = 1e-2  # largest difference of a direction's components


@dataclass(frozen=True)
class Plane:
    """Where one frame lies (LPS mm), and how its stored numbers become values."""

    file: Path
    frame: int
    position: Array | None  # (3,) of the first pixel
    orientation: Array | None  # (2, 3): directions along a row, along a column
    spacing: tuple[float, float] | None  # between rows, between columns
    gap: float  # as the file states it, where there is no other slice
    slope: float
    intercept: float

    def same_orientation(self, other: "Plane") -> bool:
        if self.orientation is None or other.orientation is None:
            return self.orientation is other.orientation
        return bool(np.abs(self.orientation - other.orientation).max() < SAME_DIRECTION)


@dataclass(frozen=True)
class Header:
    """What one file says of its pixels."""

    sides: tuple[int, int]  # rows, columns
    samples: int
    inverted: bool  # white is low
    localiser: bool
    planes: tuple[Plane, ...]


def read(path: Path, shown: Path) -> Header | None:
    """What one file says; None where it is no DICOM file or holds no pixels.

    Args:
        shown: the path to name in errors.

    Raises:
        DataError: a damaged header, or a tag that holds something else than it should; never the text of one.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    failed = ""
    try:
        raw = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*NUMBERS, KIND, COLOUR, PER_FRAME, SHARED])
        syntax = str(raw.file_meta.get("TransferSyntaxUID", ""))
        numbers, kind, colour = _tags(raw, NUMBERS), _words(raw, KIND), _words(raw, COLOUR)
        shared, frames = _group(raw, SHARED), _groups(raw, PER_FRAME)
    except InvalidDicomError:
        return None
    except Exception as error:  # the decoder raises whatever it likes, sometimes with the text of a tag
        failed = str(error) if isinstance(error, _NoNumberError) else f"is damaged ({type(error).__name__})"
    if failed:  # outside of `except`, so that the cause with its text is not carried along
        raise DataError(f"{shown}: its DICOM header {failed}. Export it again.")
    if not {"Rows", "Columns"} <= numbers.keys():
        return None
    if not colour <= set(COLOURS):  # the decoder would show the text
        raise DataError(f"{shown}: has an unknown {COLOUR}. Need one of {', '.join(COLOURS)}. Export it as one.")
    _check_decoder(syntax, shown)
    count = int(numbers.get("NumberOfFrames", [1])[0])
    merged = [numbers | shared | (frames[index] if index < len(frames) else {}) for index in range(max(count, 1))]
    if count > 1 and len(frames) != count:  # one place for many frames says nothing
        merged = [{name: value for name, value in one.items() if name != "ImagePositionPatient"} for one in merged]
    return Header(
        (int(numbers["Rows"][0]), int(numbers["Columns"][0])),
        int(numbers.get("SamplesPerPixel", [1])[0]),
        "MONOCHROME1" in colour,
        bool(SCOUTS & kind),
        tuple(_plane(path, index, one, shown) for index, one in enumerate(merged)),
    )


class _NoNumberError(Exception):
    pass


def _tags(source: Any, names: Sequence[str]) -> Numbers:
    """The numbers of a data set, or of an item inside of it; empty tags are left out."""
    found = {}
    for name in names:
        if name in source and (value := source.get_item(name).value):
            found[name] = _numbers(name, value, source.get_item(name).is_little_endian)
            if len(found[name]) < LENGTHS.get(name, 1) or not np.isfinite(found[name]).all():
                raise _NoNumberError(f"has a {name} that is not {LENGTHS.get(name, 1)} finite numbers")
    return found


def _numbers(name: str, value: bytes, little: bool) -> list[float]:
    if name in BINARY and len(value) == struct.calcsize("H"):
        return [float(struct.unpack("<H" if little else ">H", value)[0])]
    try:
        return [float(part) for part in value.decode("ascii").strip("\0 ").split("\\")]
    except ValueError:
        pass
    raise _NoNumberError(f"has a {name} that is no number")


def _words(source: Any, name: str) -> set[str]:
    """The words of a coded tag; they are compared, never shown."""
    raw = (source.get_item(name).value or b"") if name in source else b""
    words = {word.strip(" \0").upper() for word in raw.decode("ascii", "ignore").split("\\")}
    return words - {""}


def _groups(source: Any, name: str) -> list[Numbers]:
    """For each item of a sequence of functional groups, what those in `GROUPS` say."""
    items = source[name].value if name in source else []
    return [
        {
            tag: value
            for group, names in GROUPS.items()
            if group in item and len(item[group].value)
            for tag, value in _tags(item[group].value[0], names).items()
        }
        for item in items
    ]


def _group(source: Any, name: str) -> Numbers:
    return next(iter(_groups(source, name)), {})


def _check_decoder(syntax: str, shown: Path) -> None:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID, AllTransferSyntaxes

    if syntax not in AllTransferSyntaxes:
        raise DataError(f"{shown}: has no known transfer syntax. Export it again.")
    try:
        ready = get_decoder(UID(syntax)).is_available
    except NotImplementedError:
        ready = False
    if not ready:
        raise DataError(
            f"{shown}: is compressed as {UID(syntax).name}, which no installed decoder reads. Export it uncompressed, "
            "or convert it with gdcmconv --raw or dcmdjpeg."
        )


def _plane(file: Path, frame: int, numbers: Numbers, shown: Path) -> Plane:
    directions, place = numbers.get("ImageOrientationPatient"), numbers.get("ImagePositionPatient")
    orientation = None if directions is None else np.asarray(directions[:6]).reshape(2, 3)
    if orientation is not None and np.abs(orientation @ orientation.T - np.eye(2)).max() > SAME_DIRECTION:
        raise DataError(f"{shown}: its row and column directions are not perpendicular. Export it again.")
    kinds = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    spacing = next((numbers[kind][:2] for kind in kinds if kind in numbers), None)
    gap = next((abs(numbers[kind][0]) for kind in ("SpacingBetweenSlices", "SliceThickness") if kind in numbers), 1.0)
    if spacing is not None and min(spacing) <= 0:
        raise DataError(f"{shown}: has a pixel spacing that is not above 0 mm. Export it again.")
    return Plane(
        file,
        frame,
        None if place is None else np.asarray(place[:3]),
        orientation,
        None if spacing is None else (spacing[0], spacing[1]),
        gap or 1.0,
        numbers.get("RescaleSlope", [1.0])[0],
        numbers.get("RescaleIntercept", [0.0])[0],
    )
