"""Public data sets: every official layout becomes what its reader reads, and no archive reaches out of its folder."""

import gzip
import io
import json
import resource
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from medfl.cli.prepare import prepare as command
from medfl.data.folder import Folder
from medfl.data.multimodal import Multimodal
from medfl.data.sample import UNLABELLED, Records, labelled
from medfl.errors import ConfigError, DataError, ResourceError
from medfl.prepare.chest_masks import from_boxes, from_runs
from medfl.prepare.recipes import RECIPES, prepare
from medfl.prepare.table import Table, with_splits
from tests.shared_data import shared

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"
Files = Mapping[str, bytes]


def png(seed: int, size: int = 20, mode: str = "L") -> bytes:
    shape = (size, size, 3)[: len(mode) if mode == "RGB" else 2]
    return encoded(np.random.default_rng(seed).integers(0, 255, shape).astype("uint8"))


def encoded(pixels: NDArray[np.uint8], kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=kind)
    return out.getvalue()


def square(size: int = 20) -> NDArray[np.uint8]:
    """A mask that is set in its upper left quarter."""
    mask = np.zeros((size, size), np.uint8)
    mask[: size // 2, : size // 2] = 255
    return mask


def dicom(seed: int, size: int = 1024) -> bytes:
    head = Dataset()
    head.file_meta = FileMetaDataset()
    head.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = SecondaryCaptureImageStorage
    head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID = f"1.2.{seed + 1}"
    head.PhotometricInterpretation, head.SamplesPerPixel, head.PixelRepresentation = "MONOCHROME2", 1, 0
    head.Rows = head.Columns = size
    head.BitsAllocated = head.BitsStored = 8
    head.HighBit = 7
    ramp = np.add.outer(np.arange(size), np.arange(size) * (seed + 1)) % 251
    head.PixelData = ramp.astype("uint8").tobytes()
    out = io.BytesIO()
    head.save_as(out, enforce_file_format=True)
    return out.getvalue()


def volume(seed: int, values: int | None = None) -> bytes:
    """A NIfTI file: noise in a box of zeros, or a label map of that box."""
    inner = np.random.default_rng(seed).integers(1, 99, (8, 8, 8))
    grid = np.pad(inner if values is None else np.full((8, 8, 8), values), 4)
    return gzip.compress(nib.Nifti1Image(grid.astype(np.float32), np.eye(4)).to_bytes(), 1)


def zipped(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def unpacked(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def run(name: str, source: Path, to: Path, val: float = 0.25, **options: str) -> Table:
    return prepare(name, source, to, options=options, val=val, show=lambda line: None)


def folder(to: Path, **changes: Any) -> Records:
    arguments = yaml.safe_load((CONFIGS / "folder.yaml").read_text())
    arguments |= {"root": str(to), "patient": "patient", "split": "split", "size": 8} | changes
    return Folder(**{name: value for name, value in arguments.items() if name != "_target_"}).load()


def splits(records: Records) -> Counter[str]:
    return Counter(records.splits)


NIH_HEAD = "Image Index,Finding Labels,Follow-up #,Patient ID,OriginalImage[Width,Height],"


def test_nih_from_its_archives(tmp_path: Path) -> None:
    names = [f"0000000{patient}_00{film}.png" for patient in range(1, 7) for film in range(2)]
    rows = [f"{name},{'Mass|Pleural_Thickening' if n % 3 else 'No Finding'},0,1,20,20," for n, name in enumerate(names)]
    source = tmp_path / "downloads"
    for part in range(2):
        images = {f"images/{name}": png(part) for name in names[6 * part : 6 * part + 6]}
        tarred(source / f"images_00{part + 1}.tar.gz", images)
    rows.append("00000009_000.png,Hernia,0,9,20,20,")
    unpacked(source, {"Data_Entry_2017_v2020.csv": "\n".join([NIH_HEAD, *rows]).encode()})
    unpacked(
        source, {"train_val_list.txt": "\n".join(names[:8]).encode(), "test_list.txt": "\r\n".join(names[8:]).encode()}
    )
    table = run("nih", source, tmp_path / "nih")
    assert table.left_out["rows whose image is not there"] == 1
    records = folder(tmp_path / "nih", label="Mass", classes=["0", "1"])
    assert (len(records), len(set(records.patients))) == (12, 6)
    assert splits(records) == {"train": 6, "val": 2, "test": 4}
    assert set(records.patients[8:]) == {"00000005", "00000006"}
    assert records.labels.tolist() == [int(bool(n % 3)) for n in range(12)]
    assert table.labels[12] == "Pleural_Thickening"
    several = folder(tmp_path / "nih", labels=list(table.labels))
    assert several.findings is not None
    assert several.findings.tolist() == [[int(bool(n % 3) and k in (4, 12)) for k in range(14)] for n in range(12)]
    assert {row["Pleural_Thickening"] for row in table.rows if row["Mass"] == "1"} == {"1"}


CHEXPERT_HEAD = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


@pytest.mark.parametrize(("uncertain", "flag"), [("zeros", "0"), ("ones", "1"), ("unknown", "")])
def test_chexpert_and_its_uncertain_labels(tmp_path: Path, uncertain: str, flag: str) -> None:
    views = [f"patient0000{n}/study1/view1_frontal.jpg" for n in range(1, 5)] + [
        "patient00004/study1/view2_lateral.jpg"
    ]
    cells = {
        "train": ["1.0,,,,,,,,,-1.0,,,,", ",,,,,,,,,1.0,,,,", ",,,,,,,,,0.0,,,,"],
        "valid": [",,,,,,,,,1.0,,,,"] * 2,
    }
    files = {f"CheXpert-v1.0 batch 2 (train 1)/{view}": encoded(square(), "jpeg") for view in views[:3]}
    files |= {f"CheXpert-v1.0 batch 1 (validate & csv)/valid/{view}": encoded(square(), "jpeg") for view in views[3:]}
    for split, places in {"train": views[:3], "valid": views[3:]}.items():
        kinds = ["Lateral" if "lateral" in view else "Frontal" for view in places]
        rows = [
            f"CheXpert-v1.0/{split}/{view},Female,60,{kind},AP,{row}"
            for view, kind, row in zip(places, kinds, cells[split], strict=True)
        ]
        files |= {f"CheXpert-v1.0 batch 1 (validate & csv)/{split}.csv": "\n".join([CHEXPERT_HEAD, *rows]).encode()}
    table = run("chexpert", zipped(tmp_path / "chexpert.zip", files), tmp_path / "to", uncertain=uncertain)
    assert [row["Pneumothorax"] for row in table.rows] == [flag, "1", "0", "1"]
    assert [row["No_Finding"] for row in table.rows] == ["1", "0", "0", "0"]
    assert table.left_out["lateral images"] == 1
    records = folder(tmp_path / "to", labels=list(table.labels))
    assert records.findings is not None
    known = {"0": 0, "1": 1, "": -1}
    assert records.findings.tolist() == [[known[row[label]] for label in table.labels] for row in table.rows]
    assert splits(records) == {"train": 2, "val": 1, "test": 1}
    assert records.patients[3] == "patient00004"


def runs_of(mask: NDArray[np.uint8]) -> str:
    """The challenge's code of a mask, pixel by pixel: columns first, each start counted from the last run's end."""
    numbers, gap, length = [], 0, 0
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x]:
                length += 1
            elif length:
                numbers += [gap, length]
                gap, length = 1, 0
            else:
                gap += 1
    return " ".join(map(str, [*numbers, gap, length] if length else numbers))


def test_siim_draws_its_run_lengths(tmp_path: Path) -> None:
    truth = np.zeros((1024, 1024), np.uint8)
    truth[100:160, 300:420] = truth[500:503, 1000:1024] = 255
    codes = [runs_of(np.where(np.arange(1024) < 512, part, 0).astype("uint8")) for part in (truth, truth[:, ::-1])]
    second = np.zeros_like(truth)
    second[:, 512:] = truth[:, 512:]
    codes[1] = runs_of(second)
    rows = ["ImageId, EncodedPixels", f"a, {codes[0]}", f"a, {codes[1]}", "b, -1", "c,-1", "gone, -1"]
    images = {f"siim/dicom-images-train/1.{n}/2.{n}/{name}.dcm": dicom(n) for n, name in enumerate("abcd")}
    source = unpacked(tmp_path / "from", images | {"siim/train-rle.csv": "\n".join(rows).encode()})
    table = run("siim", source, tmp_path / "to")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "to/masks/a.png")), truth)
    assert table.left_out == {"annotated images that are not there": 1, "images without an annotation": 1}
    records = folder(tmp_path / "to", mask="mask", regions={"pneumothorax": [255]}, label="label", size=64)
    assert records.masks is not None
    expected = torch.nn.functional.avg_pool2d(torch.tensor(truth)[None, None].float(), 16)[0, 0] > 127
    assert (records.masks[0].bool() != expected).float().mean() < 0.01
    assert records.masks[1:].sum() == 0
    assert [records.classes[label] for label in records.labels] == ["pneumothorax", "none", "none"]


