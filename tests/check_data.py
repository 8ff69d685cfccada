"""Small data sets of a site for the tests of `medfl site check`: clean ones, and what can be wrong with them."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml
from PIL import Image
from pydicom.dataset import Dataset

from medfl.provision.keys import new_node_key, new_secret, new_signing_key
from tests.test_dicom import geometry, save, slices

COUNT = 32
SPLITS = ["train"] * 12 + ["val"] * 2 + ["test"] * 2  # of the patients, two images each
Rows = list[dict[str, str]]


def make(kind: str, folder: Path) -> Path:
    """A site folder with one clean data set; returns the folder."""
    root = folder / "data"
    suffix, entry = {
        "png": (".png", {"size": 16}),
        "nifti": (".nii.gz", {"size": 16, "spatial_dims": 3, "mask": "mask", "regions": {"inner": [4], "outer": [7]}}),
        "dicom": ("", {"size": 16, "spatial_dims": 3}),
    }[kind]
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(COUNT):
        name = f"images/{number:03}{suffix}"
        row = {"image": name, "label": "ab"[number // 2 % 2], "patient": f"case-{number // 2}",
               "split": SPLITS[number // 2]}  # fmt: skip
        {"png": png, "nifti": nifti, "dicom": dicom}[kind](root / name, rng)
        if kind == "nifti":
            row["mask"] = f"images/{number:03}_mask.nii.gz"
            mask(root / row["mask"])
        rows.append(row)
    write(root, rows)
    columns = {"root": str(root), "label": "label", "patient": "patient", "split": "split"}
    settings = {"site": "hospital-a", "device": "cpu", "threads": 1, "policy": {"least_images": 8},
                "data": {"main": columns | entry}}  # fmt: skip
    site = folder / "site"
    (site / "keys").mkdir(parents=True, mode=0o700)
    (site / "site.yaml").write_text(yaml.safe_dump(settings))
    new_node_key(site / "keys/node")
    new_signing_key(site / "keys/signing")
    new_secret(site / "keys/superexec.secret")
    return site


def blob(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Something round on noise, from 0 to 1."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij"), axis=-1)
    distance = ((grid - rng.uniform(-0.3, 0.3, len(shape))) ** 2).sum(-1)
    return np.clip(0.8 * np.exp(-distance * 4) + 0.05 * rng.standard_normal(shape) + 0.1, 0, 1)


def png(path: Path, rng: np.random.Generator) -> None:
    Image.fromarray((blob(rng, (40, 32)) * 255).astype(np.uint8)).save(path)


def nifti(path: Path, rng: np.random.Generator) -> None:
    volume(path, blob(rng, (12, 11, 10)).astype(np.float32) * 100)


def mask(path: Path) -> None:
    labels = np.zeros((12, 11, 10), dtype=np.uint8)
    labels[3:9, 3:9, 3:9], labels[5:7, 5:7, 5:7] = 7, 4
    volume(path, labels)


def volume(path: Path, values: Any, sides: tuple[float, ...] = (1.0, 1.2, 1.5, 1.0)) -> None:
    nib.save(nib.Nifti1Image(values, np.diag(sides)), path)


def anonymous(files: list[Dataset]) -> list[Dataset]:
    """As a de-identified export has them."""
    for one in files:
        for tag in ("PatientName", "PatientBirthDate", "InstitutionName", "AccessionNumber", "SeriesDescription"):
            setattr(one, tag, "")
        del one[0x00091001]
        one.PatientID, one.PatientIdentityRemoved, one.BurnedInAnnotation, one.Modality = "case", "YES", "NO", "CT"
    return files


def series(rng: np.random.Generator, **changed: Any) -> list[Dataset]:
    return anonymous(slices((blob(rng, (9, 8, 4)) * 1000).astype(int), geometry(), **changed))


def dicom(path: Path, rng: np.random.Generator) -> None:
    save(path, series(rng))


def read(root: Path) -> Rows:
    with (root / "datalist.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(root: Path, rows: Rows) -> None:
    with (root / "datalist.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def listed(root: Path) -> Iterator[Rows]:
    """The data list, to be changed."""
    rows = read(root)
    yield rows
    write(root, rows)


def renamed(root: Path, number: int, name: str) -> None:
    """Another name for an image, in the folder and in the data list."""
    with listed(root) as rows:
        (root / rows[number]["image"]).rename(root / "images" / name)
        rows[number]["image"] = f"images/{name}"


def column(name: str, value: Callable[[int], str]) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        with listed(root) as rows:
            for number, row in enumerate(rows):
                row[name] = value(number)

    return plant


def cell(number: int, name: str, value: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        with listed(root) as rows:
            rows[number][name] = value

    return plant


def image(number: int, values: Any) -> Callable[[Path], None]:
    return lambda root: Image.fromarray(values).save(root / f"images/{number:03}.png")


def content(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(text) and None


def cut(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:150]) and None


def same(one: int, other: int) -> Callable[[Path], None]:
    """Two images with the same pixels in another file."""
    return lambda root: Image.open(root / f"images/{one:03}.png").save(root / f"images/{other:03}.png", optimize=True)
