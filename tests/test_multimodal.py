"""Subjects of several modalities: one grid, one window, absent ones zero, labels by convention, defects by name."""

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from medfl.data.multimodal import Multimodal
from medfl.data.sample import UNLABELLED, Records, present
from medfl.data.subject import Files, load
from medfl.errors import ConfigError, DataError
from tests.shared_data import shared

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "data" / "multimodal.yaml"
Volume = NDArray[np.float32]


def multimodal(folder: Path, table: str | None = None, **changes: Any) -> Multimodal:
    if table is not None:
        (folder / "datalist.csv").write_text(table)
    arguments = yaml.safe_load(CONFIG.read_text())
    del arguments["_target_"]
    small = {"root": str(folder), "modalities": ["flair", "t1"], "channels": 2, "size": 16, "depth": 12}
    return Multimodal(**(arguments | small | changes))


def saved(path: Path, values: Volume, affine: Volume | None = None) -> None:
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4) if affine is None else affine), path)


def head(shape: tuple[int, ...] = (24, 20, 18), *, seed: int = 0) -> Volume:
    """A box of random values from 1 to 100 in the middle of zeros, 4 voxels from each border."""
    out = np.zeros(shape, np.float32)
    inner = tuple(slice(4, -4) for _ in shape)
    out[inner] = np.random.default_rng(seed).uniform(1, 100, out[inner].shape)
    return out