@pytest.mark.parametrize("code", ["1 2 3", "5 x", "10 1048576", "-3 5"])
def test_run_lengths_that_cannot_be(code: str) -> None:
    with pytest.raises(DataError, match=r"^film: its run-length code"):
        from_runs([code], "film")


def test_siim_as_released_again(tmp_path: Path) -> None:
    files, tables = {}, {"train": ["new_filename,ImageId,has_pneumo"], "test": ["new_filename,ImageId,has_pneumo"]}
    for n in range(6):
        split, found = ("test" if n > 3 else "train"), n % 2
        name = f"{n}_{split}_{found}_.png"
        files |= {f"siim-acr-pneumothorax/png_images/{name}": png(n)}
        files |= {f"siim-acr-pneumothorax/png_masks/{name}": encoded(square() * np.uint8(found))}
        tables[split].append(f"{name},uid{n},{found}")
    files |= {f"siim-acr-pneumothorax/stage_1_{s}_images.csv": "\n".join(rows).encode() for s, rows in tables.items()}
    run("siim", zipped(tmp_path / "archive.zip", files), tmp_path / "to")
    records = folder(tmp_path / "to", mask="mask", regions={"pneumothorax": [255]})
    assert records.masks is not None
    assert records.masks.float().mean((1, 2)).tolist() == [0, 0.25, 0, 0.25, 0, 0.25]
    assert splits(records) == {"train": 3, "val": 1, "test": 2}


