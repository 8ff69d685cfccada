"""What is protected at a site: its patients, or buckets of them."""

import hashlib
import hmac
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medfl.protection import Privacy


@dataclass(frozen=True)
class Units:
    """Who is sampled, clipped and noised as one.

    Attributes:
        patients: rows of the images of each patient.
        members: patients of each unit; one each for the mechanism patient.
        rate: probability that a unit takes part in a step.
    """

    patients: tuple[Tensor, ...]
    members: tuple[tuple[int, ...], ...]
    rate: float

    @property
    def expected(self) -> float:
        """Units of a step on average. The number of patients is public, as the enrolment tells it."""
        return self.rate * len(self.members)


def units_of(patients: Sequence[int] | Tensor, privacy: Privacy, *, batch: int, key: bytes) -> Units:
    """
    Args:
        patients: (N,) codes, equal for images of one patient.
        batch: training.batch_size: patients of a step on average.
        key: of the hash that puts patients into buckets; it must not depend on who else is there.
    """
    rows = rows_of(patients)
    images, (count, rate) = tuple(rows.values()), sampling(privacy, len(rows), batch)
    if privacy.mechanism == "patient":
        return Units(images, tuple((place,) for place in range(count)), rate)
    buckets: list[list[int]] = [[] for _ in range(count)]
    for place, patient in enumerate(rows):
        buckets[bucket_of(patient, count, key)].append(place)
    return Units(images, tuple(tuple(bucket) for bucket in buckets), rate)


def rows_of(patients: Sequence[int] | Tensor) -> dict[int, Tensor]:
    """Patient -> rows of its images, in the order of their first ones."""
    rows: dict[int, list[int]] = {}
    for row, patient in enumerate(patients.tolist() if isinstance(patients, Tensor) else patients):
        rows.setdefault(int(patient), []).append(row)
    return {patient: torch.tensor(found) for patient, found in rows.items()}


def sampling(privacy: Privacy, patients: int, batch: int) -> tuple[int, float]:
    """How many units so many patients make, and the probability that one takes part in a step."""
    size = 1 if privacy.mechanism == "patient" else privacy.bucket
    count = math.ceil(patients / size)
    return count, min(1.0, batch / size / count)


def bucket_of(patient: int, buckets: int, key: bytes) -> int:
    """A keyed hash of the patient alone: whoever else comes or goes, it stays where it is."""
    digest = hmac.digest(key, str(patient).encode(), hashlib.sha256)
    return int.from_bytes(digest[:8], "big") % buckets


def bucket_key(path: Path) -> bytes:
    """The site's own key of the buckets, made at the first use; it never leaves."""
    from medfl.files import write_bytes

    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(path, os.urandom(32))
        path.chmod(0o600)
    return path.read_bytes()
