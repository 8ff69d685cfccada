"""Several findings in one image: a column of 0 and 1 for each, and the class that balances splits and sites."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from medfl.data.datalist import Row
from medfl.errors import DataError

NONE = "none"  # the class of an image without a finding
MOST, LONGEST = 40, 33  # findings, and letters of a name: more scores, or longer names of them, would not leave a site
CELLS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": -1, "-1": -1, "-1.0": -1}  # -1: CheXpert's "uncertain"


def score_name(finding: str) -> str:
    """As in the names of scores: "Pleural Other" is pleural_other."""
    return re.sub(r"[^a-z0-9_]", "_", finding.lower())


def usable(columns: object) -> bool:
    """Whether these columns can be findings: not too many, with short names that scores tell apart."""
    if not isinstance(columns, list | tuple) or not all(isinstance(column, str) for column in columns):
        return False
    names = {score_name(column) for column in columns}
    return 0 < len(names) == len(columns) <= MOST and NONE not in names and max(map(len, names)) <= LONGEST


def read(rows: Sequence[Row], columns: Sequence[str]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Findings (N, L) int8, 1 present, 0 absent, -1 unknown; the class of each image (N,); names of the L + 1 classes.

    The class is the rarest in the data of an image's findings, the last one where it has none, and -1 where none is
    known.

    Raises:
        DataError: a cell that is neither 0 nor 1 nor empty.
    """
    for row in rows:
        if strange := [column for column in columns if row[column] not in CELLS]:
            raise DataError(
                f"data.labels: column {strange[0]!r} has {row[strange[0]]!r}, need 1, 0, or for unknown -1 or an empty "
                "cell. Correct the data list, or name a column of classes in data.label."
            )
    found = torch.tensor([[CELLS[row[column]] for column in columns] for row in rows], dtype=torch.int8)
    present = found == 1
    rarity = torch.where(present, present.sum(0), len(rows) + 1)
    classes = torch.where(present.any(1), rarity.argmin(1), len(columns))
    classes[(found < 0).all(1)] = -1
    return found, classes, (*columns, NONE)