def test_rsna_boxes_and_the_patients_of_nih(tmp_path: Path) -> None:
    rows = [
        "patientId,x,y,width,height,Target",
        "a,100.0,200.0,300.0,64.0,1",
        "a,0.5,0.5,10.0,20.0,1",
        "b,,,,,0",
        "c,,,,,0",
    ]
    classes = ["patientId,class", "a,Lung Opacity", "a,Lung Opacity", "b,Normal", "c,No Lung Opacity / Not Normal"]
    mapping = [{"subset_img_id": name, "img_id": f"0000000{n}_000.png"} for name, n in {"a": 1, "b": 1, "c": 2}.items()]
    files = {f"stage_2_train_images/{name}.dcm": dicom(n) for n, name in enumerate("abc")} | {
        "stage_2_train_labels.csv": "\n".join(rows).encode(),
        "stage_2_detailed_class_info.csv": "\n".join(classes).encode(),
        "pneumonia-challenge-dataset-mappings_2018.json": json.dumps(mapping).encode(),
    }
    table = run("rsna", zipped(tmp_path / "rsna.zip", files), tmp_path / "to")
    assert [row["patient"] for row in table.rows] == ["00000001", "00000001", "00000002"]
    names = ["Lung Opacity", "Normal", "No Lung Opacity / Not Normal"]
    records = folder(tmp_path / "to", mask="mask", regions={"opacity": [255]}, label="label", classes=names, size=32)
    assert records.masks is not None
    assert records.labels.tolist() == [0, 1, 2]
    assert records.masks[0].sum().item() == pytest.approx(300 * 64 / 32**2, rel=0.2)
    assert records.masks[1:].sum() == 0


