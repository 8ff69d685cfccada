"""A CSV data list: rows of text with known columns, and what its cells mean."""

import csv
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from medfl.errors import DataError

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLIT_WORDS |= {"test": "test", "testing": "test", "": ""}

Row = dict[str, str]


def read_rows(root: Path, name: str, columns: Mapping[str, str | None], *, one: str) -> list[Row]:
    """The rows of the data list `root/name`, cells without surrounding spaces.

    Args:
        columns: setting under `data` -> the column that it names, or None.
        one: what a row stands for, such as "image".

    Raises:
        DataError: no such folder, list or column, or no rows.
    """
    if not root.is_dir():
        raise DataError(f"data.root: {str(root)!r} is not a folder. Give the folder that holds the images.")
    path, wanted = root / name, [column for column in columns.values() if column is not None]
    if not path.is_file():
        found = sorted(p.name for p in root.glob("*.csv"))
        raise DataError(
            f"data.datalist: {str(path)!r} does not exist (CSV there: {', '.join(found) or 'none'}). "
            f"Write one with a row per {one} and a column {wanted[0]!r}."
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
        _check_columns(path, list(reader.fieldnames or ()), columns)
    if not rows:
        raise DataError(f"{path}: has no rows. Add one per {one}.")
    return rows


def _check_columns(path: Path, found: list[str], columns: Mapping[str, str | None]) -> None:
    for name, column in columns.items():
        if column is None or column in found:
            continue
        near = difflib.get_close_matches(column, found, n=3, cutoff=0.5) or found
        raise DataError(f"{path}: has no column {column!r}. Set data.{name} to one of: {', '.join(near)}.")


def cells(datalist: str, rows: list[Row], column: str | None, or_else: Callable[[Row], str] | None) -> tuple[str, ...]:
    """The values of a column; an empty one is taken from `or_else`.

    Raises:
        DataError: an empty cell and no `or_else`.
    """
    values = [(row[column] if column else "") or (or_else(row) if or_else else "") for row in rows]
    if empty := sum(not value for value in values):
        raise DataError(f"{datalist}: column {column!r} is empty in {empty} of {len(rows)} rows. Fill it.")
    return tuple(values)


def split_of(datalist: str, row: Row, column: str | None) -> str:
    """ "train", "val" or "test", or "" = to be assigned.

    Raises:
        DataError: another word.
    """
    word = row[column].lower() if column else ""
    if word not in SPLIT_WORDS:
        raise DataError(f"{datalist}: column {column!r} holds {word!r}. Use train, val, test or leave it empty.")
    return SPLIT_WORDS[word]
