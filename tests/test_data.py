"""Sources: what they load is on one grid, in range, labelled as it says, and every defect is refused by name."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
import yaml
from PIL import Image
from pydicom.data import get_testdata_file

from medfl.data.folder import Folder, read_labels
from medfl.data.medmnist import MedMNIST, complete, facts
from medfl.data.phantom import Phantom
from medfl.data.sample import UNLABELLED, Records
from medfl.data.volume import fit_steps, labels_to_grid, normalize, read, to_grid
from medfl.errors import ConfigError, DataError
from tests.shared_data import shared

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"
RNG = np.random.default_rng(0)


def node(source: str, /, **changes: Any) -> dict[str, Any]:
    """The arguments in a config file, with changes, as the command line makes them."""
    arguments = yaml.safe_load((CONFIGS / f"{source}.yaml").read_text())
    return {key: value for key, value in arguments.items() if key != "_target_"} | changes


def phantom(**changes: Any) -> Phantom:
    return Phantom(**node("phantom", **({"seed": 0} | changes)))


# phantom


@pytest.mark.parametrize(("dims", "size", "channels"), [(2, 32, 1), (2, 24, 3), (3, 16, 1)])
def test_phantom_masks_agree_with_labels_and_only_the_seed_matters(dims: int, size: int, channels: int) -> None:
    kinds = ["none", "smooth", "spiculated", "textured"]
    source = phantom(spatial_dims=dims, size=size, channels=channels, count=40, classes=kinds)
    records = source.load()
    assert records.images.shape == (40, channels, *[size] * dims)
    assert records.images.abs().max() <= 1
    assert records.masks is not None
    has_lesion = records.masks.flatten(1).any(1)
    assert torch.equal(has_lesion, records.labels != 0)
    grey = records.images.mean(1)
    inside = torch.stack(
        [image[mask > 0].mean() for image, mask in zip(grey, records.masks, strict=True) if mask.any()]
    )
    outside = torch.stack(
        [image[mask == 0].mean() for image, mask in zip(grey, records.masks, strict=True) if mask.any()]
    )
    assert (inside > outside).float().mean() > 0.9
    torch.testing.assert_close(source.load().images, records.images, rtol=0, atol=0)
    other = phantom(spatial_dims=dims, size=size, channels=channels, count=40, classes=kinds, seed=1).load()
    assert not torch.equal(other.images, records.images)


def test_spiculated_lesions_are_less_compact_and_share_their_patients_label() -> None:
    records = phantom(count=200, size=48, classes=["smooth", "spiculated"]).load()
    assert records.masks is not None
    masks = records.masks.float()
    border = masks.diff(dim=1).abs().sum((1, 2)) + masks.diff(dim=2).abs().sum((1, 2))
    compact = masks.sum((1, 2)) / border**2
    assert compact[records.labels == 0].median() > 1.3 * compact[records.labels == 1].median()
    labels = {(p, int(label)) for p, label in zip(records.patients, records.labels, strict=True)}
    assert len(labels) == len(set(records.patients)) == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "brain"}, r"data\.name: got 'brain', need 'anatomy'"),
        ({"classes": ["smooth"]}, r"data\.classes: .* need two or more of none, smooth"),
        ({"classes": ["smooth", "big"]}, r"data\.classes\[1\]: got 'big', need one of"),
        ({"spatial_dims": 4}, r"data\.spatial_dims: got 4, need 2 or 3"),
        ({"size": 2.5}, r"data\.size: got 2\.5, need an integer of at least 8"),
    ],
)
def test_phantom_refuses_settings_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        phantom(**changes)


# medmnist


@pytest.fixture
def tiny_breast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published set of 12 images, served from a file address."""
    from medmnist.info import INFO

    arrays: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [0], [1]], dtype=np.uint8)
    served = tmp_path / "served.npz"
    np.savez(served, **arrays)
    checksum = hashlib.md5(served.read_bytes()).hexdigest()
    changed = INFO["breastmnist"] | {"url": served.as_uri(), "MD5": checksum}
    monkeypatch.setitem(INFO, "breastmnist", changed)
    return served


