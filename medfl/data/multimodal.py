"""Subjects with several registered modalities each, listed in a CSV file; any of them may be missing."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from medfl.data import subject
from medfl.data.datalist import Row, cells, read_rows, split_of
from medfl.data.sample import SPLITS, UNLABELLED, Records, named, number, require, slab_of, whole
from medfl.data.splits import check_patients
from medfl.data.subject import CONVENTIONS, NORMALIZATIONS, REGIONS, Files
from medfl.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Multimodal:
    """Volumes in NIfTI files or DICOM folders, cut to one grid in RAS axes when `load` is called.

    Args:
        root: the folder.
        datalist: the CSV file, relative to `root`, one row per subject.
        modalities: names, each also the column of its files, relative to `root`. An empty cell: the subject lacks it.
        channels: how many modalities.
        mask: column of tumour masks, empty cells are not labelled; null: none is.
        brain: column of brain masks; empty cells and null: the brain is where any modality is above 0.
        labels: what the numbers in the masks mean: brats2013 | brats2017 | brats2023.
        convention: column with another such word for some rows; null: `labels` for all.
        patient, site, split: further columns, each null when there is none. Without `patient` every row is its own
            patient; without `split`, splits are assigned by patient.
        spatial_dims: 3, or 2 for axial slices.
        size: side in the axial plane, voxels, centred on the brain.
        depth: voxels along the last axis; null: as `size`. In 2D null.
        spacing: mm per voxel; in 2D slices stay where they were taken.
        slabs: parts (in 2D slices) per subject, evenly over the brain's extent along the last axis; 1: the middle.
        slab_splits: the split of each part, in place of `split`; null: by patient.
        normalize: robust | code, see `medfl.data.subject.load`.

    Raises:
        ConfigError: a setting that cannot be used.
    """

    root: str | None
    datalist: str
    modalities: Sequence[str]
    channels: int
    mask: str | None
    brain: str | None
    labels: str
    convention: str | None
    patient: str | None
    site: str | None
    split: str | None
    spatial_dims: int
    size: int
    depth: int | None
    spacing: float
    slabs: int
    slab_splits: Sequence[str] | None
    normalize: str

    def __post_init__(self) -> None:
        names, given = list(self.modalities), self.slab_splits
        depth_ok = self.depth is None or (whole(self.depth) and self.spatial_dims == 3)
        splits_ok = given is None or (self.split is None and len(given) == self.slabs and set(given) <= set(SPLITS))
        require(
            "data",
            {
                "root": (self.root, bool(self.root), "the folder with the images: data.root=/path/to/images"),
                "modalities": (names, bool(names) and named(names), "different names of a-z, 0-9 and _"),
                "channels": (self.channels, self.channels == len(names), f"{len(names)}, one per modality"),
                "labels": (self.labels, self.labels in CONVENTIONS, f"one of {', '.join(CONVENTIONS)}"),
                "spatial_dims": (self.spatial_dims, self.spatial_dims in (2, 3), "2 or 3"),
                "size": (self.size, whole(self.size, 8), "an integer of at least 8"),
                "depth": (self.depth, depth_ok, "an integer of at least 1, or null; null in 2D"),
                "spacing": (self.spacing, number(self.spacing, 1e-6), "mm per voxel above 0"),
                "slabs": (self.slabs, whole(self.slabs), "an integer of at least 1"),
                "slab_splits": (given, splits_ok, "train, val or test for every slab and data.split=null, or null"),
                "normalize": (self.normalize, self.normalize in NORMALIZATIONS, f"one of {', '.join(NORMALIZATIONS)}"),
            },
        )

    def load(self) -> Records:
        """All parts of all subjects, (N, channels, size, size[, depth]) in [0, 1].

        Raises:
            DataError: a missing folder, list or column; a file, label or split that cannot be used, by subject and
                file.
        """
        rows = read_rows(self._root, self.datalist, self._columns, one="subject")
        people = cells(self.datalist, rows, self.patient, or_else=self._first_file)
        sites = cells(self.datalist, rows, self.site, or_else=None) if self.site else None
        given = [split_of(self.datalist, row, self.split) for row in rows]
        check_patients(people, given)
        images, masks = self._volumes(rows, people)
        parts = range(self.slabs)
        patients, splits = [person for person in people for _ in parts], [split for split in given for _ in parts]
        if self.slab_splits is not None:
            patients = [slab_of(person, part + 1) for person in people for part in parts]
            splits = list(self.slab_splits) * len(rows)
            log.warning("data.slab_splits: each of the %d brains is in several splits.", len(rows))
        return Records(
            images=images,
            labels=torch.full((len(images),), -1),
            patients=tuple(patients),
            splits=tuple(splits),
            sites=tuple(site for site in sites for _ in parts) if sites else None,
            classes=(),
            spacing=(float(self.spacing),) * self.spatial_dims,
            masks=masks if self.mask else None,
            modalities=tuple(self.modalities),
            regions=REGIONS if self.mask else {},
        )

    @property
    def _root(self) -> Path:
        return Path(str(self.root)).expanduser()

    @property
    def _columns(self) -> dict[str, str | None]:
        named_by = ("mask", "brain", "convention", "patient", "site", "split")
        return {f"modalities[{i}]": column for i, column in enumerate(self.modalities)} | {
            name: getattr(self, name) for name in named_by
        }

    @property
    def _sides(self) -> tuple[int, int, int]:
        return self.size, self.size, 1 if self.spatial_dims == 2 else self.depth or self.size

    def _first_file(self, row: Row) -> str:
        return next((row[name] for name in self.modalities if row[name]), "")

    def _volumes(self, rows: Sequence[Row], people: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Images (N, M, *S) and masks (N, *S) of all parts, subject by subject."""
        count, grid = len(rows) * self.slabs, self._sides[: self.spatial_dims]
        images = torch.zeros(count, len(self.modalities), *grid)
        masks = torch.full((count, *grid), UNLABELLED, dtype=torch.uint8)
        spacing = (self.spacing, self.spacing, self.spacing if self.spatial_dims == 3 else None)
        moved: list[Path] = []
        for index, (row, person) in enumerate(zip(rows, people, strict=True)):
            scan = subject.load(self._files(row, person), spacing=spacing, normalize=self.normalize)
            for part, starts in enumerate(self._starts(scan.brain, person), start=index * self.slabs):
                images[part] = _cut(scan.images, starts, self._sides).view(images.shape[1:])
                if scan.mask is not None:
                    masks[part] = _cut(scan.mask, starts, self._sides).view(grid)
            moved += scan.moved
        if moved:
            text = "%d files lie on another grid than their subject's first one and were resampled. The first: %s"
            log.warning(text, len(moved), moved[0])
        return images, masks

    def _files(self, row: Row, person: str) -> Files:
        def path(column: str | None) -> Path | None:
            return self._root / row[column] if column and row[column] else None

        convention = (row[self.convention] if self.convention else "") or self.labels
        if convention not in CONVENTIONS:
            need = ", ".join(CONVENTIONS)
            raise DataError(f"{self.datalist}: column {self.convention!r} holds {convention!r}. Use one of {need}.")
        return Files(
            name=person,
            images=tuple(path(name) for name in self.modalities),
            brain=path(self.brain),
            mask=path(self.mask),
            convention=convention,
        )

    def _starts(self, brain: Tensor, person: str) -> list[tuple[int, int, int]]:
        """The first voxel of every part, of a brain (X, Y, Z); it can lie outside the volume.

        Raises:
            DataError: parts that overlap although they go to different splits.
        """
        (left, right), (back, front), (low, high) = (_extent(brain, axis) for axis in range(3))
        x, y = (left + right - self.size) // 2, (back + front - self.size) // 2
        depth, step = self._sides[2], (high - low) / self.slabs
        along = [round(low + (part + 0.5) * step - depth / 2) for part in range(self.slabs)]
        if self.slab_splits is not None and any(after - z < depth for z, after in pairwise(along)):
            raise DataError(
                f"subject {person!r}: {self.slabs} slabs of {depth} voxels overlap in a brain of {high - low}, and "
                f"data.slab_splits needs them apart. Lower data.slabs, or data.depth to {int(step)} or less."
            )
        return [(x, y, z) for z in along]


def _extent(brain: Tensor, axis: int) -> tuple[int, int]:
    """First voxel of the brain (X, Y, Z) along an axis, and the one after its last."""
    found = brain.movedim(axis, 0).flatten(1).any(1).nonzero()
    return int(found[0]), int(found[-1]) + 1


def _cut(volume: Tensor, starts: tuple[int, int, int], sides: tuple[int, int, int]) -> Tensor:
    """The part (..., *sides) of a volume (..., X, Y, Z); zeros beyond its border."""
    placed = zip(starts, sides, volume.shape[-3:], strict=True)
    margins = [(-start, start + side - length) for start, side, length in placed]  # below 0: cut away
    return torch.nn.functional.pad(volume, [margin for pair in reversed(margins) for margin in pair])