def test_boxes_as_masks() -> None:
    truth = np.zeros((1024, 1024), np.uint8)
    for y in range(1024):
        for x in range(1000, 1024):
            truth[y, x] = 255 if 10 <= y < 30 and x >= 1010 else 0
    assert np.array_equal(from_boxes([(1010.0, 10.0, 50.0, 20.0)]), truth)


def test_covid_radiography_classes(tmp_path: Path) -> None:
    top = "COVID-19_Radiography_Dataset"
    classes = ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]
    files = {f"{top}/{name}/images/{name}-{n}.png": png(n) for name in classes for n in range(2)}
    files |= {f"{top}/{name}/masks/{name}-{n}.png": png(n, 16) for name in classes for n in range(2)}
    table = run("covid_radiography", zipped(tmp_path / "a.zip", files), tmp_path / "to")
    records = folder(tmp_path / "to", label="label", classes=classes)
    assert torch.bincount(records.labels).tolist() == [2, 2, 2, 2]
    assert splits(records) == {"": 8}
    assert table.left_out["masks of lungs, on another grid"] == 8


@pytest.mark.parametrize(
    ("parts", "expected"), [(3, {"train": 3, "val": 1, "test": 1}), (2, {"train": 2, "val": 1, "test": 1})]
)
def test_isic_outlines(tmp_path: Path, parts: int, expected: Mapping[str, int]) -> None:
    """The published validation images are the test split where there are no others."""
    downloads, number = tmp_path / "downloads", 0
    for part, count in list({"Training": 3, "Validation": 1, "Test": 1}.items())[:parts]:
        names = [f"ISIC_{number + n:07d}" for n in range(count)]
        number += count
        images = {f"ISIC2018_Task1-2_{part}_Input/{name}.jpg": png(number, mode="RGB") for name in names}
        masks = {f"ISIC2018_Task1_{part}_GroundTruth/{name}_segmentation.png": encoded(square()) for name in names}
        zipped(downloads / f"ISIC2018_Task1-2_{part}_Input.zip", images | {"LICENSE.txt": b""})
        zipped(downloads / f"ISIC2018_Task1_{part}_GroundTruth.zip", masks | {"__MACOSX/._x.png": b""})
    run("isic2018", downloads, tmp_path / "to")
    records = folder(tmp_path / "to", mask="mask", regions={"lesion": [255]}, channels=3)
    assert splits(records) == expected
    assert records.masks is not None
    assert (records.masks.float().mean((1, 2)) == 0.25).all()


def test_isic_diagnoses_keep_lesions_together(tmp_path: Path) -> None:
    names = [f"ISIC_{n:07d}" for n in range(4)]
    rows = [
        "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC",
        *(f"{name},0.0,{n % 2}.0,{1 - n % 2}.0,0,0,0,0" for n, name in enumerate(names)),
    ]
    groups = [
        "image,lesion_id,diagnosis_confirm_type",
        *(f"{name},HAM_{n // 2},histopathology" for n, name in enumerate(names)),
    ]
    files = {f"ISIC2018_Task3_Training_Input/{name}.jpg": png(n, mode="RGB") for n, name in enumerate(names)} | {
        "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv": "\n".join(rows).encode(),
        "ISIC2018_Task3_Training_LesionGroupings.csv": "\n".join(groups).encode(),
    }
    run("isic2018", unpacked(tmp_path / "from", files), tmp_path / "to", task="classification")
    records = folder(tmp_path / "to", label="label", channels=3)
    assert records.patients == ("HAM_0", "HAM_0", "HAM_1", "HAM_1")
    assert [records.classes[label] for label in records.labels] == ["BCC", "NV", "BCC", "NV"]


