"""Is there a name, a date or a text where none is needed. Presence is told, never what is written there.

The product reads none of it; but whoever may read the folder could.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medfl.check.finding import NOTHING, Finding
from medfl.check.listing import Listing
from medfl.data import volume

TAGS = (  # of the basic profile (DICOM PS3.15 annex E) those that name people, places and days
    *("PatientName", "PatientBirthDate", "PatientBirthTime", "PatientAddress", "PatientTelephoneNumbers"),
    *("OtherPatientIDs", "OtherPatientNames", "PatientMotherBirthName", "EthnicGroup", "Occupation"),
    *("PatientComments", "AdditionalPatientHistory", "MilitaryRank", "MedicalRecordLocator", "IssuerOfPatientID"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName"),
    *("RequestingPhysician", "PhysiciansOfRecord", "InstitutionName", "InstitutionAddress", "StationName"),
    *("InstitutionalDepartmentName", "AccessionNumber", "StudyID", "StudyDate", "SeriesDate", "AcquisitionDate"),
    *("ContentDate", "InstanceCreationDate", "AcquisitionDateTime", "RequestAttributesSequence", "ImageComments"),
)
PSEUDONYM = "PatientID"  # needed in any file; counted where the file does not say that it is de-identified
CODED = ("PatientIdentityRemoved", "BurnedInAnnotation", "Modality", "ImageType")
RISKY = {"US", "SC", "ES", "XC", "OT", "GM", "SM", "RF"}  # kinds with text in the pixels
NAMES = re.compile(r"([A-Z][a-zäöüßéèáíóúñç]{2,})[ _,^-]+([A-Z][a-zäöüßéèáíóúñç]{2,})(?![a-z])")
DATES = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d[-._/]?(?:0[1-9]|1[0-2])[-._/]?(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[1-9]|[12]\d|3[01])[-._/](?:0[1-9]|1[0-2])[-._/](?:19|20)\d\d)(?!\d)"
)
COLUMNS = re.compile(
    r"(^|[^a-z])(name|surname|first_?name|last_?name|family|birth|dob|date|address|street|city|phone|mail|mrn|ssn|nhs"
    r"|insurance|physician|doctor|vorname|nachname|geburt\w*|geb|adresse|nom|prenom|naissance|nombre|apellido)"
    r"($|[^a-z])"
)
OFTEN = 3  # files with the same two words, above which they are a heading and no person
PLACES = ("db_name",)  # of a NIfTI header, for a name
TOLD = (0x010E, 0x013B, 0x8298, 0x9286, 0x9C9B, 0x9C9C, 0x9C9D)  # EXIF: description, artist, comments, titles
HARMLESS = ("Software", "jfif_unit", "icc_profile", "dpi", "compression")
PRIVATE_DATA = 0x1000  # elements below name the creator of those above


@dataclass
class Marks:
    """What one image's files carry besides pixels: names of tags alone."""

    tags: Counter[str] = field(default_factory=Counter)
    private: int = 0
    burned_in: bool = False
    risky: bool = False
    texts: bool = False  # in a header or in EXIF


def findings(listing: Listing, found: Sequence[tuple[str, Marks]]) -> list[Finding]:
    """
    Args:
        found: of each image file its name and its marks.
    """
    return [*_tags(found), *_pixels(found), _texts(found), _names(listing), _columns(listing), _cells(listing)]


def marks(path: Path) -> Marks:
    """Of a file, or of all files of a DICOM folder; what cannot be read has none."""
    seen = Marks()
    if not path.exists():
        return seen
    if volume.is_dicom(path):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            _look_into(file, seen)
    elif path.name.lower().endswith(volume.PHOTOGRAPHS):
        seen.texts = _photograph(path)
    elif path.name.lower().endswith(volume.NIFTI):
        seen.texts = _nifti(path)
    return seen


def _look_into(file: Path, seen: Marks) -> None:
    import pydicom
    from pydicom.datadict import keyword_for_tag

    try:
        header = pydicom.dcmread(file, stop_before_pixels=True)  # nothing of it outlives this function
    except Exception:  # no image, or damaged: another check says so
        return
    raw = {tag: header.get_item(tag) for tag in header.keys()}  # noqa: SIM118  values() would decode the texts
    filled = [tag for tag, element in raw.items() if element.value not in (None, b"", "")]
    held = {keyword_for_tag(tag): raw[tag].value for tag in filled if not tag.is_private}
    words = {name: _words(held.get(name)) for name in CODED}
    clean = "YES" in words["PatientIdentityRemoved"]
    seen.private += sum(tag.is_private and tag.element >= PRIVATE_DATA for tag in filled)
    seen.tags.update(name for name in held if name in TAGS or (name == PSEUDONYM and not clean))
    seen.burned_in |= "YES" in words["BurnedInAnnotation"]
    stated = "NO" in words["BurnedInAnnotation"]
    seen.risky |= not stated and bool(RISKY & words["Modality"] or {"SECONDARY"} & words["ImageType"])


