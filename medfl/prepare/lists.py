"""Splits that authors publish as text files of names."""

from pathlib import PurePosixPath

from medfl.prepare.contents import Contents
from medfl.prepare.table import lines

LISTS = {"train": r"train\.txt", "val": r"val(?:id)?\.txt", "test": r"test\.txt"}


def listed(contents: Contents) -> dict[str, str]:
    """Name without ending -> split, of the lists that are there; {} without a training list."""
    files = {split: contents.matching(pattern) for split, pattern in LISTS.items()}
    if not files["train"]:
        return {}
    return {
        PurePosixPath(line).name.partition(".")[0]: split
        for split, found in files.items()
        for name, _ in found[:1]
        for line in lines(contents, name)
    }