def test_kvasir_and_the_authors_lists(tmp_path: Path) -> None:
    names = [f"cju{n}" for n in range(5)]
    files = {
        f"Kvasir-SEG/images/{name}.jpg": encoded(np.full((20, 20, 3), 90, np.uint8) + square()[..., None] // 2, "jpeg")
        for name in names
    }
    files |= {f"Kvasir-SEG/masks/{name}.jpg": encoded(square(), "jpeg") for name in names}
    zipped(tmp_path / "from/kvasir-seg.zip", files)
    unpacked(tmp_path / "from", {"train.txt": "\n".join(names[:3]).encode(), "val.txt": "\n".join(names[3:]).encode()})
    run("kvasir", tmp_path / "from", tmp_path / "to")
    records = folder(tmp_path / "to", mask="mask", regions={"polyp": [255]}, channels=3)
    assert splits(records) == {"train": 2, "val": 1, "test": 2}
    assert records.masks is not None
    assert (records.masks.float().mean((1, 2)) == 0.25).all()


def subject(case: str, join: str, endings: Mapping[str, str], label: int, *, top: str = "") -> dict[str, bytes]:
    """The five files of a case, and the label that its mask has."""
    files = {
        f"{top}{case}/{case}{join}{ending}.nii.gz": volume(n)
        for n, ending in enumerate(endings.values())
        if ending != "seg"
    }
    return files | {f"{top}{case}/{case}{join}seg.nii.gz": volume(0, label)}


UNTIL_2021 = {"flair": "flair", "t1ce": "t1ce", "t1": "t1", "t2": "t2"}
SINCE_2023 = {"flair": "t2f", "t1ce": "t1c", "t1": "t1n", "t2": "t2w"}


def brains(to: Path, **changes: Any) -> Records:
    arguments = yaml.safe_load((CONFIGS / "multimodal.yaml").read_text())
    arguments |= {"root": str(to), "patient": "patient", "split": "split", "mask": "mask", "convention": "convention"}
    arguments |= {"size": 16, "depth": 16} | changes
    return Multimodal(**{name: value for name, value in arguments.items() if name != "_target_"}).load()


def test_brats_2021_with_the_lists_of_nslf(tmp_path: Path) -> None:
    cases = [f"BraTS2021_0000{n}" for n in range(4)]
    files = {name: content for case in cases for name, content in subject(case, "_", UNTIL_2021, 4, top="./").items()}
    tarred(tmp_path / "from/BraTS2021_Training_Data.tar", files)
    lists = {"train.txt": cases[:1], "valid.txt": cases[1:2], "test.txt": cases[2:3]}
    unpacked(tmp_path / "from", {name: "\n".join(listed).encode() for name, listed in lists.items()})
    table = run("brats", tmp_path / "from", tmp_path / "to")
    assert table.left_out["cases that no list names"] == 1
    records = brains(tmp_path / "to")
    assert splits(records) == {"train": 1, "val": 1, "test": 1}
    assert records.masks is not None
    assert set(records.masks.unique().tolist()) == {0, 3}
    flair = nib.Nifti1Image.from_bytes(gzip.decompress(volume(0))).get_fdata()
    assert np.corrcoef(records.images[0, 0].flatten(), flair.flatten())[0, 1] > 0.99


def test_brats_of_other_years(tmp_path: Path) -> None:
    """2018 names the hospital, 2020 by its mapping, 2023 has timepoints and other labels; case 355 has an odd mask."""
    files = subject("Brats18_CBICA_AAB_1", "_", UNTIL_2021, 4, top="HGG/")
    files |= subject("BraTS20_Training_001", "_", UNTIL_2021, 2, top="2020/") | subject(
        "BraTS20_Training_355", "_", UNTIL_2021, 1
    )
    files["BraTS20_Training_355/W39_1998.09.19_Segm.nii.gz"] = files.pop(
        "BraTS20_Training_355/BraTS20_Training_355_seg.nii.gz"
    )
    files |= subject("BraTS-GLI-00005-000", "-", SINCE_2023, 3) | subject("BraTS-GLI-00005-001", "-", SINCE_2023, 3)
    del files["BraTS-GLI-00005-001/BraTS-GLI-00005-001-t1c.nii.gz"]
    years = ["BraTS_2017", "BraTS_2018", "TCGA_TCIA", "BraTS_2019", "BraTS_2020"]
    columns = ",".join(["Grade", *(f"{year}_subject_ID" for year in years)])
    mapping = (
        f"{columns}\nHGG,NA,NA,NA,BraTS19_TCIA01_147_1,BraTS20_Training_001\nHGG,NA,NA,NA,NA,BraTS20_Training_355\n"
    )
    table = run("brats", unpacked(tmp_path / "from", files | {"name_mapping.csv": mapping.encode()}), tmp_path / "to")
    found = {Path(row["mask"]).parent.name: (row["patient"], row["site"], row["convention"]) for row in table.rows}
    assert found == {
        "Brats18_CBICA_AAB_1": ("Brats18_CBICA_AAB", "CBICA", "brats2017"),
        "BraTS20_Training_001": ("BraTS20_Training_001", "TCIA01", "brats2017"),
        "BraTS20_Training_355": ("BraTS20_Training_355", "unnamed", "brats2017"),
        "BraTS-GLI-00005-000": ("BraTS-GLI-00005", "unnamed", "brats2023"),
        "BraTS-GLI-00005-001": ("BraTS-GLI-00005", "unnamed", "brats2023"),
    }
    records = brains(tmp_path / "to", site="site")
    assert records.masks is not None
    assert sorted(int(mask.max()) for mask in records.masks) == [1, 2, 3, 3, 3]
    assert (records.images[1, 1] == 0).all()


@pytest.mark.parametrize("packed", [True, False])
def test_decathlon(tmp_path: Path, packed: bool) -> None:
    facts = {
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "PZ", "2": "Non-enhancing tumour!"},
        "training": [{"image": f"./imagesTr/p_{n}.nii.gz", "label": f"./labelsTr/p_{n}.nii.gz"} for n in range(3)],
        "test": ["./imagesTs/p_9.nii.gz"],
    }
    top = "Task05_Prostate/"
    files = {f"{top}imagesTr/p_{n}.nii.gz": four_dimensional(n) for n in range(2)}
    files |= {f"{top}labelsTr/p_{n}.nii.gz": volume(0, 1 + n) for n in range(2)}
    files |= {f"{top}imagesTs/p_9.nii.gz": four_dimensional(9), f"{top}imagesTs/._p_9.nii.gz": b"Mac"}
    files |= {f"{top}dataset.json": json.dumps(facts).encode()}
    source = tarred(tmp_path / "Task05_Prostate.tar", files) if packed else unpacked(tmp_path / "from", files)
    table = run("decathlon", source, tmp_path / "to")
    assert "'data.regions={pz: [1], non_enhancing_tumour: [2]}'" in table.command
    assert table.left_out["cases of dataset.json whose files are not there"] == 1
    regions = {"pz": [1], "non_enhancing_tumour": [2]}
    records = folder(tmp_path / "to", mask="mask", regions=regions, spatial_dims=3, channels=2, size=16)
    assert records.masks is not None
    assert labelled(records.masks).tolist() == [True, True, False]
    assert records.splits == ("", "", "train")
    assert [int(mask.max()) for mask in records.masks] == [1, 2, UNLABELLED]