def _words(raw: object) -> set[str]:
    text = raw.decode("ascii", "ignore") if isinstance(raw, bytes) else ""
    return {word.strip(" \0").upper() for word in text.split("\\")}


def _photograph(path: Path) -> bool:
    """Whether an EXIF or PNG text says anything that could name someone."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            texts = [value for key, value in image.info.items() if isinstance(value, str) and key not in HARMLESS]
            return bool(texts or {tag: 1 for tag in TOLD if image.getexif().get(tag)})
    except Exception:  # no image: another check says so
        return False


def _nifti(path: Path) -> bool:
    import nibabel

    try:
        header: Any = nibabel.load(path).header
    except Exception:  # no image: another check says so
        return False
    return any(bytes(header[name]).strip(b"\0 ") for name in PLACES if name in header)


def _finding(name: str, wrong: Sequence[str], what: str, why: str, fix: str, **counts: int) -> Finding:
    if not wrong:
        return Finding("privacy", name, "pass", NOTHING, counts=counts)
    return Finding("privacy", name, "warn", what, why, fix, counts, wrong)


def _tags(found: Sequence[tuple[str, Marks]]) -> list[Finding]:
    named = [f"{name}: {', '.join(sorted(one.tags))}" for name, one in found if one.tags]
    private = [f"{name}: {one.private} private tags" for name, one in found if one.private]
    why, fix = "The reader never reads them; who may read the folder can.", "De-identify the copy that medfl sees."
    what = f"{len(named)} of {len(found)} images have tags that name people, places or days"
    first = _finding("DICOM tags", named, what, why, fix, images=len(named))
    what = f"{len(private)} of {len(found)} images have private tags, which can hold anything"
    return [first, _finding("private tags", private, what, why, fix, images=len(private))]


def _pixels(found: Sequence[tuple[str, Marks]]) -> list[Finding]:
    burned = [name for name, one in found if one.burned_in]
    risky = [name for name, one in found if one.risky and not one.burned_in]
    why, fix = "Text in the pixels is trained on like everything else.", "Look at them; blank it, or leave them out."
    counts = {"images": len(burned)}
    stated = Finding("privacy", "burned-in text", "pass", NOTHING, counts=counts)
    if burned:
        what = f"{len(burned)} of {len(found)} images say that text is burned into their pixels"
        stated = Finding("privacy", "burned-in text", "fail", what, why, fix, counts, burned)
    what = f"{len(risky)} of {len(found)} images are of kinds that often have text in their pixels, and do not deny it"
    return [stated, _finding("likely text", risky, what, why, fix, images=len(risky))]


def _texts(found: Sequence[tuple[str, Marks]]) -> Finding:
    odd = [name for name, one in found if one.texts]
    why, fix = "They can name people; the reader never reads them.", "Save the images without metadata."
    what = f"{len(odd)} of {len(found)} images carry texts in their EXIF, PNG or NIfTI header"
    return _finding("header texts", odd, what, why, fix, images=len(odd))


def _names(listing: Listing) -> Finding:
    """Two words with capitals, unless many files have the same two; or a day."""
    names = [file.name for file in listing.files]
    people = [(name, match.groups()) for name in names if (match := NAMES.search(name.replace("/", " ")))]
    often = Counter(pair for _, pair in people)
    odd = [name for name, pair in people if often[pair] <= OFTEN]
    odd += [name for name in names if name not in odd and ("^" in name or DATES.search(name))]
    what, why = (
        f"{len(odd)} of {len(names)} file names look like names of people, or hold days",
        "Names of files reach logs.",
    )
    fix = "Name files by numbers or pseudonyms."
    return _finding("file names", odd, what, why, fix, files=len(odd))


def _columns(listing: Listing) -> Finding:
    used = {*listing.columns.values(), *listing.images}
    odd = [name for name in listing.rows[0] if name not in used and COLUMNS.search(name.lower())]
    what = f"{len(odd)} of {len(listing.rows[0])} columns are called like personal data"
    why, fix = "The product does not need them.", "Leave them out of the data list that medfl sees."
    return _finding("columns", odd, what, why, fix, columns=len(odd))


def _cells(listing: Listing) -> Finding:
    """Columns in which most filled cells are days, or written like people."""
    paths = {*listing.images, *(listing.columns[role] for role in ("mask", "brain") if role in listing.columns)}
    odd = []
    for column in (name for name in listing.rows[0] if name not in paths):
        filled = [row[column] for row in listing.rows if row.get(column)]
        like = sum(bool(DATES.fullmatch(cell) or "^" in cell or NAMES.fullmatch(cell)) for cell in filled)
        if like and like * 2 > len(filled) and len(set(filled)) > OFTEN:
            odd.append(column)
    what, why = (
        f"{len(odd)} of {len(listing.rows[0])} columns hold days or names of people",
        "The product does not need them.",
    )
    fix = "Replace them by pseudonyms, or leave them out."
    return _finding("cells", odd, what, why, fix, columns=len(odd))
