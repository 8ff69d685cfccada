"""A folder of PNG, JPEG, NIfTI or DICOM files with a CSV data list: one row per image."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medfl.data import volume
from medfl.data.datalist import Row, cells, read_rows, split_of
from medfl.data.sample import Records, number, require, whole
from medfl.data.splits import check_patients
from medfl.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Images listed in a CSV file, read and brought to one grid when `load` is called.

    Args:
        root: the folder.
        datalist: the CSV file, relative to `root`.
        image: its column of paths, relative to `root` (a DICOM series is the path of its folder).
        label, patient, site, split: further columns, each null when there is none. Without `patient` every
            image is its own patient; without `split`, splits are assigned by patient.
        spatial_dims, channels, size: of the common grid.
        spacing: mm per voxel; the scan is cropped and padded about its centre. Null: see `fit`.
        fit: without `spacing`, "crop": the shortest side fills the grid; "pad": the longest does.
            Proportions stay.
        normalize: percentile | range | zscore, see `medfl.data.volume.normalize`.
        window: [low, high] in stored units, such as HU; replaces `normalize`.
        unreadable: "refuse" at the first image that cannot be used, or "skip" and count.
        max_unreadable: the largest share of images that may be skipped.

    Raises:
        ConfigError: a setting that cannot be used.
    """

    root: str | None
    datalist: str
    image: str
    label: str | None
    patient: str | None
    site: str | None
    split: str | None
    spatial_dims: int
    channels: int
    size: int
    spacing: float | None
    fit: str
    normalize: str
    window: Sequence[float] | None
    unreadable: str
    max_unreadable: float

    def __post_init__(self) -> None:
        ordered = self.window is None or (len(self.window) == 2 and float(self.window[0]) < float(self.window[1]))
        modes = volume.NORMALIZATIONS
        require(
            "data",
            {
                "root": (self.root, bool(self.root), "the folder with the images: data.root=/path/to/images"),
                "spatial_dims": (self.spatial_dims, self.spatial_dims in (2, 3), "2 or 3"),
                "channels": (self.channels, whole(self.channels), "an integer of at least 1"),
                "size": (self.size, whole(self.size, 8), "an integer of at least 8"),
                "spacing": (
                    self.spacing,
                    self.spacing is None or number(self.spacing, 1e-6),
                    "mm per voxel above 0, or null",
                ),
                "fit": (self.fit, self.fit in ("crop", "pad"), "crop or pad"),
                "normalize": (self.normalize, self.normalize in modes, f"one of {', '.join(modes)}"),
                "window": (self.window, ordered, "[low, high] with low < high, or null"),
                "unreadable": (self.unreadable, self.unreadable in ("refuse", "skip"), "refuse or skip"),
                "max_unreadable": (
                    self.max_unreadable,
                    number(self.max_unreadable) and self.max_unreadable < 1,
                    "a share in [0, 1)",
                ),
            },
        )

    def load(self) -> Records:
        """All usable images, (N, channels, size, ...) in [-1, 1].

        Raises:
            DataError: a missing folder, list or column; an image, label or split that cannot be used, by
            name.
        """
        columns = {name: getattr(self, name) for name in ("image", "label", "patient", "site", "split")}
        rows = read_rows(self._root, self.datalist, columns, one="image")
        rows, images, spacings = self._images(rows)
        labels, classes = read_labels([row[self.label] for row in rows] if self.label else [""] * len(rows))
        patients = cells(self.datalist, rows, self.patient, or_else=lambda row: row[self.image])
        splits = tuple(split_of(self.datalist, row, self.split) for row in rows)
        check_patients(patients, splits)
        sites = cells(self.datalist, rows, self.site, or_else=None) if self.site else None
        spacing = tuple(float(mm) for mm in np.median(np.asarray(spacings), axis=0))
        return Records(images, labels, patients, splits, sites, classes, spacing, masks=None)

    @property
    def _root(self) -> Path:
        return Path(str(self.root)).expanduser()

    def _images(self, rows: list[Row]) -> tuple[list[Row], Tensor, list[tuple[float, ...]]]:
        kept, images, spacings, refused = [], [], [], []
        for row in rows:
            try:
                image, spacing = self._scan(row[self.image])
            except DataError as error:
                if self.unreadable == "refuse":
                    raise DataError(f"{error} Or set data.unreadable=skip.") from error
                refused.append(str(error))
                continue
            kept.append(row)
            images.append(image)
            spacings.append(spacing)
        if refused:
            share = len(refused) / len(rows)
            count = f"{len(refused)} of {len(rows)} images cannot be used"
            if share > self.max_unreadable or not kept:
                most = f"{self.max_unreadable * len(rows):.0f}"
                limit = f"data.max_unreadable={self.max_unreadable:g} allows {most}"
                raise DataError(f"{self._root}: {count}, {limit}. The first: {refused[0]}")
            logging.getLogger(__name__).warning("%s: %s and were skipped. The first: %s", self._root, count, refused[0])
        return kept, torch.stack(images), spacings

    def _scan(self, name: str) -> tuple[Tensor, tuple[float, ...]]:
        if not name:
            raise DataError(f"{self.datalist}: a row has an empty {self.image!r}. Fill it or remove the row.")
        path = self._root / name
        image, spacing = volume.read(path, self.spatial_dims)
        image = volume.match_channels(image, self.channels, path)
        window = (float(self.window[0]), float(self.window[1])) if self.window else None
        try:
            image = volume.normalize(image, self.normalize, window)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if self.spacing is None:
            steps = volume.fit_steps(tuple(image.shape[1:]), spacing, self.size, self.fit)
        else:
            steps = tuple(self.spacing / mm for mm in spacing)
        grid = tuple(step * mm for step, mm in zip(steps, spacing, strict=True))
        return volume.to_grid(image, self.size, steps).clamp(-1, 1), grid


def read_labels(cells: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Class indices (N,) and names from text: empty is -1; whole numbers sort as numbers, the rest as text.

    Raises:
        DataError: only one class, or so many that the column cannot be a class.
    """
    numbers = [_whole(cell) for cell in cells if cell]
    as_numbers = all(number is not None for number in numbers)
    names = [str(_whole(cell)) if as_numbers and cell else cell for cell in cells]
    classes = sorted({name for name in names if name}, key=lambda name: (int(name) if as_numbers else 0, name))
    if not classes:
        return torch.full((len(cells),), -1), ()
    if len(classes) == 1:
        raise DataError(f"data.label: every label is {classes[0]!r}, need two classes or more. Or set data.label=null.")
    if len(classes) > max(2, len(numbers) // 2):
        raise DataError(
            f"data.label: got {len(classes)} different values in {len(numbers)} rows "
            f"(such as {classes[0]!r}), need a column of classes. Choose another column."
        )
    position = {name: index for index, name in enumerate(classes)}
    return torch.tensor([position.get(name, -1) for name in names]), tuple(classes)


def _whole(cell: str) -> int | None:
    """ "1", "01" and "1.0" are 1; anything else is no number."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