def test_medmnist_downloads_once_and_verifies(tiny_breast: Path, tmp_path: Path, capsys: Any) -> None:
    source = MedMNIST(**node("medmnist", root=str(tmp_path / "new")))
    records = source.load()
    assert "downloading" in capsys.readouterr().err
    assert records.images.shape == (12, 1, 28, 28)
    with np.load(tiny_breast) as arrays:
        expected = torch.from_numpy(arrays["val_images"]).float() / 127.5 - 1
    torch.testing.assert_close(records.images[4:8, 0], expected)
    assert records.splits == ("train",) * 4 + ("val",) * 4 + ("test",) * 4
    assert records.classes == ("malignant", "normal, benign")
    tiny_breast.unlink()
    source.load()  # from the folder now
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["breastmnist.npz"]


def test_medmnist_refuses_a_download_with_another_checksum(tiny_breast: Path, tmp_path: Path) -> None:
    tiny_breast.write_bytes(tiny_breast.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"the download has MD5 \w+, the published one is \w+; nothing was kept"):
        MedMNIST(**node("medmnist", root=str(tmp_path / "new"))).load()
    assert not list((tmp_path / "new").iterdir())


def test_medmnist_says_what_is_wrong_with_a_file(tiny_breast: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    absent = MedMNIST(**node("medmnist", root=str(root), download=False))
    with pytest.raises(DataError, match=r"breastmnist\.npz does not exist.*from file://.*data\.download=true"):
        absent.load()
    root.mkdir()
    (root / "breastmnist.npz").write_bytes(b"not a zip")
    with (
        pytest.warns(UserWarning, match=r"its MD5 is \w+, the published"),
        pytest.raises(DataError, match="readable npz"),
    ):
        absent.load()
    with pytest.raises(DataError, match=r"set data\.verify=warn"):
        MedMNIST(**node("medmnist", root=str(root), verify="strict")).load()
    pickled = np.array([{"a": 1}], dtype=object)
    np.savez(root / "breastmnist.npz", train_images=pickled)
    with pytest.raises(DataError, match=r"readable npz file .*allow_pickle"):
        MedMNIST(**node("medmnist", root=str(root), verify="off")).load()
    tiny_breast.unlink()
    with pytest.raises(DataError, match=r"cannot be downloaded .* by hand"):
        MedMNIST(**node("medmnist", root=str(tmp_path / "other"))).load()


def test_medmnist_knows_its_sets_without_loading() -> None:
    assert facts("adrenalmnist3d") == (3, 1)
    assert facts("pathmnist") == (2, 3)
    filled = complete(node("medmnist", name="pathmnist", channels=None))
    assert (filled["spatial_dims"], filled["channels"]) == (2, 3)
    with pytest.raises(ConfigError, match=r"got 'brestmnist'.* Nearest: breastmnist"):
        complete(node("medmnist", name="brestmnist"))
    with pytest.raises(ConfigError, match=r"data\.spatial_dims: got 2, need 3, as adrenalmnist3d has"):
        MedMNIST(**node("medmnist", name="adrenalmnist3d", spatial_dims=2))
    with pytest.raises(ConfigError, match=r"data\.size: got 128, need one of \[28, 64\]"):
        MedMNIST(**node("medmnist", name="adrenalmnist3d", size=128))
    with pytest.raises(DataError, match="multi-label sets are not supported"):
        MedMNIST(**node("medmnist", name="chestmnist")).load()


@pytest.mark.parametrize(
    ("name", "size", "splits"),
    [
        ("breastmnist", 28, (546, 78, 156)),
        ("adrenalmnist3d", 28, (1188, 98, 298)),
        ("adrenalmnist3d", 64, (1188, 98, 298)),
    ],
)
def test_published_medmnist_files(name: str, size: int, splits: tuple[int, ...]) -> None:
    path = shared(f"medmnist/{name}{'' if size == 28 else f'_{size}'}.npz")
    records = MedMNIST(**node("medmnist", name=name, size=size, root=str(path.parent), verify="strict")).load()
    assert tuple(records.splits.count(split) for split in ("train", "val", "test")) == splits
    assert records.images.shape[1:] == (1, *[size] * facts(name)[0])
    assert (float(records.images.min()), float(records.images.max())) == (-1, 1)


def test_a_rebuilt_set_works_and_says_that_it_is_not_the_published_one() -> None:
    root = shared("medmnist_rebuilt/pneumoniamnist.npz").parent
    with pytest.warns(UserWarning, match="461eb7c864609ea6ae1b17b9e23e6b83, the published one is 28209eda"):
        records = MedMNIST(**node("medmnist", name="pneumoniamnist", root=str(root), download=False)).load()
    assert len(records) == 5856


# volume and folder


def test_one_scan_keeps_its_content_on_any_grid() -> None:
    image = torch.randn(1, 8, 8)
    torch.testing.assert_close(to_grid(image, 8, (1.0, 1.0)), image)
    ramp = torch.linspace(-1, 1, 32).expand(1, 20, 32)
    small = to_grid(ramp, 10, fit_steps((20, 32), (1.0, 1.0), 10, "crop"))
    centred = (torch.arange(10) - 4.5) * 2 * (2 / 31)  # 2 voxels a step
    torch.testing.assert_close(small[0, 5], centred, atol=1e-5, rtol=0)
    padded = to_grid(torch.ones(1, 4, 8) + torch.arange(8), 8, (1.0, 1.0))
    torch.testing.assert_close(padded[0, 0], torch.ones(8))  # beyond the border: the least value
    assert fit_steps((10, 20, 5), (1.0, 1.0, 4.0), 10, "pad") == (2.0, 2.0, 0.5)
    odd = torch.randn(1, 9, 8)
    torch.testing.assert_close(to_grid(odd, 6, (1.0, 1.0)), odd[:, 2:8, 1:7])  # voxel on voxel, not between two


def test_normalization_is_what_it_says() -> None:
    image = torch.cat([torch.arange(1000.0), torch.tensor([1e6])])[None, None]
    scaled = normalize(image, "percentile", None)
    torch.testing.assert_close(scaled[0, 0, 500], torch.tensor(0.0), atol=0.02, rtol=0)
    assert scaled[0, 0, -1] == 1
    torch.testing.assert_close(normalize(image, "range", (0.0, 500.0))[0, 0, 250], torch.tensor(0.0))
    assert normalize(image, "zscore", None).abs().max() <= 1
    with pytest.raises(DataError, match="no value inside the window"):
        normalize(image, "range", (-10.0, -5.0))


def png(path: Path, shape: tuple[int, ...] = (30, 40), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, shape, dtype=np.uint8)).convert(mode).save(path)


