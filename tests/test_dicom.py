import itertools
import logging
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid

from medfl.data import dicom
from medfl.data.volume import Scan, read
from medfl.errors import DataError

CANARIES = ("DOE^JANE", "MRN-7788123", "19710203", "Canary General", "ACC-55512")
SHAPE = (7, 6, 5)  # columns, rows, slices


def bare(rows: int, columns: int, *, kind: Any = CTImageStorage) -> Dataset:
    """A file's data set, with names and dates wherever a tag has room for them."""
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = kind
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
    one.PatientName, one.PatientID, one.PatientBirthDate, one.InstitutionName, one.AccessionNumber = CANARIES
    one.SeriesDescription = CANARIES[0]
    one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    one.add_new(0x00091001, "LO", CANARIES[1])
    one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit, one.PixelRepresentation = 15, 1
    return one


def rotation(seed: int, *, oblique: bool) -> Any:
    """Directions of the voxel axes in LPS: any axis order and sign, slightly turned if oblique; right-handed."""
    rng = np.random.default_rng(seed)
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)[:, None]
    if oblique:
        turn, _ = np.linalg.qr(np.eye(3) + 0.1 * rng.standard_normal((3, 3)))
        axes = axes @ (turn * np.sign(np.diag(turn)))
    axes[2] = np.cross(axes[0], axes[1])
    return axes.T


def slices(values: Any, affine: Any, **changed: Any) -> list[Dataset]:
    """A volume (columns, rows, slices) of stored numbers with an affine (LPS) as one file per slice."""
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    made = []
    for k in range(values.shape[2]):
        one = bare(values.shape[1], values.shape[0])
        one.ImageOrientationPatient = [f"{x:.9g}" for x in (affine[:3, :2] / sides[:2]).T.ravel()]
        one.ImagePositionPatient = [f"{x:.9g}" for x in affine[:3, 3] + k * affine[:3, 2]]
        one.PixelSpacing, one.SliceThickness = [f"{sides[1]:.9g}", f"{sides[0]:.9g}"], "9.5"
        one.RescaleSlope, one.RescaleIntercept = "2.0", "-100.0"
        one.PixelData = values[:, :, k].T.astype("<i2").tobytes()
        for name, value in changed.items():
            setattr(one, name, value)
        made.append(one)
    return made


def save(folder: Path, files: list[Dataset], names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in zip(names or [f"{i:03}.dcm" for i in range(len(files))], files, strict=True):
        one.save_as(folder / name, enforce_file_format=True)
    return folder


def geometry(seed: int = 0, sides: tuple[float, float, float] = (0.7, 0.9, 2.5), *, oblique: bool = False) -> Any:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation(seed, oblique=oblique) * sides, (-31.5, 12.25, 80.0)
    return affine


def stored(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Any:
    return np.random.default_rng(seed).integers(-500, 3000, shape)


def through_nifti(path: Path, values: Any, affine: Any) -> Scan:
    """The same volume by the other reader; NIfTI is in RAS."""
    nib.save(nib.Nifti1Image(values.astype(np.float32) * 2 - 100, np.diag([-1, -1, 1, 1]) @ affine), path)
    return read(path, 3)


def same(one: Scan, other: Scan) -> None:
    torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-3)
    assert one.spacing == pytest.approx(other.spacing, abs=1e-4)
    np.testing.assert_allclose(np.asarray(one.affine), np.asarray(other.affine), atol=1e-3)


# geometry


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    oblique=st.booleans(),
    sides=st.tuples(*[st.floats(0.3, 5.0)] * 3),
    shape=st.tuples(st.integers(3, 7), st.integers(3, 7), st.integers(1, 5)),
)
def test_a_series_is_the_volume_that_nifti_gives(
    tmp_path_factory: pytest.TempPathFactory, seed: int, oblique: bool, sides: Any, shape: tuple[int, ...]
) -> None:
    folder, values = tmp_path_factory.mktemp("series"), stored(seed, shape)
    affine = geometry(seed, sides, oblique=oblique)
    files = slices(values, affine, SliceThickness=f"{sides[2]:.9g}")
    random.Random(seed).shuffle(files)  # the order of the names says nothing
    same(read(save(folder / "dicom", files), 3), through_nifti(folder / "a.nii.gz", values, affine))


def test_names_and_instance_numbers_do_not_order_slices(tmp_path: Path) -> None:
    files, volumes = slices(stored(), geometry(5)), []
    for turn, order in enumerate(([0, 1, 2, 3, 4], [4, 2, 0, 1, 3])):
        for number, place in enumerate(order):
            files[place].InstanceNumber = number + 1
        volumes.append(read(save(tmp_path / str(turn), [files[place] for place in order]), 3))
    same(*volumes)


