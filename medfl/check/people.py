"""Findings on the data list: patients, splits, labels, and whether they are enough."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch

from medfl.check.finding import NOTHING, Finding, State
from medfl.check.listing import Listing
from medfl.data import findings as multilabel
from medfl.data.datalist import SPLIT_WORDS
from medfl.data.folder import Folder, read_labels
from medfl.data.sample import SPLITS, Records
from medfl.data.splits import complete, label_of_patient
from medfl.errors import DataError

LEAST_PATIENTS = 5  # of a class, for its scores to mean something


def splits_of(listing: Listing, seed: int) -> tuple[list[str], str]:
    """The split of every row as the product would give it, and why it cannot, "" where it can."""
    given = [SPLIT_WORDS.get(word.lower(), "") for word in listing.column("split")]
    labels, _, _ = labels_of(listing)
    records = Records(
        torch.zeros(len(given), 1, 1, 1), torch.tensor(labels), tuple(listing.patients), tuple(given), None, (),
        (1.0, 1.0), None,
    )  # fmt: skip
    try:
        return complete(records, label_of_patient(records.patients, labels), seed, by_site=False), ""
    except DataError as error:
        return [split or "train" for split in given], str(error)


def labels_of(listing: Listing) -> tuple[list[int], tuple[str, ...], list[int]]:
    """The class of every row (-1: unknown), the classes, and the rows whose label is none of them."""
    cells, source = listing.column("label"), listing.source
    if columns := getattr(source, "labels", None):
        try:
            _, found, classes = multilabel.read(listing.rows, columns)
        except DataError:
            return [-1] * len(cells), (), []
        return found.tolist(), classes, []
    expected = getattr(source, "classes", None)
    if expected is None:
        try:
            found, classes = read_labels(cells, None)
        except DataError:
            return [-1] * len(cells), (), []
        return found.tolist(), classes, []
    labels, strange = [], []
    for row, cell in enumerate(cells):
        try:
            labels.append(int(read_labels([cell], expected)[0][0]))
        except DataError:
            labels.append(-1)
            strange.append(row)
    return labels, tuple(map(str, expected)), strange


def findings(listing: Listing, usable: Sequence[int], *, least: int, seed: int) -> list[Finding]:
    """
    Args:
        usable: rows with an image that can be used.
        least: training images that the policy asks for.
    """
    splits, problem = splits_of(listing, seed)
    found = [*_patients(listing), _words(listing), _overlap(listing), _parts(splits, problem, usable)]
    found.append(_enough(splits, usable, least))
    if isinstance(listing.source, Folder) and ("label" in listing.columns or listing.source.labels):
        found += _labels(listing, splits, usable)
    if not isinstance(listing.source, Folder):
        found.append(_modalities(listing))
    return found


def _patients(listing: Listing) -> list[Finding]:
    count, rows = len(set(listing.patients)), len(listing.rows)
    counts: Mapping[str, int] = {"patients": count, "rows": rows}
    if "patient" not in listing.columns:
        why = "Two images of one patient may end up in training and test: scores would be too good."
        fix = "Add a column with a pseudonym of the patient, and name it in data.patient."
        what = "The data list has no patients: every image counts as one."
        return [Finding("data", "patients", "warn", what, why, fix, counts)]
    empty = [f"row {row + 2}" for row, cell in enumerate(listing.column("patient")) if not cell]
    found = [Finding("data", "patients", "pass", f"{rows} rows of {count} patients", counts=counts)]
    if empty:
        what, why = f"{len(empty)} of {rows} rows name no patient", "Each counts as a patient of its own."
        counts = {**counts, "empty": len(empty)}
        found = [Finding("data", "patients", "warn", what, why, "Fill the column.", counts, empty)]
    return found


def _words(listing: Listing) -> Finding:
    odd = [
        f"row {row + 2}: {word}" for row, word in enumerate(listing.column("split")) if word.lower() not in SPLIT_WORDS
    ]
    if odd:
        what, fix = (
            f"{len(odd)} of {len(listing.rows)} rows name an unknown split",
            "Use train, val, test, or leave the cell empty.",
        )
        why = "The product refuses the data list."
        return Finding("data", "split words", "fail", what, why, fix, {"rows": len(odd)}, odd)
    return Finding("data", "split words", "pass", NOTHING, counts={"rows": 0})


def _overlap(listing: Listing) -> Finding:
    seen: dict[str, set[str]] = defaultdict(set)
    for patient, word in zip(listing.patients, listing.column("split"), strict=True):
        seen[patient].add(SPLIT_WORDS.get(word.lower(), word))
    several = {patient: sorted(word or "none" for word in words) for patient, words in seen.items() if len(words) > 1}
    shared = [f"{patient}: {', '.join(words)}" for patient, words in several.items()]
    counts = {"patients": len(shared), "of": len(seen)}
    if not shared:
        return Finding("data", "patient overlap", "pass", NOTHING, counts=counts)
    what, why = f"{len(shared)} of {len(seen)} patients are in two splits", "What is tested was trained on."
    fix = "Move all images of a patient to one split, or set data.split: null."
    return Finding("data", "patient overlap", "fail", what, why, fix, counts, shared)


def _parts(splits: Sequence[str], problem: str, usable: Sequence[int]) -> Finding:
    counted = Counter(splits[row] for row in usable)
    counts = {split: counted[split] for split in SPLITS}
    what = ", ".join(f"{counts[split]} {split}" for split in SPLITS) + " images"
    if problem or not all(counts.values()):
        why, fix = "Every site trains, chooses and tests on images of its own.", "Add patients, or data.split: null."
        return Finding("data", "splits", "fail", what, why, fix, counts, [problem] if problem else [])
    return Finding("data", "splits", "pass", what, counts=counts)


def _enough(splits: Sequence[str], usable: Sequence[int], least: int) -> Finding:
    train = sum(splits[row] == "train" for row in usable)
    counts = {"train": train, "least": least}
    what = f"{train} training images, the policy asks for {least}"
    if train >= least:
        return Finding("data", "number", "pass", what, counts=counts)
    why = "Of few images, an update could give away single ones."
    fix = "Add images. Or lower policy.least_images, knowing why."
    return Finding("data", "number", "fail", what, why, fix, counts)


def _labels(listing: Listing, splits: Sequence[str], usable: Sequence[int]) -> list[Finding]:
    labels, classes, strange = labels_of(listing)
    known = sum(label >= 0 for label in labels)
    counts: dict[str, float | int] = {"rows": len(labels), "known": known, "strange": len(strange)}
    if strange:
        items = [f"row {row + 2}: {listing.column('label')[row]}" for row in strange]
        what = f"{len(strange)} of {len(labels)} labels are not among data.classes"
        why = "Training with labels stops at them."
        fix = "Correct them, or add them to data.classes."
        first = Finding("data", "labels", "fail", what, why, fix, counts, items)
    elif not classes:
        items = [_refusal(listing)]
        what, why = "The column of labels holds no classes", "Nothing can be predicted from it."
        first = Finding("data", "labels", "fail", what, why, "Name another column in data.label.", counts, items)
    else:
        what = f"{known} of {len(labels)} rows have a label, of {len(classes)} classes"
        first = Finding("data", "labels", "pass" if known else "warn", what, counts=counts)
    return [first, _classes(listing, labels, classes, splits, usable)] if classes else [first]


def _refusal(listing: Listing) -> str:
    columns = getattr(listing.source, "labels", None)
    try:
        if columns:
            multilabel.read(listing.rows, columns)
        else:
            read_labels(listing.column("label"), None)
    except DataError as error:
        return str(error)
    return "every cell is empty"


def _classes(
    listing: Listing, labels: Sequence[int], classes: Sequence[str], splits: Sequence[str], usable: Sequence[int]
) -> Finding:
    patients = listing.patients
    held: dict[tuple[str, int], set[str]] = defaultdict(set)
    for row in usable:
        held[splits[row], labels[row]].add(patients[row])
    counts = {f"class_{n}_{split}": len(held[split, n]) for n in range(len(classes)) for split in ("train", "test")}
    few = [
        f"{classes[n]}: {len(held[split, n])} patients in {split}"
        for n in range(len(classes))
        for split in ("train", "test")
        if len(held[split, n]) < (LEAST_PATIENTS if split == "train" else 1)
    ]
    totals = ", ".join(f"{name} {len(held['train', n])}" for n, name in enumerate(classes))
    state: State = "warn" if few else "pass"
    why, fix = ("Scores of a rare class are chance.", "Add patients of it, if there are any.") if few else ("", "")
    return Finding("data", "classes", state, f"training patients of each class: {totals}", why, fix, counts, few)


def _modalities(listing: Listing) -> Finding:
    held = {column: sum(bool(row[column]) for row in listing.rows) for column in listing.images}
    bare = [f"row {n + 2}" for n, row in enumerate(listing.rows) if not any(row[column] for column in listing.images)]
    what = "subjects with each modality: " + ", ".join(f"{column} {count}" for column, count in held.items())
    counts = {f"modality_{n}": count for n, count in enumerate(held.values())} | {"without_any": len(bare)}
    if bare:
        why, fix = "A subject without any image stops training.", "Remove the rows."
        return Finding("data", "modalities", "fail", what, why, fix, counts, bare)
    if not all(held.values()):
        why, fix = "This site cannot teach what it has nothing of.", "Is the column filled as it should be?"
        return Finding("data", "modalities", "warn", what, why, fix, counts)
    return Finding("data", "modalities", "pass", what, counts=counts)