def folder(root: Path, table: str, **changes: Any) -> Folder:
    root.mkdir(parents=True, exist_ok=True)
    (root / "datalist.csv").write_text(table)
    return Folder(**node("folder", **({"root": str(root), "size": 16} | changes)))


COLUMNS = {"label": "finding", "patient": "who", "site": "where", "split": "part"}


def test_folder_reads_its_columns(tmp_path: Path) -> None:
    for index in range(4):
        png(tmp_path / f"{index}.png", mode="LA" if index else "RGBA")
    (tmp_path / "0.png").unlink()
    png(tmp_path / "0.png", mode="P")
    Image.fromarray(np.stack([np.arange(900, dtype=np.uint8).reshape(30, 30)] * 3, axis=-1)).save(tmp_path / "0.png")
    table = (
        "image,finding,who,where,part\n0.png,10,a,x,train\n1.png,9,b,x,validation\n2.png,,c,y,\n3.png,9.0,d,y,test\n"
    )
    records = folder(tmp_path, table, **COLUMNS).load()
    assert records.images.shape == (4, 1, 16, 16)
    assert records.labels.tolist() == [1, 0, -1, 0]
    assert records.classes == ("9", "10")
    assert records.splits == ("train", "val", "", "test")
    assert records.sites == ("x", "x", "y", "y")
    assert records.patients == ("a", "b", "c", "d")
    colour = folder(tmp_path, table, channels=3).load()
    assert colour.images.shape == (4, 3, 16, 16)
    assert colour.classes == ()
    assert colour.patients == ("0.png", "1.png", "2.png", "3.png")
    assert read_labels(["b", "", "a"], None)[1] == ("a", "b")


