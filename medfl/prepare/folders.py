"""Sets that are known by the names of their folders: COVID-19 Radiography (Chowdhury et al. 2020, Rahman et al. 2021),
ISIC 2018 (Codella et al. 2019, Tschandl et al. 2018) and Kvasir-SEG (Jha et al. 2020).
"""

from collections import Counter
from pathlib import PurePosixPath

from medfl.data.datalist import Row
from medfl.prepare.contents import Contents, Missing
from medfl.prepare.lists import listed
from medfl.prepare.table import PER_IMAGE, Table, entries

COVID = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
PARTS = {"Training": "train", "Validation": "val", "Test": "test"}
NO_MASK = "images without a mask"


def covid_radiography(contents: Contents) -> Table:
    """Four classes, each a folder. The lungs' masks have another grid than the images and are left out."""
    rows: list[Row] = []
    for folder in COVID:
        for name, _ in contents.matching(rf"{folder}/images/[^/]+\.png"):
            rows.append({"image": name, "label": folder, "patient": PurePosixPath(name).stem, "split": ""})
    if missing := sorted(set(COVID) - {row["label"] for row in rows}):
        raise Missing(f"folder {missing[0]}/images with PNG files")
    return Table(
        rows=rows,
        files=("image",),
        labels=("label",),
        left_out=Counter({"masks of lungs, on another grid": len(contents.matching(r"masks/[^/]+\.png"))}),
        notes=(PER_IMAGE, "each class comes from other hospitals: a model can tell them by the machine"),
        command=("experiment=dcl_table1",),
    )


def isic2018(contents: Contents, *, task: str) -> Table:
    """Task 1, outlines of lesions, or task 3, seven diagnoses; training, validation and test as they are there."""
    return _diagnoses(contents) if task == "classification" else _outlines(contents)


def _outlines(contents: Contents) -> Table:
    masks = {
        found[1]: name
        for name, found in contents.matching(r"ISIC2018_Task1_\w+_GroundTruth[^/]*/(ISIC_\d+)_segmentation\.png")
    }
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    for name, found in contents.matching(r"ISIC2018_Task1-2_(Training|Validation|Test)_Input[^/]*/(ISIC_\d+)\.jpg"):
        if found[2] in masks:
            split = PARTS[found[1].capitalize()]
            rows.append({"image": name, "mask": masks[found[2]], "patient": found[2], "split": split})
        else:
            left_out[NO_MASK] += 1
    if not rows:
        raise Missing("pair of ISIC2018_Task1-2_Training_Input and ISIC2018_Task1_Training_GroundTruth")
    return Table(
        rows=rows,
        files=("image", "mask"),
        left_out=left_out,
        notes=(PER_IMAGE,),
        command=("experiment=dcl_table2",),
    )


def _diagnoses(contents: Contents) -> Table:
    names: dict[str, str] = {}
    for table, _ in contents.matching(r"ISIC2018_Task3_\w+_GroundTruth\.csv"):
        for entry in entries(contents, table, "image"):
            names[entry["image"]] = next(label for label, cell in entry.items() if label != "image" and float(cell))
    lesions = {
        entry["image"]: entry["lesion_id"]
        for table, _ in contents.matching(r"ISIC2018_Task3_Training_LesionGroupings\.csv")
        for entry in entries(contents, table, "image", "lesion_id")
    }
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    for name, found in contents.matching(r"ISIC2018_Task3_(Training|Validation|Test)_Input[^/]*/(ISIC_\d+)\.jpg"):
        if found[2] in names:
            patient, split = lesions.get(found[2], found[2]), PARTS[found[1].capitalize()]
            rows.append({"image": name, "label": names[found[2]], "patient": patient, "split": split})
        else:
            left_out["images without a diagnosis"] += 1
    if not rows:
        raise Missing("pair of ISIC2018_Task3_Training_Input and ISIC2018_Task3_Training_GroundTruth.csv")
    alone = "ISIC2018_Task3_Training_LesionGroupings.csv is not there: each image counts as one patient"
    command = ("data=folder", "data.label=label", "data.patient=patient", "data.split=split", "data.channels=3")
    return Table(
        rows=rows,
        files=("image",),
        labels=("label",),
        left_out=left_out,
        notes=("a lesion counts as one patient" if lesions else alone,),
        command=command,
    )


def kvasir(contents: Contents) -> Table:
    """1,000 polyps and their outlines, with the authors' lists train.txt and val.txt where they are there."""
    masks = {PurePosixPath(name).stem: name for name, _ in contents.matching(r"masks/[^/]+\.jpg")}
    splits = listed(contents)
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    for name, _ in contents.matching(r"images/[^/]+\.jpg"):
        image = PurePosixPath(name).stem
        if image in masks and (not splits or image in splits):
            rows.append({"image": name, "mask": masks[image], "patient": image, "split": splits.get(image, "")})
        else:
            left_out[NO_MASK if image not in masks else "images that no list names"] += 1
    if not rows:
        raise Missing("pair of images/NAME.jpg and masks/NAME.jpg")
    return Table(
        rows=rows,
        files=("image", "mask"),
        left_out=left_out,
        notes=(PER_IMAGE,),
        command=("experiment=dcl_kvasir",),
    )
