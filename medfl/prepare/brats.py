"""BraTS (Menze et al. 2015, Bakas et al. 2017, Baid et al. 2021), in the folders and names of 2017 to 2023."""

import re
from collections import Counter, defaultdict

from medfl.data.datalist import Row
from medfl.errors import DataError
from medfl.prepare.contents import Contents, Missing
from medfl.prepare.lists import listed
from medfl.prepare.table import Table, entries

OLD = {"flair": "flair", "t1ce": "t1ce", "t1": "t1", "t2": "t2", "seg": "mask"}  # ending -> column, until 2021
NEW = {"t2f": "flair", "t1c": "t1ce", "t1n": "t1", "t2w": "t2"}  # of 2023, whose masks have 3 where others have 4
MODALITIES = ("flair", "t1ce", "t1", "t2")
HOSPITAL = re.compile(r"BraTS1[789]_([A-Za-z0-9]+)_.+", re.IGNORECASE)  # Brats18_CBICA_AAB_1
TIMEPOINT = re.compile(r"(BraTS1[789]_.+)_\d+|(BraTS-[A-Z]+-\d+)-\d+", re.IGNORECASE)
UNNAMED = "unnamed"


def brats(contents: Contents) -> Table:
    """One row per case; the timepoints of a patient share the patient. Until 2019 the names hold the hospital."""
    cases, conventions = _cases(contents)
    splits, older = listed(contents), _older_names(contents)
    if splits and not splits.keys() & cases.keys():
        raise DataError(f"{contents.source}: train.txt there names no case such as {min(cases)}. Remove it.")
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    for case, files in sorted(cases.items()):
        if splits and case not in splits:
            left_out["cases that no list names"] += 1
            continue
        found = HOSPITAL.fullmatch(older.get(case, case))
        row = {column: files.get(column, "") for column in (*MODALITIES, "mask")}
        row |= {"convention": conventions[case], "patient": patient_of(case), "split": splits.get(case, "")}
        rows.append(row | {"site": found[1] if found else UNNAMED})
    named = any(row["site"] != UNNAMED for row in rows)
    return Table(
        rows=rows if named else [{column: cell for column, cell in row.items() if column != "site"} for row in rows],
        files=(*MODALITIES, "mask"),
        left_out=left_out,
        notes=() if named else ("this release names no hospitals: sites are simulated",),
        command=("experiment=nslf_brats2021",),
    )


def patient_of(case: str) -> str:
    """The name of a case without its timepoint, where the names have one."""
    found = TIMEPOINT.fullmatch(case)
    return (found[1] or found[2]) if found else case


def _cases(contents: Contents) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Case -> column -> file, and case -> convention of its mask.

    Raises:
        Missing: there is none.
    """
    cases: dict[str, dict[str, str]] = defaultdict(dict)
    conventions: dict[str, str] = {}
    endings = "|".join((*OLD, *NEW))
    for name, found in contents.matching(rf"([^/]+)/[^/]+[_-]({endings})\.nii(?:\.gz)?"):
        case, ending = found[1], found[2].lower()
        cases[case].setdefault((OLD | NEW)[ending], name)
        if ending != "seg":
            conventions[case] = "brats2023" if ending in NEW else "brats2017"
    for name, found in contents.matching(r"([^/]+)/[^/]+_Segm\.nii(?:\.gz)?"):  # the mask of case 355 of 2020
        cases[found[1]].setdefault("mask", name)
    known = {case: files for case, files in cases.items() if case in conventions}
    if not known:
        raise Missing("case such as BraTS2021_00000/BraTS2021_00000_flair.nii.gz")
    return known, conventions


def _older_names(contents: Contents) -> dict[str, str]:
    """Case of 2020 -> its name in 2017 to 2019, which holds the hospital."""
    found: dict[str, str] = {}
    for name, _ in contents.matching(r"name_mapping\.csv"):
        for entry in entries(contents, name, "BraTS_2020_subject_ID"):
            older = [entry.get(f"BraTS_{year}_subject_ID", "") for year in (2017, 2018, 2019)]
            found[entry["BraTS_2020_subject_ID"]] = next((text for text in older if HOSPITAL.fullmatch(text)), "")
    return found
