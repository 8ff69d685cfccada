"""A folder of PNG, JPEG, NIfTI or DICOM files with a CSV data list: one row per image."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medfl.data import findings, label_map, volume
from medfl.data.datalist import Row, cells, read_rows, split_of
from medfl.data.sample import UNLABELLED, Records, named, number, require, whole
from medfl.data.splits import check_patients
from medfl.errors import DataError

LONGEST = 20  # letters of a region's name: scores with longer names would not leave a site


class Placed(NamedTuple):
    """One row of the data list on the common grid."""

    image: Tensor  # (channels, size, ...) float32
    spacing: tuple[float, ...]
    mask: Tensor | None  # (size, ...) uint8


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Images listed in a CSV file, read and brought to one grid when `load` is called.

    Args:
        root: the folder.
        datalist: the CSV file, relative to `root`.
        image: its column of paths, relative to `root` (a DICOM series is the path of its folder).
        label, patient, site, split: further columns, each null when there is none. Without `patient` every
            image is its own patient; without `split`, splits are assigned by patient.
        classes: the labels to expect, in order, so that a list that lacks one has the same classes; null: those there.
        labels: in place of `label`, columns of 1, 0, and for unknown -1 or an empty cell, one for each finding.
        mask: column of label maps, relative to `root`, each on the grid of its image; an empty cell is not labelled.
        regions: name -> the values in the label maps that make it up. They become the labels 1, 2, ... in ascending
            order; 0 is the background, any other value is refused.
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
    classes: Sequence[str] | None
    labels: Sequence[str] | None
    mask: str | None
    regions: Mapping[str, Sequence[int]] | None
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
        self._check_targets()
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

    def _check_targets(self) -> None:
        names = list(map(str, self.classes or ()))
        texts = not any(isinstance(name, bool) for name in self.classes or ()) and len(set(names)) == len(names) > 1
        require(
            "data",
            {
                "classes": (
                    self.classes,
                    self.classes is None or (texts and self.label is not None),
                    "null, or two different names or more, in quotes, and the column data.label",
                ),
                "labels": (
                    self.labels,
                    self.labels is None or (findings.usable(self.labels) and self.label is None),
                    f"null, or up to {findings.MOST} columns with data.label=null; their names differ in letters and "
                    f"digits, are at most {findings.LONGEST} long, and none is {findings.NONE!r}",
                ),
                "mask": (self.mask, self.mask is None or bool(self.regions), "null, or a column and data.regions"),
                "regions": (
                    self.regions,
                    self.regions is None or (usable(self.regions) and self.mask is not None),
                    f"null, or names of a-z, 0-9 and _, up to {LONGEST} long, each with a list of whole numbers above "
                    "0, and the column data.mask",
                ),
            },
        )

    @property
    def _values(self) -> list[int]:
        """What the label maps hold besides 0, ascending."""
        return sorted({value for values in (self.regions or {}).values() for value in values})

    def load(self) -> Records:
        """All usable images, (N, channels, size, ...) in [-1, 1].

        Raises:
            DataError: a missing folder, list or column; an image, mask, label or split that cannot be used, by name.
        """
        columns = {name: getattr(self, name) for name in ("image", "label", "mask", "patient", "site", "split")}
        columns |= {f"labels[{place}]": column for place, column in enumerate(self.labels or ())}
        rows = read_rows(self._root, self.datalist, columns, one="image")
        rows, placed = self._usable(rows)
        found, labels, classes = self._labels(rows)
        patients = cells(self.datalist, rows, self.patient, or_else=lambda row: row[self.image])
        splits = tuple(split_of(self.datalist, row, self.split) for row in rows)
        check_patients(patients, splits)
        sites = cells(self.datalist, rows, self.site, or_else=None) if self.site else None
        return Records(
            images=torch.stack([one.image for one in placed]),
            labels=labels,
            patients=patients,
            splits=splits,
            sites=sites,
            classes=classes,
            spacing=tuple(float(mm) for mm in np.median([one.spacing for one in placed], axis=0)),
            masks=torch.stack([one.mask for one in placed if one.mask is not None]) if self.mask else None,
            regions={
                name: tuple(sorted(1 + self._values.index(value) for value in set(values)))
                for name, values in (self.regions or {}).items()
            },
            findings=found,
        )

    def _labels(self, rows: list[Row]) -> tuple[Tensor | None, Tensor, tuple[str, ...]]:
        """Findings, classes (N,) and the names of these."""
        if self.labels:
            return findings.read(rows, self.labels)
        return None, *read_labels([row[self.label] for row in rows] if self.label else [""] * len(rows), self.classes)

    @property
    def _root(self) -> Path:
        return Path(str(self.root)).expanduser()

    def _usable(self, rows: list[Row]) -> tuple[list[Row], list[Placed]]:
        kept, placed, refused = [], [], []
        for row in rows:
            try:
                placed.append(self._placed(row))
            except DataError as error:
                if self.unreadable == "refuse":
                    raise DataError(f"{error} Or set data.unreadable=skip.") from error
                refused.append(str(error))
                continue
            kept.append(row)
        if refused:
            share = len(refused) / len(rows)
            count = f"{len(refused)} of {len(rows)} images cannot be used"
            if share > self.max_unreadable or not kept:
                most = f"{self.max_unreadable * len(rows):.0f}"
                limit = f"data.max_unreadable={self.max_unreadable:g} allows {most}"
                raise DataError(f"{self._root}: {count}, {limit}. The first: {refused[0]}")
            logging.getLogger(__name__).warning("%s: %s and were skipped. The first: %s", self._root, count, refused[0])
        return kept, placed

    def _placed(self, row: Row) -> Placed:
        if not row[self.image]:
            raise DataError(f"{self.datalist}: a row has an empty {self.image!r}. Fill it or remove the row.")
        path = self._root / row[self.image]
        scan = volume.read(path, self.spatial_dims)
        image, spacing = volume.match_channels(scan.pixels, self.channels, path), scan.spacing
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
        mask = self._mask(row, scan, path, steps) if self.mask else None
        return Placed(volume.to_grid(image, self.size, steps).clamp(-1, 1), grid, mask)

    def _mask(self, row: Row, scan: volume.Scan, image: Path, steps: tuple[float, ...]) -> Tensor:
        name = row[self.mask or ""]
        if not name:
            return torch.full((self.size,) * self.spatial_dims, UNLABELLED, dtype=torch.uint8)
        labels = label_map.read(self._root / name, self._values, image=scan, image_path=image)
        return volume.labels_to_grid(labels, self.size, steps)


def usable(regions: Mapping[str, Sequence[int]]) -> bool:
    """Whether there is a region, and each has a plain short name and a list of values above 0."""
    lists = all(isinstance(values, list | tuple) and values and all(map(whole, values)) for values in regions.values())
    few = lists and len({value for values in regions.values() for value in values}) < UNLABELLED
    return few and named(list(regions)) and 0 < max(map(len, regions), default=0) <= LONGEST


def read_labels(cells: Sequence[str], expected: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Class indices (N,) and names from text: empty is -1; whole numbers sort as numbers, the rest as text.

    Args:
        expected: the names, in order; None: those that are found.

    Raises:
        DataError: only one class, or so many that the column cannot be a class; a label that is not expected.
    """
    if expected is not None:
        given = tuple(map(str, expected))
        return torch.tensor([_place(cell, given) for cell in cells]), given
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


def _place(cell: str, names: Sequence[str]) -> int:
    spellings = [cell, str(_whole(cell))]  # "1.0" is "1"
    found = next((names.index(text) for text in spellings if text in names), -1)
    if cell and found < 0:
        need = ", ".join(names)
        raise DataError(f"data.label: got {cell!r}, data.classes has {need}. Add it there, or correct the data list.")
    return found


def _whole(cell: str) -> int | None:
    """ "1", "01" and "1.0" are 1; anything else is no number."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