def four_dimensional(seed: int) -> bytes:
    grid = np.random.default_rng(seed).integers(0, 99, (16, 16, 16, 2))
    return gzip.compress(nib.Nifti1Image(grid.astype(np.float32), np.eye(4)).to_bytes(), 1)


def test_the_real_hippocampus(tmp_path: Path) -> None:
    task = shared("msd_hippocampus")
    table = run("decathlon", task, tmp_path / "to")
    assert len(table.rows) == 293
    kept = [
        row for row in table.rows if row["patient"] in ("hippocampus_001", "hippocampus_004", table.rows[-1]["patient"])
    ]
    lines = (tmp_path / "to/datalist.csv").read_text().splitlines()
    (tmp_path / "to/few.csv").write_text("\n".join([lines[0], *(lines[1 + table.rows.index(row)] for row in kept)]))
    regions = {"anterior": [1], "posterior": [2]}
    records = folder(
        tmp_path / "to", datalist="few.csv", mask="mask", regions=regions, spatial_dims=3, size=32, spacing=1.0
    )
    assert records.masks is not None
    assert labelled(records.masks).tolist() == [True, True, False]
    assert set(records.masks[0].unique().tolist()) == {0, 1, 2}


def published(**cells: str) -> list[dict[str, str]]:
    return [{"image": name, "patient": name.rstrip("0123456789"), "split": split} for name, split in cells.items()]


