"""Few labels: whose labels may be read, when only a share of the patients has any."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from medfl import seeding
from medfl.data.sample import Split, labelled
from medfl.data.splits import label_of_patient


def labels_key(seed: int, site: str) -> int:
    """Of the order in which a site's patients get their labels: the same for every arm and protocol."""
    return seeding.key(seed, "labels", site)


def rows_with_labels(split: Split, fraction: float, *, least: int, key: int, alone: bool = False) -> Tensor:
    """Rows (R,) of the patients of each class whose labels are given, those of unknown label left out.

    A patient comes with all images. The order of the patients depends on the key and their ids alone: so every arm
    has the same, and a smaller share is part of a larger one.

    Args:
        fraction: of the patients of each class, in (0, 1].
        least: patients of each class, however small the share.
        alone: each patient is chosen by its own id, with the probability `fraction`, whoever else there is: so a
            patient more changes nothing for the others, as differential privacy counts on. `least` has no part in it.
    """
    classes = label_of_patient(split.patients, split.labels.tolist())
    return _rows(split, split.labels >= 0, _chosen(classes, fraction, least, key, alone))


def rows_with_masks(split: Split, fraction: float, *, least: int, key: int, alone: bool = False) -> Tensor:
    """As `rows_with_labels`, of the patients with a known mask, who are all of one class."""
    if split.masks is None:
        return torch.empty(0, dtype=torch.int64)
    known = labelled(split.masks)
    drawn = {patient: 0 for patient, there in zip(split.patients, known.tolist(), strict=True) if there}
    return _rows(split, known, _chosen(drawn, fraction, least, key, alone))


def _chosen(classes: Mapping[str, int], fraction: float, least: int, key: int, alone: bool) -> set[str]:
    if alone:
        return {patient for patient, kind in classes.items() if kind >= 0 and seeding.share(key, patient) < fraction}
    members: dict[Hashable, list[str]] = {}
    for patient in sorted(classes, key=lambda patient: seeding.key(key, patient)):
        if classes[patient] >= 0:
            members.setdefault(classes[patient], []).append(patient)
    return {patient for ranked in members.values() for patient in ranked[: _count(ranked, fraction, least)]}


def _count(patients: Sequence[str], fraction: float, least: int) -> int:
    return max(least, round(fraction * len(patients)))


def _rows(split: Split, known: Tensor, chosen: set[str]) -> Tensor:
    given = torch.tensor([patient in chosen for patient in split.patients], dtype=torch.bool)
    return torch.nonzero(known & given)[:, 0]
