"""What a data set is before and after it is divided among sites: plain containers, one tensor per split."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from medfl.errors import ConfigError

SPLITS = ("train", "val", "test")
SLAB = " slab "  # in the patient id of a slab, before its number
UNLABELLED = 255  # in every voxel of a mask that nobody has drawn


@dataclass(frozen=True)
class Records:
    """One data set in memory, before it is divided into sites. N images on one grid.

    Attributes:
        images: (N, C, *S) float32, nominally in [-1, 1]; S = (H, W) or (D, H, W). With `modalities` in [0, 1],
            background exactly 0: a modality that a subject lacks is a channel of zeros, and no other is.
        labels: (N,) int64 index into `classes`; -1 = unknown.
        patients: (N,) ids; they never leave the site.
        splits: (N,) "train" | "val" | "test", or "" = still to be assigned, by patient.
        sites: (N,) names of natural sites, or None.
        classes: at least two names, or () when there are no labels.
        spacing: mm along each axis of the grid.
        masks: (N, *S) uint8, or None. `UNLABELLED` in every voxel: not known for this image.
        modalities: the contrast in each channel, such as ("flair", "t1"), or () where channels are not contrasts.
        findings: (N, L) int8, 1 present, 0 absent, -1 unknown, or None. With them `classes` are the names of the
            findings and "none" at the end, and a label is the rarest finding of its image: splits, sites and shares of
            the labels are balanced by it, and nothing learns it.
        regions: what is scored in the masks, name -> the labels that make it up; {} without masks.

    Raises:
        ValueError: lengths, shapes, types or names that contradict each other.
    """

    images: Tensor
    labels: Tensor
    patients: tuple[str, ...]
    splits: tuple[str, ...]
    sites: tuple[str, ...] | None
    classes: tuple[str, ...]
    spacing: tuple[float, ...]
    masks: Tensor | None
    modalities: tuple[str, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    findings: Tensor | None = None

    def __post_init__(self) -> None:
        count, grid = len(self.images), tuple(self.images.shape[2:])
        lengths = {len(self.labels), len(self.patients), len(self.splits), len(self.sites or self.patients)}
        if lengths != {count}:
            raise ValueError(f"records: got {count} images, but columns of lengths {sorted(lengths)}.")
        if self.images.dtype != torch.float32 or self.labels.dtype != torch.int64:
            raise ValueError(f"records: got {self.images.dtype} and {self.labels.dtype}, need float32 and int64.")
        if len(self.spacing) != len(grid):
            raise ValueError(f"records: got a spacing of {len(self.spacing)} axes for a grid of {len(grid)}.")
        if self.masks is not None and tuple(self.masks.shape) != (count, *grid):
            raise ValueError(f"records: got masks {tuple(self.masks.shape)}, need {(count, *grid)}.")
        if (self.masks is None) == bool(self.regions):
            got = "no masks" if self.masks is None else "masks"
            raise ValueError(f"records: got {got} and the regions {dict(self.regions)}, need both or neither.")
        if self.findings is not None and tuple(self.findings.shape) != (count, len(self.classes) - 1):
            raise ValueError(
                f"records: got findings {tuple(self.findings.shape)}, need {(count, len(self.classes) - 1)}: "
                "a column for each class but the last."
            )
        if strange := set(self.splits) - {*SPLITS, ""}:
            raise ValueError(f"records: got split {sorted(strange)[0]!r}, need one of {', '.join(SPLITS)}.")
        if self.modalities and not (named(self.modalities) and len(self.modalities) == self.images.shape[1]):
            raise ValueError(
                f"records: got modalities {self.modalities} for {self.images.shape[1]} channels, "
                "need one name of a-z, 0-9 and _ for each, all different."
            )

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Split:
    """The images of one split at one site; shapes as in `Records`."""

    images: Tensor
    labels: Tensor
    patients: tuple[str, ...]
    masks: Tensor | None
    findings: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class SiteData:
    """Everything that one site holds. `held_out`: the site is evaluated, but never trains.

    `modalities` and `regions` as in `Records`: the names of all channels and regions, whatever this site has of them.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    spacing: tuple[float, ...]
    profile: str
    held_out: bool
    modalities: tuple[str, ...] = ()
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def findings(self) -> tuple[str, ...]:
        """What each image has or has not, by name; () where images are of one class each."""
        return () if self.train.findings is None else self.classes[:-1]

    @property
    def exclusive(self) -> tuple[str, ...]:
        """The classes of which each image has one; () where images have findings."""
        return () if self.findings else self.classes