def drawing(values: tuple[int, ...]) -> Volume:
    """A mask of the shape of `head()` with a block of each value in the brain."""
    mask = np.zeros((24, 20, 18), np.float32)
    for place, value in enumerate(values):
        mask[6 + 2 * place : 8 + 2 * place, 8:10, 8:10] = value
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two subjects: a has flair, t1 and a mask; b has t1 alone."""
    saved(tmp_path / "a_flair.nii.gz", head(seed=1))
    saved(tmp_path / "a_t1.nii", head(seed=2))
    saved(tmp_path / "b_t1.nii.gz", head(seed=3) * 1000)
    saved(tmp_path / "a_seg.nii.gz", drawing((1, 2, 4)))
    return tmp_path


TABLE = "id,flair,t1,seg,hospital\na,a_flair.nii.gz,a_t1.nii,a_seg.nii.gz,north\nb,,b_t1.nii.gz,,south\n"
COLUMNS = {"mask": "seg", "patient": "id", "site": "hospital"}


def drawn(records: Records) -> torch.Tensor:
    assert records.masks is not None
    return records.masks


def test_a_missing_modality_is_zero_and_a_missing_mask_unlabelled(root: Path) -> None:
    records = multimodal(root, TABLE, **COLUMNS).load()
    assert records.images.shape == (2, 2, 16, 16, 12)
    assert (records.modalities, records.patients, records.sites) == (("flair", "t1"), ("a", "b"), ("north", "south"))
    assert (records.spacing, records.classes, records.splits) == ((1.0,) * 3, (), ("", ""))
    assert present(records.images).tolist() == [[True, True], [False, True]]
    assert (float(records.images.min()), float(records.images.max())) == (0, 1)
    assert bool((drawn(records)[1] == UNLABELLED).all())
    assert drawn(records)[0].unique(return_counts=True)[1][1:].tolist() == [8, 8, 8]
    assert multimodal(root, TABLE, patient="id").load().masks is None
    assert multimodal(root, TABLE).load().patients == ("a_flair.nii.gz", "b_t1.nii.gz")


def test_the_window_is_measured_inside_the_brain_of_each_modality(root: Path) -> None:
    records = multimodal(root, TABLE, size=20, depth=18).load()
    stored = torch.from_numpy(head(seed=2))
    brain = stored > 0
    low, high = np.percentile(stored[brain].numpy(), (0.5, 99.5))
    expected = ((stored - low) / (high - low)).clamp(0, 1) * brain
    torch.testing.assert_close(records.images[0, 1], expected[2:-2], rtol=0, atol=1e-5)  # x is centred, 24 -> 20
    whole = multimodal(root, TABLE, size=20, depth=18, normalize="code").load()
    torch.testing.assert_close(whole.images[0, 1], (stored / stored.max())[2:-2], rtol=0, atol=1e-5)
    assert bool((records.images[0, 0][~brain[2:-2]] == 0).all())


@pytest.mark.parametrize(("convention", "values"), [("brats2013", (1, 2, 4)), ("brats2013", (3, 2, 4))])
@pytest.mark.parametrize("column", [True, False])
def test_labels_follow_the_convention(root: Path, convention: str, values: tuple[int, ...], column: bool) -> None:
    saved(root / "a_seg.nii.gz", drawing(values) * 0.9999999)  # as a scale factor leaves them
    table = f"flair,t1,seg,how\na_flair.nii.gz,a_t1.nii,a_seg.nii.gz,{convention if column else ''}\n"
    changes = {"convention": "how"} if column else {"labels": convention}
    mask = drawn(multimodal(root, table, mask="seg", size=24, depth=18, **changes).load())[0]
    assert [int(mask[6 + 2 * place, 2 + 8, 8]) for place in range(3)] == [1, 2, 3]
    saved(root / "a_seg.nii.gz", drawing((1, 2, 3)))
    assert int(drawn(multimodal(root, table, mask="seg", labels="brats2023", size=24).load())[0].max()) == 3


@pytest.mark.parametrize("axes", ["LPS", "ASR", "IRA"])
def test_the_order_of_the_axes_in_the_file_does_not_matter(root: Path, axes: str) -> None:
    plain = multimodal(root, TABLE, **COLUMNS).load()
    for name in ("a_flair.nii.gz", "a_t1.nii", "a_seg.nii.gz"):
        image = nib.load(root / name, mmap=False)
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)
        )
        nib.save(image.as_reoriented(turn), root / name)
    turned = multimodal(root, TABLE, **COLUMNS).load()
    torch.testing.assert_close(turned.images, plain.images, rtol=0, atol=1e-6)
    assert torch.equal(drawn(turned), drawn(plain))


def smooth(shape: tuple[int, ...], affine: Volume) -> Volume:
    """A bump about the point (20, 18, 16) mm, sampled on a grid."""
    index = np.stack(np.meshgrid(*[np.arange(side) for side in shape], indexing="ij"), axis=-1)
    at = index @ affine[:3, :3].T + affine[:3, 3]
    bump: Volume = 100 * np.exp(-((at - (20, 18, 16)) ** 2).sum(-1) / (2 * 6.0**2))
    return np.where(bump > 1, bump, 0).astype(np.float32)


def test_a_file_on_another_grid_is_resampled_onto_the_first_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turn = np.array([[0.96, -0.28, 0, 3], [0.28, 0.96, 0, -4], [0, 0, 1, 2], [0, 0, 0, 1]])
    other = (
        turn @ np.diag([-1.5, 1.2, 2.0, 1]) @ np.array([[1, 0, 0, -26], [0, 1, 0, 0], [0, 0, 1, -3], [0, 0, 0, 1.0]])
    )
    saved(tmp_path / "flair.nii", smooth((40, 36, 32), np.eye(4)))
    saved(tmp_path / "t1.nii", smooth((30, 34, 24), other), other)
    saved(tmp_path / "seg.nii", (smooth((30, 34, 24), other) > 40).astype(np.float32), other)
    with caplog.at_level(logging.WARNING):
        records = multimodal(
            tmp_path, "flair,t1,seg\nflair.nii,t1.nii,seg.nii\n", mask="seg", size=40, depth=32, normalize="code"
        ).load()
    assert "2 files lie on another grid than their subject's first one" in caplog.text
    flair, t1 = records.images[0]
    torch.testing.assert_close(t1, flair, rtol=0, atol=0.06)
    assert float((t1 - flair).abs().mean()) < 0.004
    inside, mask = flair > 0.4, drawn(records)[0] > 0
    assert float((inside & mask).sum() / (inside | mask).sum()) > 0.8
    centres = [torch.stack([at.double().mean() for at in where.nonzero(as_tuple=True)]) for where in (inside, mask)]
    torch.testing.assert_close(*centres, rtol=0, atol=0.3)


def test_resampling_onto_a_grid_is_monais(tmp_path: Path) -> None:
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import ResampleToMatch

    other = np.diag([1.3, 1.1, 0.9, 1])
    target, moving = head(), head((20, 20, 20), seed=5)
    saved(tmp_path / "a.nii", target)
    saved(tmp_path / "b.nii", moving, other)
    paths = (tmp_path / "a.nii", tmp_path / "b.nii")
    files = Files(name="s", images=paths, brain=None, mask=None, convention="brats2017")
    got = load(files, spacing=(None, None, None), normalize="code")
    expected = ResampleToMatch(mode="bilinear", padding_mode="zeros")(
        MetaTensor(torch.from_numpy(moving)[None], affine=torch.from_numpy(other)),
        MetaTensor(torch.from_numpy(target)[None], affine=torch.eye(4)),
    )[0]
    torch.testing.assert_close(got.images[1], expected / expected.max() * got.brain, rtol=0, atol=1e-5)
    assert got.moved == (paths[1],)


@pytest.mark.parametrize("spacing", [0.5, 1.6, 2.0])
def test_another_spacing_keeps_every_point_in_its_place(tmp_path: Path, spacing: float) -> None:
    affine = np.diag([1.0, 1.25, 2.0, 1])
    stored = smooth((40, 30, 16), affine)
    saved(tmp_path / "flair.nii", stored, affine)
    saved(tmp_path / "seg.nii", (stored > 40).astype(np.float32), affine)
    records = multimodal(
        tmp_path,
        "flair,seg\nflair.nii,seg.nii\n",
        modalities=["flair"],
        channels=1,
        mask="seg",
        spacing=spacing,
        size=int(48 / spacing),
        depth=int(40 / spacing),
        normalize="code",
    ).load()
    image, mask = records.images[0, 0].double(), (drawn(records)[0] == 1).double()
    for axis in range(3):
        rest = tuple(other for other in range(3) if other != axis)
        at = torch.arange(image.shape[axis], dtype=torch.float64)
        apart = [float((values.sum(rest) * at).sum() / values.sum()) * spacing for values in (image, mask)]
        assert apart[0] == pytest.approx(apart[1], abs=0.3)  # mm
    assert float(mask.sum()) * spacing**3 == pytest.approx((stored > 40).sum() * 2.5, rel=0.1)
    assert float(image.sum()) * spacing**3 == pytest.approx(stored.sum() / stored.max() * 2.5, rel=0.1)


def towers(root: Path, **changes: Any) -> Records:
    """One subject whose value is its height: the brain is z = 4 to 27."""
    values = np.zeros((10, 12, 32), np.float32)
    values[2:9, 3:10, 4:28] = np.arange(4, 28)
    saved(root / "tower.nii", values)
    settings = {"modalities": ["t1"], "channels": 1, "size": 8, "normalize": "code"} | changes
    return multimodal(root, "id,t1\np,tower.nii\n", patient="id", **settings).load()


def heights(records: Records) -> list[list[int]]:
    """Values found in each part."""
    return [sorted({round(float(v) * 27) for v in image[image > 0]}) for image in records.images]


def test_slabs_lie_evenly_over_the_brain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert heights(towers(tmp_path, depth=6)) == [list(range(13, 19))]
    assert heights(towers(tmp_path, depth=40)) == [list(range(4, 28))]
    assert heights(towers(tmp_path, depth=8, slabs=3)) == [[*range(4, 12)], [*range(12, 20)], [*range(20, 28)]]
    wide = towers(tmp_path, depth=12, slabs=3)
    assert heights(wide) == [[*range(4, 14)], [*range(10, 22)], [*range(18, 28)]]
    assert wide.patients == ("p",) * 3
    flat = towers(tmp_path, spatial_dims=2, depth=None, slabs=4)
    assert flat.images.shape == (4, 1, 8, 8)
    assert heights(flat) == [[6], [12], [18], [24]]
    assert bool((flat.images[0, 0] > 0).sum() == 49)  # 7 x 7, whole
    with caplog.at_level(logging.WARNING):
        apart = towers(tmp_path, depth=8, slabs=3, slab_splits=["train", "val", "test"])
    assert apart.patients == ("p slab 1", "p slab 2", "p slab 3")
    assert apart.splits == ("train", "val", "test")
    assert "each of the 1 brains is in several splits" in caplog.text
    with pytest.raises(DataError, match=r"subject 'p': 3 slabs of 9 voxels overlap in a brain of 24.* to 8 or less"):
        towers(tmp_path, depth=9, slabs=3, slab_splits=["train", "val", "test"])


def test_a_brain_mask_takes_the_place_of_values_above_zero(root: Path) -> None:
    for name in ("a_flair.nii.gz", "a_t1.nii"):
        stored = np.asarray(nib.load(root / name, mmap=False).dataobj)
        saved(root / name, np.where(stored > 0, (stored - 50) / 29, -2).astype(np.float32))
    saved(root / "a_brain.nii.gz", (head(seed=1) > 0).astype(np.float32) * 0.9999999)
    table = "id,flair,t1,brain\na,a_flair.nii.gz,a_t1.nii,a_brain.nii.gz\n"
    with pytest.raises(DataError, match=r"a_flair\.nii\.gz: \d+% of its values are below 0.* Set data\.brain"):
        multimodal(root, table).load()
    table += "b,,b_t1.nii.gz,\n"  # an empty cell: by its values
    images = multimodal(root, table, brain="brain", size=24, depth=18).load().images
    assert bool((images[1, 1, 4:-4, 6:-6, 4:-4] > 0).float().mean() > 0.98)
    torch.testing.assert_close(
        (images[0, 0, :, 2:-2] > 0).float().sum(), torch.tensor(16.0 * 12 * 10), rtol=0.01, atol=0
    )
    assert bool((images[0, 0, :4] == 0).all())


def broken(root: Path, case: str) -> None:
    changes: dict[str, Volume] = {
        "nan": np.where(head() > 0, np.nan, 0),
        "four axes": np.ones((8, 8, 8, 2)),
        "flat": (head(seed=1) > 0) * 7.0,
        "far": head(),
    }
    if case in changes:
        saved(root / "a_t1.nii", changes[case], np.diag([1, 1, 1, 1.0]) + 500 * (case == "far") * np.eye(4, k=3))
    if case == "damaged":
        (root / "a_t1.nii").write_bytes(b"no scan")
    if case == "photograph":
        (root / "a_t1.png").write_bytes(b"no scan")
        (root / "datalist.csv").write_text("id,flair,t1\na,a_flair.nii.gz,a_t1.png\n")
    if case == "label":
        saved(root / "a_seg.nii.gz", drawing((1, 3)))
    if case == "half":
        saved(root / "a_seg.nii.gz", drawing((1, 2)) / 2)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nan", r"subject 'a': .*a_t1\.nii: holds NaN or infinite values"),
        ("four axes", r"subject 'a': .*a_t1\.nii: got 4 axes, need one volume of 3"),
        ("flat", r"subject 'a': .*a_t1\.nii: is constant \(7\) inside the brain"),
        ("far", r"subject 'a': .*a_t1\.nii: is constant \(0\) inside the brain.* affine"),
        ("damaged", r"subject 'a': .*a_t1\.nii: cannot be read"),
        ("photograph", r"subject 'a': .*a_t1\.png: unknown format"),
        ("label", r"subject 'a': .*a_seg\.nii\.gz: holds the label 3, brats2017 has 0, 1, 2, 4\. Set data\.labels"),
        ("half", r"subject 'a': .*a_seg\.nii\.gz: holds the label 0\.5"),
    ],
)
def test_a_file_is_refused_with_its_subject(root: Path, case: str, message: str) -> None:
    (root / "datalist.csv").write_text(TABLE)
    broken(root, case)
    columns = COLUMNS if case != "photograph" else {"patient": "id"}
    with pytest.raises(DataError, match=message):
        multimodal(root, **columns).load()


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("id,flair,t1\na,,\n", {"patient": "id"}, r"subject 'a': has no file of any modality"),
        ("id,flair,t1\na,,none.nii\n", {"patient": "id"}, r"subject 'a': .*none\.nii: no such file"),
        ("flair,t2\nx,y\n", {}, r"has no column 't1'\. Set data\.modalities\[1\] to one of"),
        ("flair,t1\n", {}, r"datalist\.csv: has no rows\. Add one per subject"),
        ("flair,t1,cv\na_flair.nii.gz,,brats\n", {"convention": "cv"}, r"column 'cv' holds 'brats'\. Use one of"),
        ("flair,t1,s\na_flair.nii.gz,,dev\n", {"split": "s"}, r"column 's' holds 'dev'\. Use train, val, test"),
    ],
)
def test_a_data_list_is_refused(root: Path, table: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        multimodal(root, table, **changes).load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"root": None}, r"data\.root: got None, need the folder"),
        ({"modalities": ["T1", "t2"]}, r"data\.modalities: .* need different names of a-z, 0-9 and _"),
        ({"channels": 4}, r"data\.channels: got 4, need 2, one per modality"),
        ({"labels": "brats"}, r"data\.labels: got 'brats', need one of brats2013, brats2017, brats2023"),
        ({"spatial_dims": 2}, r"data\.depth: got 12, need .*null in 2D"),
        ({"slab_splits": ["train"], "slabs": 2}, r"data\.slab_splits: .* for every slab"),
        ({"slab_splits": ["train"], "split": "s"}, r"data\.slab_splits: .* data\.split=null"),
        ({"normalize": "zscore"}, r"data\.normalize: got 'zscore', need one of robust, code"),
        ({"spacing": 0}, r"data\.spacing: got 0, need mm per voxel above 0"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        multimodal(tmp_path, **changes)


# real scans


def test_a_real_standardised_patient_keeps_every_labelled_voxel(tmp_path: Path) -> None:
    folder = shared("brats2013_deepmedic/brats_2013_pat0003_1")
    files = "Flair_subtrMeanDivStd.nii.gz,T1c_subtrMeanDivStd.nii.gz,OTMultiClass.nii.gz,brainmask.nii.gz"
    (tmp_path / "list.csv").write_text(f"flair,t1ce,seg,bm\n{files}\n")
    columns = {"mask": "seg", "brain": "bm", "labels": "brats2013", "datalist": str(tmp_path / "list.csv")}
    records = multimodal(folder, modalities=["flair", "t1ce"], size=200, depth=155, **columns).load()
    counts = torch.bincount(drawn(records).flatten().long(), minlength=4)[1:]
    assert counts.tolist() == [1252 + 3162, 148264, 21250]
    flair, t1ce = records.images[0]
    assert int((flair > 0).sum()) == pytest.approx(1690470, rel=0.01)
    assert flair[drawn(records)[0] == 2].mean() > 1.5 * flair[(drawn(records)[0] == 0) & (flair > 0)].mean()
    assert t1ce[drawn(records)[0] == 3].mean() > 1.5 * t1ce[(drawn(records)[0] == 0) & (t1ce > 0)].mean()


def test_real_patients_of_two_hospitals_have_all_four_modalities(tmp_path: Path) -> None:
    folder = shared("tcga_lgg")
    rows = [
        ",".join(f"{case}/{case}_{kind}.nii.gz" for kind in ("flair", "t1c", "t1", "t2", "seg_auto_fused"))
        for case in ("TCGA-DU-7294", "TCGA-FG-6692")
    ]
    (tmp_path / "list.csv").write_text("flair,t1ce,t1,t2,seg\n" + "\n".join(rows) + "\n")
    names = ["flair", "t1ce", "t1", "t2"]
    places = {"datalist": str(tmp_path / "list.csv"), "mask": "seg", "modalities": names, "channels": 4}
    records = multimodal(folder, size=40, depth=40, spacing=4.0, **places).load()
    assert bool(present(records.images).all())
    assert [mask.unique().tolist() for mask in drawn(records)] == [[0, 1, 2], [0, 1, 2, 3]]
    tumour = drawn(records) > 0
    healthy = (drawn(records) == 0) & (records.images[:, 0] > 0)
    for row in range(2):
        assert records.images[row, 0][tumour[row]].mean() > 1.2 * records.images[row, 0][healthy[row]].mean()
