"""The data list of a prepared set: its rows, the splits that publishers leave out, and what is told of it."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from medfl.data.datalist import Row
from medfl.data.splits import check_patients
from medfl.errors import DataError
from medfl.prepare.contents import Contents
from medfl.seeding import key

PER_IMAGE = "the publishers name no patients: each image counts as one patient"
Draw = Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a recipe makes of a download.

    Attributes:
        rows: cells by column; in the columns `files` the names that the download has, "" for none.
        labels: one column of classes, or several of 0, 1 and "" (unknown).
        drawn: masks that are made: their path below the folder, which rows name too, -> their pixels (H, W).
        left_out: reason -> how many.
        command: what the next command needs besides data.root.
    """

    rows: list[Row]
    files: tuple[str, ...]
    labels: tuple[str, ...] = ()
    drawn: Mapping[str, Draw] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()
    command: tuple[str, ...]


def with_splits(table: Table, val: float) -> Table:
    """The same with train, val and test in the column `split`, or with empty cells, to be assigned when it is read.

    A lone published validation split is the only one to test on, so it becomes `test`. Images that lack a mask where
    others have one are for training.

    Args:
        val: share of the training patients for validation, where the publishers have a test split alone.

    Raises:
        DataError: a patient in several splits.
    """
    spare = [row | {"split": "train"} for row in table.rows if row.get("mask") == ""]
    rows = [row for row in table.rows if row.get("mask") != ""] or spare
    given = {row["split"] for row in rows}
    note = f"published splits: {', '.join(sorted(filter(None, given))) or 'none'}"
    if given <= {"train"}:
        rows = [row | {"split": ""} for row in rows]
    if given == {"train", "val"}:
        rows = [row | {"split": "test" if row["split"] == "val" else "train"} for row in rows]
        note += "; val is the only part to test on and becomes test"
    if {row["split"] for row in rows} == {"train", "test"}:
        chosen = _drawn({row["patient"] for row in rows if row["split"] == "train"}, val)
        rows = [row | {"split": "val"} if row["patient"] in chosen else row for row in rows]
        note += f"; val is {val:.0%} of the training patients"
    if any(not row["split"] for row in rows):
        note += "; empty cells are assigned by patient when the data are read: 70 % train, 10 % val, 20 % test"
    if len(rows) < len(table.rows):
        rows += spare
        note += f"; the {len(spare)} without a mask are for training"
    _check(rows)
    return replace(table, rows=rows, notes=(*table.notes, note))


def _check(rows: Sequence[Row]) -> None:
    check_patients([row["patient"] for row in rows], [row["split"] for row in rows])


def _drawn(patients: set[str], share: float) -> set[str]:
    """At least one of two patients or more, in an order that depends on no other patient."""
    ranked = sorted(patients, key=lambda patient: key("validation", patient))
    return set(ranked[: min(max(1, round(share * len(ranked))), len(ranked) - 1)])


def datalist(table: Table, places: Mapping[str, str]) -> bytes:
    """The CSV file; `places` says where each named file lies, below its folder."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(table.rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        writer.writerow(row | {column: places.get(row[column], row[column]) for column in table.files})
    return text.getvalue().encode()


def summary(name: str, table: Table) -> list[str]:
    """What was found, in lines."""
    images = sum(1 for row in table.rows for column in table.files if column != "mask" and row[column])
    patients = len({row["patient"] for row in table.rows})
    lines = [f"{name}: {images:,} images of {patients:,} patients"]
    if table.labels:
        lines.append(f"  classes   {_counted(_classes(table))}")
    if "mask" in table.files:
        lines.append(f"  masks     {sum(bool(row['mask']) for row in table.rows):,}")
    lines.append(f"  splits    {_counted(Counter(row['split'] or 'to be assigned' for row in table.rows))}")
    if "site" in table.rows[0]:
        lines.append(f"  sites     {_counted(Counter(row['site'] for row in table.rows))}")
    lines += [f"  left out  {count:,} {reason}" for reason, count in table.left_out.items() if count]
    return lines + [f"  note      {note}" for note in table.notes]


def _classes(table: Table) -> Counter[str]:
    if len(table.labels) == 1:
        return Counter(row[table.labels[0]] or "unknown" for row in table.rows)
    return Counter({label: sum(row[label] == "1" for row in table.rows) for label in table.labels})


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def entries(contents: Contents, name: str, *columns: str) -> list[Row]:
    """The rows of a published CSV table; its names and cells without surrounding spaces.

    Raises:
        DataError: a column is not there.
    """
    reader = csv.DictReader(io.StringIO(contents.text(name), newline=""))
    found = [(column or "").strip() for column in reader.fieldnames or ()]
    if missing := [column for column in columns if column not in found]:
        raise DataError(f"{name}: has no column {missing[0]!r}, only {', '.join(found[:20])}. Get the table anew.")
    return [{(key or "").strip(): (value or "").strip() for key, value in row.items() if key} for row in reader]


def lines(contents: Contents, name: str) -> list[str]:
    """The entries of a published list, one per line."""
    return [line.strip() for line in contents.text(name).splitlines() if line.strip()]