def test_orientation_and_spacing_of_volumes(tmp_path: Path) -> None:
    ras = np.zeros((10, 20, 8), dtype=np.float32)
    ras[7:, 3:9, 2:5] = 1
    image: Any = nib.Nifti1Image
    nib.save(image(ras, np.diag([2.0, 1.0, 2.5, 1])), tmp_path / "ras.nii.gz")
    turned = np.ascontiguousarray(ras[::-1].transpose(1, 0, 2))  # axes P, L
    affine = np.array([[0, -2.0, 0, 18], [1.0, 0, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]])
    nib.save(image(turned, affine), tmp_path / "other.nii.gz")
    table = "image\nras.nii.gz\nother.nii.gz\n"
    records = folder(tmp_path, table, spatial_dims=3, spacing=1.0, normalize="range").load()
    torch.testing.assert_close(records.images[0], records.images[1], atol=1e-4, rtol=0)
    assert records.spacing == (1.0, 1.0, 1.0)
    fitted = folder(tmp_path, table, spatial_dims=3, fit="pad").load()
    assert fitted.spacing == pytest.approx((1.25, 1.25, 1.25))  # 20 mm on 16 voxels


def test_dicom_values(tmp_path: Path) -> None:
    header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    header.save_as(tmp_path / "a.dcm")
    hounsfield = header.pixel_array.astype(np.float32) * float(header.RescaleSlope) + float(header.RescaleIntercept)
    image, spacing, _ = read(tmp_path / "a.dcm", 2)
    torch.testing.assert_close(image[0], torch.from_numpy(hounsfield))
    assert spacing == pytest.approx((0.661468, 0.661468))
    header.PhotometricInterpretation = "MONOCHROME1"
    header.save_as(tmp_path / "b.dcm")
    inverted = read(tmp_path / "b.dcm", 2).pixels
    torch.testing.assert_close(inverted, image.max() + image.min() - image)


def constant(root: Path) -> None:
    Image.fromarray(np.full((20, 20), 7, dtype=np.uint8)).save(root / "0.png")


def missing(root: Path) -> None:
    (root / "0.png").unlink()


def truncated(root: Path) -> None:
    (root / "0.png").write_bytes((root / "1.png").read_bytes()[:200])


def colourful(root: Path) -> None:
    png(root / "0.png", (20, 20, 3), "RGB")


def not_finite(root: Path) -> None:
    Image.fromarray(np.full((20, 20), np.nan, dtype=np.float32)).save(root / "0.tif")
    (root / "0.png").unlink()
    (root / "0.tif").rename(root / "0.png")


DEFECTS: list[tuple[Callable[[Path], None], str]] = [
    (constant, r"0\.png: is constant"),
    (missing, r"0\.png: no such file"),
    (truncated, r"0\.png: cannot be read"),
    (colourful, r"0\.png: got 3 channels, need 1\. Set data\.channels=3"),
    (not_finite, r"0\.png: holds NaN"),
]


@pytest.mark.parametrize(("spoil", "message"), DEFECTS, ids=[spoil.__name__ for spoil, _ in DEFECTS])
def test_folder_names_the_image_that_it_refuses(
    tmp_path: Path, spoil: Callable[[Path], None], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(4):
        png(tmp_path / f"{index}.png")
    spoil(tmp_path)
    table = "image\n" + "".join(f"{index}.png\n" for index in range(4))
    with pytest.raises(DataError, match=message):
        folder(tmp_path, table).load()
    with pytest.raises(DataError, match=rf"1 of 4 images cannot be used, data\.max_unreadable=0\.02.*{message}"):
        folder(tmp_path, table, unreadable="skip").load()
    records = folder(tmp_path, table, unreadable="skip", max_unreadable=0.25).load()
    assert len(records) == 3
    assert "1 of 4 images cannot be used and were skipped" in caplog.text


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        (
            "image,findings\n0.png,1\n",
            {"label": "finding"},
            r"no column 'finding'\. Set data\.label to one of: findings",
        ),
        ("image\n", {}, "has no rows"),
        ("image\n0.png\n", {"spatial_dims": 3}, r"2 dimensions, need 3\. Set data\.spatial_dims"),
        ("image\n0.txt\n", {}, "unknown format"),
        ("image,y\n0.png,1\n1.png,1\n", {"label": "y"}, "every label is '1', need two classes"),
        ("image,y\n0.png,a\n1.png,b\n2.png,c\n3.png,d\n", {"label": "y"}, "4 different values in 4 rows"),
        ("image,where\n0.png,x\n1.png,\n", {"site": "where"}, "'where' is empty in 1 of 2 rows"),
        ("image,part\n0.png,holdout\n", {"split": "part"}, "'part' holds 'holdout'. Use train, val, test"),
        (
            "image,who,part\n0.png,a,train\n1.png,a,test\n2.png,b,val\n",
            {"patient": "who", "split": "part"},
            r"1 of 2 patients are in more than one split",
        ),
    ],
)
def test_folder_refuses_a_data_list(tmp_path: Path, table: str, changes: dict[str, Any], message: str) -> None:
    for index in range(4):
        png(tmp_path / f"{index}.png")
    (tmp_path / "0.txt").write_text("text")
    with pytest.raises(DataError, match=message):
        folder(tmp_path, table, **changes).load()


