"""Chest X-rays with outlined findings: SIIM-ACR Pneumothorax (Kaggle 2019) and RSNA Pneumonia (Kaggle 2018).

Images without a finding have an empty mask, which is one file for all of them.
"""

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from medfl.data.datalist import Row
from medfl.errors import DataError
from medfl.prepare.contents import Contents, Missing
from medfl.prepare.table import PER_IMAGE, Draw, Table, entries

SIDE = 1024  # pixels of all images of both challenges
INSIDE = 255
BOX = ("x", "y", "width", "height")
EMPTY = "masks/none.png"
ABSENT = "annotated images that are not there"
NOT_ANNOTATED = "images without an annotation"
FROM_NIH = "all images are NIH ChestX-ray14's: an encoder pretrained there has seen them, without their masks"


def siim(contents: Contents) -> Table:
    """The challenge's DICOM files with run-length masks, or the PNG files of the re-release on Kaggle."""
    tables = contents.matching(r"stage_1_(train|test)_images\.csv")
    rows, drawn, left_out = _siim_png(contents, tables) if tables else _siim_dicom(contents)
    return Table(
        rows=rows,
        files=("image", "mask"),
        labels=("label",),
        drawn=drawn,
        left_out=left_out,
        notes=(PER_IMAGE, FROM_NIH),
        command=("experiment=dissect_table4_siim",),
    )


def _siim_png(
    contents: Contents, tables: Sequence[tuple[str, object]]
) -> tuple[list[Row], dict[str, Draw], Counter[str]]:
    folders: dict[str, dict[str, str]] = {
        folder: {PurePosixPath(name).name: name for name, _ in contents.matching(rf"{folder}/[^/]+\.png")}
        for folder in ("png_images", "png_masks")
    }
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    for table, _ in tables:
        split = "test" if "_test_" in PurePosixPath(table).name else "train"
        for entry in entries(contents, table, "new_filename", "ImageId", "has_pneumo"):
            image, mask = (files.get(entry["new_filename"]) for files in folders.values())
            if image is None or mask is None:
                left_out[ABSENT] += 1
                continue
            rows.append(_row(image, mask, _pneumothorax(entry["has_pneumo"] == "1"), entry["ImageId"], split))
    return rows, {}, left_out


def _siim_dicom(contents: Contents) -> tuple[list[Row], dict[str, Draw], Counter[str]]:
    table = _newest(contents)
    images = {PurePosixPath(name).stem: name for name, _ in reversed(contents.matching(r"[^/]+\.dcm"))}
    if not images:
        raise Missing("DICOM file")
    runs: dict[str, list[str]] = defaultdict(list)
    for entry in entries(contents, table, "ImageId", "EncodedPixels"):
        runs[entry["ImageId"]].append(entry["EncodedPixels"])
    drawn: dict[str, Draw] = {}
    rows: list[Row] = []
    for image in sorted(images.keys() & runs.keys()):
        found = [code for code in runs[image] if code != "-1"]
        mask = f"masks/{image}.png" if found else EMPTY
        drawn[mask] = functools.partial(from_runs, found, image)
        split = "test" if "dicom-images-test" in images[image] else "train"
        rows.append(_row(images[image], mask, _pneumothorax(bool(found)), image, split))
    return (
        rows,
        drawn,
        Counter({ABSENT: len(runs.keys() - images.keys()), NOT_ANNOTATED: len(images.keys() - runs.keys())}),
    )


def _newest(contents: Contents) -> str:
    """The annotations of stage 2 hold those of stage 1 and of its test images."""
    found = contents.matching(r"stage_2_train\.csv") or contents.matching(r"train-rle\.csv")
    if not found:
        raise Missing("train-rle.csv, stage_2_train.csv or stage_1_train_images.csv")
    return found[0][0]


def _row(image: str, mask: str, label: str, patient: str, split: str) -> Row:
    return {"image": image, "mask": mask, "label": label, "patient": patient, "split": split}


def _pneumothorax(found: bool) -> str:
    return "pneumothorax" if found else "none"