def test_splits_are_published_ones_or_left_to_be_assigned() -> None:
    def after(rows: list[dict[str, str]], val: float = 0.4) -> dict[str, str]:
        found = with_splits(Table(rows=rows, files=("image",), command=()), val)
        return {row["image"]: row["split"] for row in found.rows}

    whole = {"a1": "train", "b1": "val", "c1": "test"}
    assert after(published(**whole)) == whole
    assert after(published(a1="train", b1="train")) == {"a1": "", "b1": ""}
    drawn = after(published(**{f"{p}{n}": "train" for p in "abcde" for n in range(2)}, t1="test"))
    assert Counter(drawn.values()) == {"train": 6, "val": 4, "test": 1}
    assert all(drawn[f"{patient}0"] == drawn[f"{patient}1"] for patient in "abcde")
    with pytest.raises(DataError, match="more than one split"):
        after(published(a1="train", a2="test", b1="train", c1="train"))


EVIL = ["../evil.csv", "/tmp/evil.csv", "images/../../evil.csv", "C:evil.csv", "a\\..\\evil.csv"]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str, pack: Any) -> None:
    ending = "zip" if pack is zipped else "tar.gz"
    archive = pack(tmp_path / f"in/set.{ending}", {"Kvasir-SEG/images/a.jpg": b"x", name: b"evil"})
    with pytest.raises(DataError, match="could lie outside the folder"):
        run("kvasir", archive, tmp_path / "to")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [archive.name]


def test_links_in_archives_and_folders_are_not_followed(tmp_path: Path) -> None:
    """A link to a folder outside, then a file through it; and a link to a secret as an image."""
    outside, secret = tmp_path / "outside", tmp_path / "secret.jpg"
    outside.mkdir()
    secret.write_bytes(encoded(square(), "jpeg"))
    source = tmp_path / "from"
    pair = {f"Kvasir-SEG/{kind}/a.jpg": encoded(square(), "jpeg") for kind in ("images", "masks")}
    tarred(source / "set.tar", pair | {"Kvasir-SEG/images/x/b.jpg": b"through the link"})
    with tarfile.open(source / "set.tar", "a") as archive:
        for name, kind in {"Kvasir-SEG/images/x": tarfile.SYMTYPE, "Kvasir-SEG/images/c.jpg": tarfile.LNKTYPE}.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(outside if kind == tarfile.SYMTYPE else secret)
            archive.addfile(link)
    (source / "images").mkdir()
    (source / "images/d.jpg").symlink_to(secret)
    (source / "more").symlink_to(outside)
    to = tmp_path / "to"
    (to / "Kvasir-SEG").mkdir(parents=True)
    table = run("kvasir", source, to)
    assert [row["patient"] for row in table.rows] == ["a"]
    assert table.left_out["links, which are not followed"] == 4
    assert list(outside.iterdir()) == []
    (to / "datalist.csv").unlink()
    (to / "Kvasir-SEG/images/a.jpg").unlink()
    (to / "Kvasir-SEG/images").rmdir()
    (to / "Kvasir-SEG/images").symlink_to(outside)
    with pytest.raises(DataError, match="behind a link that leaves"):
        run("kvasir", source, to)
    assert list(outside.iterdir()) == []


def kvasir(names: str) -> dict[str, bytes]:
    files = {f"{kind}/{name}.jpg": encoded(square(), "jpeg") for kind in ("images", "masks") for name in names}
    return files | {"bulk.bin": b"\0" * 4096}


