"""The ten tasks of the Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022)."""

import json
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from medfl.data.datalist import Row
from medfl.data.folder import LONGEST
from medfl.errors import DataError
from medfl.prepare.contents import Contents
from medfl.prepare.table import PER_IMAGE, Table


def decathlon(contents: Contents) -> Table:
    """All cases that dataset.json lists and that are there; the publishers keep the masks of imagesTs."""
    name = contents.one(r"dataset\.json", "dataset.json")
    home, task = PurePosixPath(name).parent, _read(contents, name)
    pairs = [(case["image"], case["label"]) for case in task["training"]] + [(case, "") for case in task["test"]]
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    for image, mask in pairs:
        found = [(home / file).as_posix() if file else "" for file in (image, mask)]
        if all(file in contents.files for file in found if file):
            case = PurePosixPath(image).name.partition(".")[0]
            rows.append({"image": found[0], "mask": found[1], "patient": case, "split": ""})
        else:
            left_out["cases of dataset.json whose files are not there"] += 1
    regions = ", ".join(f"{region}: [{value}]" for region, value in regions_of(task["labels"]).items())
    return Table(
        rows=rows,
        files=("image", "mask"),
        left_out=left_out,
        notes=(PER_IMAGE, f"masks: {{{regions}}}; channels: {', '.join(task['modality'].values())}"),
        command=("experiment=decathlon", f"data.channels={len(task['modality'])}", f"'data.regions={{{regions}}}'"),
    )


def regions_of(labels: dict[str, str]) -> dict[str, int]:
    """A usable name for each label but the background, and its number in the masks."""
    plain = {int(value): re.sub("[^a-z0-9]+", "_", text.lower()).strip("_") for value, text in labels.items()}
    return {(text or f"label_{value}")[:LONGEST]: value for value, text in plain.items() if value}


def _read(contents: Contents, name: str) -> dict[str, Any]:
    try:
        task = json.loads(contents.text(name))
        cases = [case["image"] + case["label"] for case in task["training"]] + ["".join(task["test"])]
        labels = regions_of(task["labels"]) and [str(text) for text in task["modality"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{name}: is not the Decathlon's ({type(error).__name__}: {error}). Need the lists training and test, and "
            "modality and labels by number. Take the file from the task's archive."
        ) from error
    if not cases or not labels:
        raise DataError(f"{name}: names no case, no label or no modality. Take the file from the task's archive.")
    found: dict[str, Any] = task
    return found