def from_runs(codes: Sequence[str], name: str) -> NDArray[np.uint8]:
    """A mask (H, W), 0 or 255, of run-length codes, columns first: pairs of pixels skipped since the last run, and
    pixels in the run (`mask_functions.py` of the challenge).

    Raises:
        DataError: a code that is no list of pairs, or that leaves the image.
    """
    mask = np.zeros(SIDE * SIDE, np.uint8)
    for code in codes:
        try:
            pairs = np.array(code.split(), dtype=np.int64).reshape(-1, 2)
        except ValueError as error:
            raise DataError(
                f"{name}: its run-length code is no list of pairs of numbers. Get the table anew."
            ) from error
        ends = pairs.ravel().cumsum()[1::2]
        if (pairs < 0).any() or (ends > mask.size).any():
            raise DataError(
                f"{name}: its run-length code leaves an image of {SIDE} x {SIDE} pixels. Get the table anew."
            )
        for end, (_, length) in zip(ends, pairs, strict=True):
            mask[end - length : end] = INSIDE
    return mask.reshape(SIDE, SIDE).T


def rsna(contents: Contents) -> Table:
    """The DICOM files of stage 2; boxes become masks. With the mapping to NIH's files the patients are NIH's."""
    table = contents.one(r"stage_2_train_labels\.csv", "stage_2_train_labels.csv")
    images = {
        PurePosixPath(name).stem: name for name, _ in reversed(contents.matching(r"stage_2_train_images/[^/]+\.dcm"))
    }
    if not images:
        raise Missing("DICOM file in stage_2_train_images")
    boxes: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for entry in entries(contents, table, "patientId", *BOX, "Target"):
        box = [tuple(float(entry[side]) for side in BOX)] if entry["Target"] == "1" else []
        boxes[entry["patientId"]] += box
    people, classes = _nih_patients(contents), _classes(contents)
    drawn: dict[str, Draw] = {}
    rows: list[Row] = []
    for image in sorted(images.keys() & boxes.keys()):
        mask = f"masks/{image}.png" if boxes[image] else EMPTY
        drawn[mask] = functools.partial(from_boxes, boxes[image])
        label = classes.get(image, "Lung Opacity" if boxes[image] else "No Lung Opacity")
        rows.append(_row(images[image], mask, label, people.get(image, image), ""))
    return Table(
        rows=rows,
        files=("image", "mask"),
        labels=("label",),
        drawn=drawn,
        left_out=Counter({ABSENT: len(boxes.keys() - images.keys()), NOT_ANNOTATED: len(images.keys() - boxes.keys())}),
        notes=("patients are those of NIH ChestX-ray14" if people else f"{PER_IMAGE}; {MAPPING}", FROM_NIH),
        command=("experiment=dissect_table4_rsna",),
    )


MAPPING = "pneumonia-challenge-dataset-mappings_2018.json (RSNA's page) names those of NIH: put it into from="


def _nih_patients(contents: Contents) -> Mapping[str, str]:
    found = contents.matching(r"pneumonia-challenge-dataset-mappings[^/]*\.json")
    if not found:
        return {}
    try:
        images = json.loads(contents.text(found[0][0]))
        return {image["subset_img_id"]: str(image["img_id"]).partition("_")[0] for image in images}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{found[0][0]}: is not RSNA's list of images ({error!r}). Get it anew, or remove it."
        ) from error


def _classes(contents: Contents) -> Mapping[str, str]:
    found = contents.matching(r"stage_2_detailed_class_info\.csv")
    rows = entries(contents, found[0][0], "patientId", "class") if found else []
    return {row["patientId"]: row["class"] for row in rows}


def from_boxes(boxes: Sequence[tuple[float, ...]]) -> NDArray[np.uint8]:
    """A mask (H, W), 0 or 255, of boxes (x, y, width, height) in pixels from the upper left corner."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for x, y, width, height in boxes:
        mask[round(y) : round(y + height), round(x) : round(x + width)] = INSIDE
    return mask