def enhanced(values: Any, affine: Any, *, order: list[int]) -> Dataset:
    """One multi-frame file, its frames in any order."""
    parts = slices(values, affine)
    one = bare(values.shape[1], values.shape[0], kind=EnhancedMRImageStorage)
    one.NumberOfFrames = len(order)
    one.PixelData = b"".join(parts[k].PixelData for k in order)
    frames = []
    for k in order:
        frame, place, plane, content = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = parts[k].ImagePositionPatient
        plane.ImageOrientationPatient = parts[k].ImageOrientationPatient
        content.FrameAcquisitionDateTime = CANARIES[2]
        frame.PlanePositionSequence, frame.PlaneOrientationSequence = Sequence([place]), Sequence([plane])
        frame.FrameContentSequence = Sequence([content])
        frames.append(frame)
    one.PerFrameFunctionalGroupsSequence = Sequence(frames)
    shared, sizes, values_of = Dataset(), Dataset(), Dataset()
    sizes.PixelSpacing, sizes.SliceThickness = parts[0].PixelSpacing, "2.5"
    values_of.RescaleSlope, values_of.RescaleIntercept = "2.0", "-100.0"
    shared.PixelMeasuresSequence, shared.PixelValueTransformationSequence = Sequence([sizes]), Sequence([values_of])
    one.SharedFunctionalGroupsSequence = Sequence([shared])
    return one


def test_a_multi_frame_file_is_the_same_volume(tmp_path: Path) -> None:
    values, affine = stored(), geometry(3, oblique=True)
    reference = through_nifti(tmp_path / "a.nii.gz", values, affine)
    for name, order in {"a": [0, 1, 2, 3, 4], "b": [3, 1, 0, 4, 2]}.items():
        folder = save(tmp_path / name, [enhanced(values, affine, order=order)])
        same(read(folder / "000.dcm", 3), reference)
        same(read(folder, 3), reference)


def test_frames_without_a_place_stay_in_their_order(tmp_path: Path) -> None:
    one = bare(4, 3)
    one.NumberOfFrames, one.PixelSpacing, one.SpacingBetweenSlices = 5, ["0.5", "0.25"], "3.0"
    values = stored(1, (5, 4, 3))
    one.PixelData = values.astype("<i2").tobytes()
    scan = read(save(tmp_path, [one]) / "000.dcm", 3)
    assert scan.affine is None
    assert scan.spacing == (0.25, 0.5, 3.0)
    np.testing.assert_array_equal(scan.pixels[0], values.transpose(2, 1, 0))


# values


def test_values_of_one_file(tmp_path: Path) -> None:
    one = slices(stored(), geometry(), ImageType=["DERIVED", "SECONDARY"])[0]
    scan = read(save(tmp_path, [one]) / "000.dcm", 2)
    np.testing.assert_array_equal(scan.pixels[0], stored()[:, :, 0].T * 2.0 - 100)
    assert scan.spacing == pytest.approx((0.9, 0.7))
    one.PhotometricInterpretation = "MONOCHROME1"
    inverted = read(save(tmp_path, [one], ["IM000001"]) / "IM000001", 2).pixels
    torch.testing.assert_close(inverted, scan.pixels.max() + scan.pixels.min() - scan.pixels)
    del one.PixelSpacing
    one.ImagerPixelSpacing = ["0.2", "0.1"]
    assert read(save(tmp_path, [one]) / "000.dcm", 2).spacing == (0.2, 0.1)


def test_slices_have_their_own_scale(tmp_path: Path) -> None:
    files = slices(np.ones(SHAPE) * np.arange(7)[:, None, None], geometry())
    for k, one in enumerate(files):
        one.RescaleSlope, one.RescaleIntercept = str(k + 1), "0"
    low, high = read(save(tmp_path, files), 3).pixels.flatten(1).aminmax()
    assert (float(low), float(high)) == (0, 30)


# what is refused, and what is dropped


def localiser(**changed: Any) -> Dataset:
    return slices(stored(9, (9, 8, 1)), geometry(4), **changed)[0]