def test_folder_refuses_settings_and_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root: got None, need the folder"):
        Folder(**node("folder"))
    with pytest.raises(ConfigError, match=r"data\.window: got \[5, 1\], need \[low, high\]"):
        Folder(**node("folder", root="x", window=[5, 1]))
    with pytest.raises(DataError, match="is not a folder"):
        Folder(**node("folder", root=str(tmp_path / "absent"))).load()
    (tmp_path / "other.csv").touch()
    with pytest.raises(DataError, match=r"datalist\.csv' does not exist \(CSV there: other\.csv\)"):
        Folder(**node("folder", root=str(tmp_path))).load()


def chest(**changes: Any) -> Records:
    root = shared("covid_cxr/metadata.csv").parent
    columns = {"image": "file", "label": "sex", "patient": "patientid", "site": "site", "datalist": "metadata.csv"}
    return Folder(**node("folder", root=str(root), size=32, **(columns | changes))).load()


def test_real_chest_x_rays() -> None:
    records = chest()
    assert records.images.shape == (261, 1, 32, 32)
    assert set(records.sites or ()) == {"australia", "hannover_de", "italy", "other", "uk"}
    assert records.classes == ("F", "M")
    lungs = records.images[:, 0, 8:20].mean(0)  # columns: dark lungs on both sides of a bright spine, upright
    assert lungs[:, 15:17].mean() > lungs[:, 7:11].mean()
    assert lungs[:, 15:17].mean() > lungs[:, 21:25].mean()


def test_real_volumes_and_dicom(tmp_path: Path) -> None:
    cases = sorted(shared("msd_hippocampus/imagesTr").glob("*.nii.gz"))[:20]
    cases += [shared(f"sct_spine/{name}") for name in ("t2/t2.nii.gz", "t2s/t2s.nii.gz")]
    records = folder(tmp_path, "image\n" + "".join(f"{case}\n" for case in cases), spatial_dims=3, fit="pad").load()
    assert records.images.shape == (22, 1, 16, 16, 16)
    assert bool((records.images.flatten(1).std(1) > 0.1).all())  # raw scales differ by four orders of magnitude
    four = shared("sct_spine/dmri/dmri.nii.gz")
    with pytest.raises(DataError, match="got 7 channels, need 1"):
        folder(tmp_path, f"image\n{four}\n", spatial_dims=3).load()
    samples = shared("dicom_samples")
    same = [read(samples / f"MR_small{kind}.dcm", 2)[0] for kind in ("", "_implicit", "_bigendian", "_RLE")]
    assert all(torch.equal(same[0], other) for other in same[1:])
    with pytest.raises(DataError, match=r"MR_truncated\.dcm: cannot be read \(ValueError: The number of bytes"):
        read(samples / "MR_truncated.dcm", 2)
    colour = folder(tmp_path, f"image\n{samples}/examples_rgb_color.dcm\n{samples}/examples_jpeg2k.dcm\n", channels=3)
    assert colour.load().images.shape == (2, 3, 16, 16)


# masks

MASKED = {"mask": "mask", "regions": {"inner": [4], "outer": [7, 4]}}