def test_an_unpacked_folder_is_linked_or_used_as_it_is(tmp_path: Path) -> None:
    source = unpacked(tmp_path / "from", kvasir("abc"))
    run("kvasir", source, tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["datalist.csv", "source"]
    assert (tmp_path / "to/source").resolve() == source
    run("kvasir", source, source)
    first = (source / "datalist.csv").read_text().splitlines()[1]
    assert first.startswith("images/a.jpg,masks/a.jpg,")
    assert len(folder(source, mask="mask", regions={"polyp": [255]})) == 3


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3)).astype("uint8")
    files = {"images/a.jpg": encoded(square(), "jpeg"), "masks/a.jpg": encoded(square(), "jpeg")}
    files |= {"images/b.jpg": encoded(noise, "jpeg"), "masks/b.jpg": encoded(square(90), "jpeg")}
    archive, to = zipped(tmp_path / "set.zip", files), tmp_path / "to"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(ResourceError, match=r"GB are free\. Free space"):
            run("kvasir", archive, to)
    assert not to.exists()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(files["images/b.jpg"]) - 1, hard))
    try:
        with pytest.raises(ResourceError, match="the disk is full"):
            run("kvasir", archive, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in to.rglob("*.part")] == []
    before = (to / "images/a.jpg").stat().st_mtime_ns
    run("kvasir", archive, to)
    assert (to / "images/a.jpg").stat().st_mtime_ns == before
    assert len(folder(to, channels=3)) == 2


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_another_folder_is_refused_with_what_is_needed(tmp_path: Path, name: str) -> None:
    source = unpacked(tmp_path / "from", {"holiday/beach.tif": b"x", "holiday/notes.doc": b"y"})
    with pytest.raises(DataError, match=r"got 2 files, such as holiday/beach.tif.*and no ") as refusal:
        run(name, source, tmp_path / "to")
    assert RECIPES[name].layout in str(refusal.value)
    assert RECIPES[name].origin in str(refusal.value)
    assert not (tmp_path / "to").exists()


def test_damaged_archives_and_tables_are_named(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "set.zip", kvasir("abc")).read_bytes()
    (tmp_path / "set.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"set.zip: cannot be read \(BadZipFile"):
        run("kvasir", tmp_path / "set.zip", tmp_path / "to")
    spoiled = bytearray(whole)
    spoiled[whole.find(b"\xff\xd8") if b"\xff\xd8" in whole else 60] ^= 0xFF
    (tmp_path / "set.zip").write_bytes(bytes(spoiled))
    with pytest.raises(DataError, match=r"set.zip: cannot be read"):
        run("kvasir", tmp_path / "set.zip", tmp_path / "to")
    source = unpacked(tmp_path / "nih", {"Data_Entry_2017.csv": b"Image,Labels\n", "images/00000001_000.png": png(0)})
    with pytest.raises(DataError, match=r"Data_Entry_2017.csv: has no column 'Image Index', only Image, Labels"):
        run("nih", source, tmp_path / "to")
    with pytest.raises(DataError, match="archives inside an archive"):
        run("kvasir", zipped(tmp_path / "outer.zip", {"inner.zip": b"x"}), tmp_path / "to")


def test_the_command_says_what_it_found_and_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, to = unpacked(tmp_path / "from", kvasir("abcde")), tmp_path / "a folder"
    command(["kvasir", f"from={source}", f"to={to}"])
    told = capsys.readouterr().out
    assert "kvasir: 5 images of 5 patients\n  masks     5\n  splits    to be assigned 5\n" in told
    assert "each image counts as one patient" in told
    assert told.endswith(f"next: medfl simulate experiment=dcl_kvasir data.root='{to}'\n")
    with pytest.raises(DataError, match="exists and is not written over"):
        command(["kvasir", f"from={source}", f"to={to}"])
    capsys.readouterr()
    command(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n  {name}" in told for name in RECIPES)
    for words, finding in {
        ("kvasir", f"from={source}"): "usage: medfl prepare NAME from=PATH to=FOLDER",
        ("kvasir", f"from={source}", f"to={to}", "twice"): "usage",
        ("kvazir", f"from={source}", f"to={to}"): "got 'kvazir', need one of",
        ("chexpert", f"from={source}", f"to={to}", "uncertain=maybe"): "need one of zeros, ones, unknown",
        ("kvasir", f"from={source}", f"to={to}", "val=2"): "val: got '2', need a share",
        ("kvasir", f"from={source}", f"to={to}", "size=2"): "got the option 'size'",
    }.items():
        with pytest.raises(ConfigError, match=finding):
            command(list(words))
