"""Chest X-rays with several findings each: NIH ChestX-ray14 (Wang et al. 2017) and CheXpert (Irvin et al. 2019)."""

from collections import Counter
from pathlib import PurePosixPath

from medfl.data.datalist import Row
from medfl.errors import DataError
from medfl.prepare.contents import Contents, Missing
from medfl.prepare.table import Table, entries, lines

NIH = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
CHEXPERT = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)
UNCERTAIN = {"zeros": "0", "ones": "1", "unknown": ""}  # what becomes of CheXpert's -1
ABSENT = "rows whose image is not there"


def nih(contents: Contents) -> Table:
    """14 findings as 0 and 1; the patient is the first number of the file's name; the publishers' two lists."""
    table = contents.one(r"Data_Entry_2017[^/]*\.csv", "Data_Entry_2017.csv or Data_Entry_2017_v2020.csv")
    images = {PurePosixPath(name).name: name for name, _ in reversed(contents.matching(r"\d{8}_\d{3}\.png"))}
    if not images:
        raise Missing("PNG file named as 00000001_000.png")
    splits = _lists(contents)
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    for entry in entries(contents, table, "Image Index", "Finding Labels"):
        image, findings = entry["Image Index"], set(entry["Finding Labels"].split("|"))
        if strange := findings - {*NIH, "No Finding"}:
            raise DataError(f"{table}: got the finding {min(strange)!r}, need {', '.join(NIH)} or No Finding.")
        if image not in images or (splits and image not in splits):
            left_out[ABSENT if image not in images else "images that neither list names"] += 1
            continue
        flags = {finding: str(int(finding in findings)) for finding in NIH}
        patient = image.partition("_")[0]
        rows.append({"image": images[image], **flags, "patient": patient, "split": splits.get(image, "")})
    note = () if splits else ("train_val_list.txt and test_list.txt are not there: no official split",)
    return Table(
        rows=rows,
        files=("image",),
        labels=NIH,
        left_out=left_out,
        notes=note,
        command=("experiment=dissect_table1",),
    )


def _lists(contents: Contents) -> dict[str, str]:
    """File -> split, of both lists; {} unless both are there."""
    found: dict[str, str] = {}
    for split, pattern in {"train": r"train_val_list[^/]*\.txt", "test": r"test_list[^/]*\.txt"}.items():
        names = [name for name, _ in contents.matching(pattern)]
        if not names:
            return {}
        found |= dict.fromkeys(lines(contents, names[0]), split)
    return found


def chexpert(contents: Contents, *, uncertain: str) -> Table:
    """Frontal images; 14 findings as 0 and 1, unmentioned ones as 0; the patient is that of the path."""
    tables = {"train": contents.one(r"train\.csv", "train.csv")}
    if valid := contents.matching(r"valid\.csv"):
        tables["val"] = valid[0][0]
    images = {_view(name): name for name, _ in reversed(contents.matching(r"patient\d+/study\d+/[^/]+\.jpg"))}
    if not images:
        raise Missing("image such as patient00001/study1/view1_frontal.jpg")
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    for split, table in tables.items():
        for entry in entries(contents, table, "Path", "Frontal/Lateral", *CHEXPERT):
            view = _view(entry["Path"])
            if entry["Frontal/Lateral"] != "Frontal" or view not in images:
                left_out["lateral images" if entry["Frontal/Lateral"] != "Frontal" else ABSENT] += 1
                continue
            flags = {column_of(finding): _flag(entry[finding], uncertain) for finding in CHEXPERT}
            rows.append({"image": images[view], **flags, "patient": view.partition("/")[0], "split": split})
    return Table(
        rows=rows,
        files=("image",),
        labels=tuple(map(column_of, CHEXPERT)),
        left_out=left_out,
        notes=(f"uncertain findings are {UNCERTAIN[uncertain] or 'unknown'}, unmentioned ones 0",),
        command=("experiment=dissect_table3_chexpert",),
    )


def column_of(finding: str) -> str:
    return finding.replace(" ", "_")


def _view(path: str) -> str:
    """Patient, study and file, which are one image in every release."""
    return "/".join(PurePosixPath(path).parts[-3:])


def _flag(cell: str, uncertain: str) -> str:
    value = float(cell or 0)
    return UNCERTAIN[uncertain] if value < 0 else str(int(value))