def bump(shape: tuple[int, ...], affine: Any) -> Any:
    """A smooth bump of anisotropic width about (14, 18, 12) mm, highest 1, sampled on a grid."""
    index = np.stack(np.meshgrid(*[np.arange(side) for side in shape], indexing="ij"), axis=-1)
    offset = index @ affine[:3, : len(shape)].T + affine[:3, 3] - (14, 18, 12)
    return np.exp(-((offset / (9, 11, 10)) ** 2).sum(-1)).astype(np.float32)


def levels(height: Any) -> Any:
    """What a mask stores: 4 in the middle, 7 around it."""
    return np.where(height > 0.6, 4, np.where(height > 0.2, 7, 0)).astype(np.uint8)


def drawn(image: torch.Tensor) -> torch.Tensor:
    """The labels of `levels` from a loaded bump, which is in [-1, 1]: 4 became 1, 7 became 2."""
    height = (image[0] + 1) / 2
    return ((height > 0.2).byte() * 2 - (height > 0.6).byte()).byte()


@pytest.mark.parametrize("changes", [{"spacing": 1.3}, {"spacing": 1.2}, {"fit": "pad"}, {"fit": "crop"}])
def test_masks_lie_on_their_images_whatever_the_affine_and_the_order_of_axes(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    turn = np.array([[0.96, -0.28, 0, 3], [0.28, 0.96, 0, -4], [0, 0, 1, 2], [0, 0, 0, 1]])
    affine = turn @ np.diag([1.1, 1.2, 1.7, 1])
    height = bump((26, 33, 19), affine)
    image: Any = nib.Nifti1Image
    nib.save(image(height * 500 + 100, affine), tmp_path / "a.nii.gz")
    mask = image(levels(height), affine)
    axes = nib.orientations.axcodes2ornt("ASR")
    nib.save(mask.as_reoriented(axes), tmp_path / "a_seg.nii.gz")
    table = "image,mask\na.nii.gz,a_seg.nii.gz\na.nii.gz,\n"
    records = folder(tmp_path, table, spatial_dims=3, size=24, normalize="range", **MASKED, **changes).load()
    assert records.regions == {"inner": (1,), "outer": (1, 2)}
    assert records.masks is not None
    assert records.masks.dtype == torch.uint8
    assert bool((records.masks[1] == UNLABELLED).all())
    expected = drawn(records.images[0])
    for label in (1, 2):
        found, real = records.masks[0] == label, expected == label
        assert 2 * (found & real).sum() / (found.sum() + real.sum()) > 0.93
        assert float(found.sum() / real.sum()) == pytest.approx(1, abs=0.06)
        centres = [part.nonzero().float().mean(0) for part in (found, real)]
        torch.testing.assert_close(*centres, atol=0.25, rtol=0)  # voxels


@pytest.mark.parametrize("step", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_resampled_labels_are_as_large_as_before(step: float) -> None:
    """Also where their borders fall right between two voxels."""
    draw, ratios = torch.Generator().manual_seed(0), []
    for _ in range(60):
        first, last = (torch.randint(low, low + 8, (2,), generator=draw).tolist() for low in (6, 22))
        labels = torch.zeros(37, 36, dtype=torch.uint8)
        labels[first[0] : last[0], first[1] : last[1]] = 1
        ratios.append(float(labels_to_grid(labels, 80, (step, step)).sum() * step**2 / labels.sum()))
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)


def blob(root: Path) -> Any:
    """A smooth photograph in 0.png, and where it is bright, bool (60, 44)."""
    height = bump((60, 44), np.array([[0.5, 0, 0, 0], [0, 0.8, 0, 0], [0, 0, 0, 12], [0, 0, 0, 1.0]]))
    Image.fromarray((height * 255).astype(np.uint8)).save(root / "0.png")
    return height > 0.4


def test_photographs_have_masks_of_any_kind(tmp_path: Path) -> None:
    bright = blob(tmp_path)
    white = Image.fromarray(bright.astype(np.uint8) * 255)
    white.save(tmp_path / "exact.png")
    white.convert("RGB").save(tmp_path / "grey.png")
    white.convert("1").save(tmp_path / "bits.png")
    for mode in ("L", "RGB"):
        white.convert(mode).save(tmp_path / f"{mode}.jpg", quality=30)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "L.jpg")))) > 20  # noise
    palette = Image.fromarray(bright.astype(np.uint8) * 3).convert("P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "palette.png")

    def masks(value: int, *names: str) -> torch.Tensor:
        table = "image,mask\n" + "".join(f"0.png,{name}\n" for name in names)
        regions = {"polyp": [value]}
        made = folder(tmp_path, table, size=40, fit="pad", normalize="range", mask="mask", regions=regions).load()
        assert made.masks is not None
        assert (made.masks[0] == (made.images[0, 0] > -0.2)).float().mean() > 0.99
        return made.masks

    found = masks(255, "exact.png", "grey.png", "bits.png", "L.jpg", "RGB.jpg")
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert found.unique().tolist() == [0, 1]
    assert (found[3:] != found[0]).float().mean() < 0.01
    assert torch.equal(masks(3, "palette.png")[0], found[0])


def test_masks_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    bright = blob(tmp_path)
    Image.fromarray(bright.astype(np.uint8) * 254).save(tmp_path / "odd.png")
    Image.fromarray(bright[:50].astype(np.uint8) * 4).save(tmp_path / "short.png")
    for kind in ("png", "jpg"):
        Image.fromarray(np.stack([bright * 4, bright * 0, bright * 250], axis=-1).astype(np.uint8)).save(
            tmp_path / f"colour.{kind}"
        )
    (tmp_path / "mask.dcm").write_bytes(b"x")

    def refused(name: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            folder(tmp_path, f"image,mask\n0.png,{name}\n", **MASKED).load()

    refused("odd.png", r"odd\.png: holds the value 254, data\.regions and the background have 0, 4, 7\.")
    refused("short.png", r"short\.png: has the grid 50 x 44, its image .*0\.png has 60 x 44")
    refused("colour.png", r"colour\.png: got 3 different channels")
    refused("colour.jpg", r"colour\.jpg: got 3 different channels")
    refused("mask.dcm", r"mask\.dcm: unknown format of a mask")
    refused("absent.png", r"absent\.png: no such file")
    with pytest.raises(DataError, match=r"1 of 1 images cannot be used.*odd\.png: holds the value 254"):
        folder(tmp_path, "image,mask\n0.png,odd.png\n", unreadable="skip", **MASKED).load()
    image: Any = nib.Nifti1Image
    height = bump((20, 20, 20), np.eye(4))
    nib.save(image(height, np.eye(4)), tmp_path / "a.nii")
    moved = np.eye(4)
    moved[0, 3] = 1
    nib.save(image(levels(height), moved), tmp_path / "a_seg.nii")
    both = (
        r"a_seg\.nii: has the grid 20 x 20 x 20 with the affine \[\[1.0, 0.0, 0.0, 1.0\].*, its image .*a\.nii has 20 x"
    )
    with pytest.raises(DataError, match=both):
        folder(tmp_path, "image,mask\na.nii,a_seg.nii\n", spatial_dims=3, **MASKED).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "mask"}, r"data\.mask: got 'mask', need null, or a column and data\.regions"),
        ({"regions": {"a": [1]}}, r"data\.regions: got .* and the column data\.mask"),
        ({"mask": "mask", "regions": {}}, r"data\.mask: got 'mask', need null, or a column and data\.regions"),
        ({"mask": "mask", "regions": {"a": 1}}, r"data\.regions: got \{'a': 1\}, need null, or names"),
        ({"mask": "mask", "regions": {"a": [0, 1]}}, r"data\.regions: .* whole numbers above 0"),
        ({"mask": "mask", "regions": {"A b": [1]}}, r"data\.regions: .* need null, or names of a-z"),
        ({"mask": "mask", "regions": {"a" * 21: [1]}}, r"data\.regions: .* up to 20 long"),
        ({"classes": ["a", "b"]}, r"data\.classes: .* and the column data\.label"),
        ({"label": "y", "classes": [True, False]}, r"data\.classes: .* need null, or two different names"),
        ({"label": "y", "classes": ["a"]}, r"data\.classes: .* need null, or two different names or more"),
        (
            {"label": "y", "labels": ["a"]},
            r"data\.labels: got \['a'\], need null, or up to 40 columns with data\.label=",
        ),
        *(
            ({"labels": columns}, r"data\.labels: .* their names differ in letters and digits, are at most 33 long")
            for columns in ([], "Mass", ["Mass", 1], ["A b", "a_b"], ["None"], ["a" * 34], [f"f{n}" for n in range(41)])
        ),
    ],
)
def test_masks_and_classes_need_their_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Folder(**node("folder", root="x", **changes))