class Source(Protocol):
    """Where records come from; what a node of the config group `data` builds."""

    @property
    def spatial_dims(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def size(self) -> int: ...
    def load(self) -> Records: ...


def choose(records: Records, rows: Sequence[int]) -> Split:
    """The given rows as one split."""
    index = torch.as_tensor(list(rows), dtype=torch.int64)
    return Split(
        images=records.images[index],
        labels=records.labels[index],
        patients=tuple(records.patients[row] for row in rows),
        masks=None if records.masks is None else records.masks[index],
        findings=None if records.findings is None else records.findings[index],
    )


def join(splits: Sequence[Split]) -> Split:
    """Several splits as one, in the given order."""
    masks = [split.masks for split in splits if split.masks is not None]
    findings = [split.findings for split in splits if split.findings is not None]
    return Split(
        images=torch.cat([split.images for split in splits]),
        labels=torch.cat([split.labels for split in splits]),
        patients=tuple(patient for split in splits for patient in split.patients),
        masks=torch.cat(masks) if len(masks) == len(splits) else None,
        findings=torch.cat(findings) if len(findings) == len(splits) else None,
    )


def stretch(split: Split, first: int, count: int) -> Split:
    """`count` images from the `first` on; what `join` put there."""
    rows = slice(first, first + count)
    return Split(
        images=split.images[rows],
        labels=split.labels[rows],
        patients=split.patients[rows],
        masks=None if split.masks is None else split.masks[rows],
        findings=None if split.findings is None else split.findings[rows],
    )


def slab_of(person: str, number: int) -> str:
    """The patient id of one slab of a person whose slabs are in several splits."""
    return f"{person}{SLAB}{number}"


def person_of(patient: str) -> str:
    """Whose slab it is; any other id as it is."""
    person, _, number = patient.rpartition(SLAB)
    return person if person and number.isdecimal() else patient


def class_counts(site: SiteData) -> dict[str, int]:
    """How many training images are of each class, or have each finding; those without one are "none"."""
    counts = {name: int((site.train.labels == place).sum()) for place, name in enumerate(site.classes)}
    if site.train.findings is not None:
        counts |= dict(zip(site.findings, (site.train.findings == 1).sum(0).tolist(), strict=True))
    return counts


def present(images: Tensor) -> Tensor:
    """Which modalities each image has, (B, M) bool, of images (B, M, *S): a missing one is 0 in every voxel."""
    return images.flatten(2).ne(0).any(2)


def labelled(masks: Tensor) -> Tensor:
    """Which masks are known, (B,) bool, of masks (B, *S)."""
    return masks.flatten(1).ne(UNLABELLED).all(1)


def named(modalities: Sequence[str]) -> bool:
    """Whether these can be names of modalities: all different, of lower-case letters, digits and _."""
    plain = all(isinstance(name, str) and re.fullmatch(r"[a-z0-9_]+", name) for name in modalities)
    return plain and len(set(modalities)) == len(modalities)


def require(where: str, limits: Mapping[str, tuple[object, bool, str]]) -> None:
    """Refuse the first setting that is not usable: name -> (got, usable, what is needed).

    Raises:
        ConfigError: naming the setting `where.name`.
    """
    for name, (got, usable, need) in limits.items():
        if not usable:
            raise ConfigError(f"{where}.{name}: got {got!r}, need {need}.")


def whole(value: object, least: int = 1) -> bool:
    """Whether a setting is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def number(value: object, least: float = 0.0) -> bool:
    """Whether a setting is a finite number of at least `least`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < float("inf")
