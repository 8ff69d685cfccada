"""Train, validation and test, by patient: no patient is ever in two of them."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence

from medfl.data.sample import SPLITS, Records
from medfl.errors import DataError
from medfl.seeding import key

VAL, TEST = 0.1, 0.2


def check_patients(patients: Sequence[str], splits: Sequence[str]) -> None:
    """Refuse given splits that share patients.

    Raises:
        DataError: with the number of such patients (their ids are not shown).
    """
    seen: dict[str, set[str]] = defaultdict(set)
    for patient, split in zip(patients, splits, strict=True):
        seen[patient].add(split or "unassigned")
    if shared := [found for found in seen.values() if len(found) > 1]:
        raise DataError(
            f"{len(shared)} of {len(seen)} patients are in more than one split "
            f"(the first in {', '.join(sorted(shared[0]))}). Move all images of a patient to one split, "
            "or set data.split=null to have splits assigned by patient."
        )


def assign(strata: Mapping[str, Hashable], seed: int) -> dict[str, str]:
    """A split for every patient: 70 % train, 10 % val, 20 % test within each stratum (such as a label at a
    site).

    Patients are ranked by a hash of (seed, patient), so that their order never matters. A stratum of two
    gives one patient to train and one to test; from four patients on, each split gets at least one.
    """
    members: dict[Hashable, list[str]] = defaultdict(list)
    for patient in sorted(strata, key=lambda patient: key(seed, "split", patient)):
        members[strata[patient]].append(patient)
    chosen = {}
    for ranked in members.values():
        count = len(ranked)
        test = max(round(TEST * count), int(count > 1))
        val = max(round(VAL * count), int(count > 3))
        for rank, patient in enumerate(ranked):
            chosen[patient] = SPLITS[2] if rank < test else SPLITS[1] if rank < test + val else SPLITS[0]
    return chosen


def complete(records: Records, labels: Mapping[str, int], seed: int, *, by_site: bool) -> list[str]:
    """The split of every image: the given one, else one assigned to its patient, within each label (and site).

    Args:
        labels: of each patient.

    Raises:
        DataError: a split without an image.
    """
    places: dict[str, str] = {}
    for patient, site in zip(records.patients, records.sites or records.patients, strict=True):
        places[patient] = min(site, places.get(patient, site)) if by_site else ""
    missing = {p for p, split in zip(records.patients, records.splits, strict=True) if not split}
    chosen = assign({patient: (places[patient], labels[patient]) for patient in missing}, seed)
    splits = [split or chosen[p] for p, split in zip(records.patients, records.splits, strict=True)]
    if absent := [split for split in SPLITS if split not in splits]:
        raise DataError(
            f"the data have no {absent[0]!r} images. Mark some in the split column, add patients, or set "
            "data.split=null to have splits assigned by patient."
        )
    return splits


def label_of_patient(patients: Sequence[str], labels: Sequence[int]) -> dict[str, int]:
    """The label that stands for each patient: of its known ones the rarest in the data.

    Rare labels are spread over splits and sites that way. -1 for a patient without a known label.
    """
    common = Counter(labels)
    held: dict[str, set[int]] = defaultdict(set)
    for patient, label in zip(patients, labels, strict=True):
        held[patient] |= {label} - {-1}
    return {patient: min(found, key=lambda x: (common[x], x), default=-1) for patient, found in held.items()}