def test_expected_classes_are_the_same_everywhere(tmp_path: Path) -> None:
    png(tmp_path / "0.png")
    rows = {"a": "0.png,2.0\n0.png,\n0.png,2\n", "b": "0.png,1\n0.png,3\n0.png,1\n"}
    found = {
        name: folder(tmp_path, f"image,y\n{table}", label="y", classes=[3, 1, 2]).load() for name, table in rows.items()
    }
    assert found["a"].classes == found["b"].classes == ("3", "1", "2")
    assert found["a"].labels.tolist() == [2, -1, 2]
    assert found["b"].labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match=r"data\.label: got '2\.0', data\.classes has 1, 3\. Add it there"):
        folder(tmp_path, f"image,y\n{rows['a']}", label="y", classes=["1", "3"]).load()


def test_findings_are_read_as_far_as_they_are_known_and_the_rarest_is_the_class(tmp_path: Path) -> None:
    png(tmp_path / "0.png")
    table = "image,Mass,Other Edema\n0.png,1,0\n0.png,0.0,\n0.png,,-1.0\n0.png,1.0,1\n0.png,-1,0\n"
    records = folder(tmp_path, table, labels=["Mass", "Other Edema"]).load()
    assert records.findings is not None
    assert records.findings.tolist() == [[1, 0], [0, -1], [-1, -1], [1, 1], [-1, 0]]
    assert records.classes == ("Mass", "Other Edema", "none")
    assert records.labels.tolist() == [0, 2, -1, 1, 2]
    absent = folder(tmp_path, "image,Mass,Hernia\n0.png,1,0\n0.png,0,0\n", labels=["Mass", "Hernia"]).load()
    assert absent.classes == ("Mass", "Hernia", "none")  # a site need not have every finding
    with pytest.raises(DataError, match=r"data\.labels: column 'Mass' has 'yes', need 1, 0, or for unknown -1"):
        folder(tmp_path, "image,Mass\n0.png,1\n0.png,yes\n", labels=["Mass"]).load()
    with pytest.raises(DataError, match=r"no column 'Mas'\. Set data\.labels\[1\] to one of: Mass"):
        folder(tmp_path, table, labels=["Other Edema", "Mas"]).load()