def test_localisers_are_dropped_and_counted(tmp_path: Path) -> None:
    files = slices(stored(), geometry())
    reference = read(save(tmp_path / "plain", files), 3)
    named = localiser(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    sideways = slices(stored(9, (7, 6, 1)), geometry(1))[0]
    report = bare(1, 1)
    for tag in ("Rows", "Columns"):
        delattr(report, tag)
    folder = save(tmp_path / "mixed", [named, *files, sideways, report])
    (folder / "notes.txt").write_text(CANARIES[0])
    same(read(folder, 3), reference)
    assert dicom.survey(folder).dropped == 2
    assert dicom.read(folder).dropped == 2
    alone = save(tmp_path / "scout", [named]) / "000.dcm"
    with pytest.raises(DataError, match="holds only localiser images"):
        read(alone, 2)


Files = list[Dataset]


def gap(files: Files) -> None:
    del files[2]


def sidewise(files: Files) -> None:
    along = geometry()[:3, 0]
    files[2].ImagePositionPatient = [float(x) + d for x, d in zip(files[2].ImagePositionPatient, along, strict=True)]


def placeless(files: Files) -> None:
    for one in files:
        del one.ImagePositionPatient


def no_number(files: Files) -> None:
    files[0].add(pydicom.DataElement(0x00280030, "LO", CANARIES[0]))


def compressed(files: Files) -> None:
    files[0].file_meta.TransferSyntaxUID = JPEGLosslessSV1
    files[0].PixelData = pydicom.encaps.encapsulate([b"1234"])
    files[0]["PixelData"].is_undefined_length = True


def tag(place: int, name: str, value: Any) -> Callable[[Files], None]:
    return lambda files: setattr(files[place], name, value)


BROKEN: dict[str, Callable[[Files], Any]] = {
    "gap": gap,
    "sidewise": sidewise,
    "twice": lambda files: files.extend(slices(stored(1), geometry())),
    "orientations": lambda files: files.extend(slices(stored(1), geometry(4))),
    "sizes": lambda files: files.append(slices(stored(1, (9, 8, 5)), geometry())[1]),
    "spacings": tag(3, "PixelSpacing", ["0.9", "0.8"]),
    "frames": lambda files: files.append(enhanced(stored(), geometry(), order=[0, 1, 2])),
    "placeless": placeless,
    "skewed": tag(0, "ImageOrientationPatient", ["1", "0", "0", "0.5", "0.8", "0"]),
    "no number": no_number,
    "negative": tag(0, "PixelSpacing", ["-1", "1"]),
    "colours": tag(0, "PhotometricInterpretation", CANARIES[0]),
    "palette": lambda files: [setattr(one, "PhotometricInterpretation", "PALETTE COLOR") for one in files],
    "inverted": tag(0, "PhotometricInterpretation", "MONOCHROME1"),
    "compressed": compressed,
    "syntax": lambda files: None,  # see below
}
REFUSED = {
    "gap": r"lie unevenly, 2\.5 to 5 mm",
    "sidewise": "lie unevenly",
    "twice": "5 of 10 slices lie at the place of another",
    "orientations": "mixes slices of several orientations",
    "sizes": "several sizes",
    "spacings": "several pixel spacings",
    "frames": "mixes multi-frame files with others",
    "placeless": "without position or orientation",
    "skewed": "not perpendicular",
    "no number": "PixelSpacing that is no number",
    "negative": "not above 0 mm",
    "colours": "unknown PhotometricInterpretation",
    "palette": "unknown PhotometricInterpretation. Need one of MONOCHROME1",
    "inverted": "several sizes or kinds",
    "compressed": "JPEG Lossless.*no installed decoder reads",
    "syntax": "no known transfer syntax",
}


def everything(error: BaseException | None) -> str:
    """All that an error carries, causes too."""
    if error is None:
        return ""
    return f"{error!r} {error.args} {everything(error.__cause__)} {everything(error.__context__)}"


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_makes_no_volume_is_refused_without_identifiers(tmp_path: Path, kind: str, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    files = slices(stored(), geometry())
    BROKEN[kind](files)
    folder = save(tmp_path, files, [f"{CANARIES[1]}-{n}.dcm" for n in range(len(files))])
    if kind == "syntax":  # pydicom would not write it
        whole = (folder / f"{CANARIES[1]}-0.dcm").read_bytes()
        (folder / f"{CANARIES[1]}-0.dcm").write_bytes(whole.replace(b"10008.1.2.1\0", b"10008.1.2.7\0"))
    caplog.clear()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=REFUSED[kind]) as caught:
            read(folder, 3)
    shown = everything(caught.value) + "".join(str(w.message) for w in heard) + caplog.text
    assert not [canary for canary in CANARIES if canary in shown]
    assert "10008.1.2.7" not in shown


def test_damaged_files_name_themselves_alone(tmp_path: Path) -> None:
    folder = save(tmp_path, slices(stored(), geometry()))
    whole = (folder / "000.dcm").read_bytes()
    for length in (140, 200, 300, len(whole) - 10):
        (folder / "cut.dcm").write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            read(folder / "cut.dcm", 2)
        assert not [canary for canary in CANARIES if canary in everything(caught.value)]
    (folder / "text.dcm").write_text("no image")
    with pytest.raises(DataError, match="is no DICOM image"):
        read(folder / "text.dcm", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no DICOM image among its files"):
        read(tmp_path / "empty", 3)


# what is never read


def test_only_named_tags_are_returned(tmp_path: Path) -> None:
    values, affine = stored(), geometry()
    folder = save(tmp_path / "series", slices(values, affine))
    frames = save(tmp_path / "frames", [enhanced(values, affine, order=[0, 1, 2, 3, 4])])
    for path in (folder, frames / "000.dcm", folder / "002.dcm"):
        found = [repr(dicom.read(path)), repr(dicom.survey(path))]
        assert not [c for c, text in itertools.product(CANARIES, found) if c in text]


def test_a_change_of_any_other_tag_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other tag is even asked for."""
    asked: set[str] = set()
    plain = pydicom.dcmread

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.update(options["specific_tags"])
        return plain(*arguments, **options)

    monkeypatch.setattr(pydicom, "dcmread", spy)
    dicom.read(save(tmp_path, slices(stored(), geometry())))
    personal = ("Patient", "Name", "Date", "Time", "UID", "Institution", "Physician", "Number", "Description", "Study")
    assert not [
        tag for tag in asked - {"NumberOfFrames"} if any(part in tag for part in personal) and "Image" not in tag
    ]