def test_real_hippocampi_keep_every_labelled_voxel(tmp_path: Path) -> None:
    root = shared("msd_hippocampus/dataset.json").parent
    cases = sorted(path.name for path in (root / "labelsTr").glob("*.nii.gz"))[:6]
    table = "image,mask\n" + "".join(f"{root}/imagesTr/{name},{root}/labelsTr/{name}\n" for name in cases)
    regions = {"anterior": [1], "posterior": [2]}
    changes = {"spatial_dims": 3, "size": 64, "mask": "mask", "regions": regions}
    exact = folder(tmp_path, table, spacing=1.0, **changes).load()
    coarse = folder(tmp_path, table, spacing=1.5, **(changes | {"size": 44})).load()
    assert exact.masks is not None
    assert coarse.masks is not None
    for name, mask, less in zip(cases, exact.masks, coarse.masks, strict=True):
        stored = np.asarray(nib.load(root / "labelsTr" / name).dataobj)
        for label in (1, 2):
            assert int((mask == label).sum()) == int((stored == label).sum())
            assert float((less == label).sum()) * 1.5**3 == pytest.approx(float((stored == label).sum()), rel=0.06)
    place = torch.stack(torch.meshgrid(*[torch.arange(64.0)] * 3, indexing="ij"))
    ends = [place[1][(exact.masks == label).any(0)].mean() for label in (1, 2)]
    assert ends[0] > ends[1]  # RAS: anterior is further along the second axis
