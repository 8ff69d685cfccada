"""Findings on the image files: readable, with values in them, of like geometry, each only once."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from medfl.check.finding import NOTHING, Finding, State
from medfl.check.listing import Listed, Listing
from medfl.check.look import Seen
from medfl.check.targets import Drawn

UNUSABLE = {  # check -> what is wrong, why it matters, what to do
    "missing": (
        "are not there", "Training stops at the first one.", "Correct the names (capitals count) or data.root."
    ),
    "readable": (
        "cannot be read", "A damaged or unknown file stops training.", "Export the files again, or leave them out."
    ),
    "series": (
        "are DICOM series that make no volume", "A wrong geometry would train silently on distorted anatomy.",
        "Give each series its own folder; export incomplete ones again.",
    ),
    "dimensions": (
        "have another number of dimensions", "2D and 3D images cannot be mixed.",
        "Set data.spatial_dims, or leave them out.",
    ),
    "values": (
        "hold NaN or infinite values", "One such value spoils the whole model.", "Repair or leave them out."
    ),
    "constant": ("are constant", "There is nothing to learn from them.", "Leave them out."),
    "channels": (
        "have another number of channels", "Grey and colour images cannot be mixed.", "Convert them to one kind."
    ),
    "window": ("have no value inside of data.window", "They would be constant.", "Widen it, or check the unit."),
}  # fmt: skip
SPACING, SIDE, SCALE = 3.0, 4.0, 30.0  # factors from the median beyond which one stands out
SMALLEST, LARGEST = 1e-3, 100.0  # mm that a voxel can have
LEAST_SIDE = 8  # voxels
ASPECT = 1.15  # above which a picture is clearly lying or standing
FEW = 0.1  # share of the images that lie otherwise than the rest

Looked = Sequence[tuple[Listed, Seen]]


def findings(listing: Listing, looked: Looked) -> list[Finding]:
    good = [(file, seen) for file, seen in looked if not seen.check]
    volumes = [(file, seen) for file, seen in good if seen.spacing != (1.0,) * len(seen.spacing)]
    return [
        *_unusable(listing, looked),
        _dropped(good),
        _stand_out("flat", [(file, "almost all of one value") for file, seen in good if seen.flat], len(good),
                   "are almost empty", "Little can be learned from them.", "Look at them; leave out what is empty."),
        _impossible(volumes),
        _stand_out("spacing", _spacings(volumes), len(volumes), "have a spacing far from the others'",
                   "A wrong unit or header makes anatomy too large or too small.", "Compare their headers."),
        _stand_out("size", _sizes(good), len(good), "have a size far from the others'",
                   "They may be scouts, thumbnails or cut-outs.", "Look at them."),
        _stand_out("orientation", _orientations(good), len(good), "lie otherwise than the others",
                   "A picture on its side trains badly.", "Turn them, or write their orientation into the header."),
        _stand_out("intensity", _scales(good), len(good), "have a scale of values far from the others'",
                   "Harmless in MR, whose unit is arbitrary; else a wrong one.", "Compare how they were exported."),
    ]  # fmt: skip


def _unusable(listing: Listing, looked: Looked) -> list[Finding]:
    """One finding for each kind that occurs, and one for those that can be used."""
    total = len(looked)
    refused = [(file, seen) for file, seen in looked if seen.check]
    limit = getattr(listing.source, "max_unreadable", 0.0) if _skips(listing) else 0.0
    state: State = "fail" if len(refused) > limit * total else "warn"
    what, counts = f"{total - len(refused)} of {total} images", {"images": total, "usable": total - len(refused)}
    found = [Finding("data", "usable", "pass" if len(refused) < total else "fail", what, counts=counts)]
    for check, (wrong, why, fix) in UNUSABLE.items():
        items = [f"{file.name}: {seen.text}" for file, seen in refused if seen.check == check]
        what, counts = f"{len(items)} of {total} images {wrong}", {"images": len(items)}
        clean = Finding("data", check, "pass", NOTHING, counts=counts)
        found.append(Finding("data", check, state, what, why, fix, counts, items) if items else clean)
    return found


def _skips(listing: Listing) -> bool:
    return getattr(listing.source, "unreadable", "refuse") == "skip"


def _stand_out(
    name: str, odd: Sequence[tuple[Listed, str]], total: int, wrong: str, why: str, fix: str, state: State = "warn"
) -> Finding:
    counts = {"images": len(odd), "of": total}
    if not odd:
        return Finding("data", name, "pass", NOTHING, counts=counts)
    items = [f"{file.name}: {text}" for file, text in odd]
    return Finding("data", name, state, f"{len(odd)} of {total} images {wrong}", why, fix, counts, items)


def _dropped(good: Looked) -> Finding:
    items = [f"{file.name}: {seen.dropped}" for file, seen in good if seen.dropped]
    count = sum(seen.dropped for _, seen in good)
    what = f"{count} localiser images in DICOM folders are left out" if count else NOTHING
    return Finding("data", "localisers", "pass", what, counts={"localisers": count}, items=items)


def _impossible(good: Looked) -> Finding:
    odd = [
        (file, f"{_mm(seen.spacing)} mm")
        for file, seen in good
        if not all(np.isfinite(mm) and SMALLEST <= mm <= LARGEST for mm in seen.spacing)
    ]
    return _stand_out(
        "voxels", odd, len(good), "have voxels of an impossible size", "Proportions cannot be kept.",
        "Correct their headers.", "fail",
    )  # fmt: skip


def _spacings(good: Looked) -> list[tuple[Listed, str]]:
    return [(file, f"{_mm(seen.spacing)} mm") for file, seen in _far(good, lambda seen: sorted(seen.spacing), SPACING)]


def _sizes(good: Looked) -> list[tuple[Listed, str]]:
    far = _far(good, lambda seen: sorted(seen.shape), SIDE)
    small = [(file, seen) for file, seen in good if min(seen.shape) < LEAST_SIDE and (file, seen) not in far]
    usual = np.median([min(seen.shape) for _, seen in good]) if good else 0
    return [(file, _sides(seen.shape)) for file, seen in [*far, *(small if usual >= LEAST_SIDE else [])]]


def _far(good: Looked, sizes: Callable[[Seen], Sequence[float]], factor: float) -> list[tuple[Listed, Seen]]:
    """Those of which a size is `factor` times the median of it, or less than that part of it."""
    if len(good) < 3:
        return []
    logs = np.log(np.maximum([sizes(seen) for _, seen in good], 1e-12))
    off = np.abs(logs - np.median(logs, axis=0)).max(axis=1) > np.log(factor)
    return [pair for pair, far in zip(good, off, strict=True) if far]


def _orientations(good: Looked) -> list[tuple[Listed, str]]:
    """Volumes that do not say where their axes point, and the few pictures that lie where the others stand."""
    guessed = [(file, "its header does not say where its axes point") for file, seen in good if not seen.placed]
    flat = [(file, seen) for file, seen in good if len(seen.shape) == 2]
    lying = [pair for pair in flat if pair[1].shape[1] > ASPECT * pair[1].shape[0]]
    standing = [pair for pair in flat if pair[1].shape[0] > ASPECT * pair[1].shape[1]]
    fewer, more = sorted((lying, standing), key=len)
    few = fewer if fewer and len(fewer) <= FEW * len(more) else []
    return [*guessed, *((file, f"{_sides(seen.shape)}, on its side") for file, seen in few)]


def _scales(good: Looked) -> list[tuple[Listed, str]]:
    by_column: dict[str, list[tuple[Listed, Seen]]] = defaultdict(list)  # modalities have scales of their own
    for file, seen in good:
        by_column[file.column].append((file, seen))
    return [
        (file, f"values from {seen.low:.4g} to {seen.high:.4g}")
        for pairs in by_column.values()
        for file, seen in _far(pairs, lambda seen: [seen.high - seen.low], SCALE)
        if not seen.flat
    ]


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.3g}" for mm in spacing)


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def duplicates(listing: Listing, looked: Looked, splits: Sequence[str]) -> Finding:
    """Images with the very same pixels; worst where they are in two splits."""
    groups: dict[bytes, list[Listed]] = defaultdict(list)
    for file, seen in looked:
        if not seen.check:
            groups[seen.digest].append(file)
    several = [files for files in groups.values() if len(files) > 1]
    extra = sum(len(files) - 1 for files in several)
    patients = listing.patients
    across = [files for files in several if len({patients[file.row] for file in files}) > 1]
    leaking = [files for files in several if len({splits[file.row] for file in files}) > 1]
    counts = {"duplicates": extra, "across_patients": len(across), "across_splits": len(leaking)}
    if not several:
        return Finding("data", "duplicates", "pass", NOTHING, counts=counts)
    items = [" = ".join(file.name for file in files) for files in several]
    what = (
        f"{extra} of {len(looked)} images repeat another: {len(across)} across patients, {len(leaking)} across splits"
    )
    why = "What is tested was trained on: scores would be too good." if leaking else "They count twice in training."
    fix = "Keep one of each, under the right patient."
    return Finding("data", "duplicates", "fail" if leaking else "warn", what, why, fix, counts, items)


def masks(listing: Listing, drawn: Sequence[Drawn]) -> list[Finding]:
    """Nothing where the study has no masks and no subjects of several modalities."""
    if not drawn:
        return []
    found = [_fitting(listing, drawn)]
    known = [one for one in drawn if not one.text and listing.column("mask")[one.row]]
    if "mask" in listing.columns and known:
        found.append(_drawn(known))
    return found


def _fitting(listing: Listing, drawn: Sequence[Drawn]) -> Finding:
    name = "masks" if len(listing.images) == 1 else "subjects"
    items = [f"row {one.row + 2}: {one.text}" for one in drawn if one.text]
    counts = {"rows": len(drawn), "unusable": len(items)}
    if not items:
        return Finding("data", name, "pass", f"{len(drawn)} of {len(drawn)} {name} can be used", counts=counts)
    what, why = f"{len(items)} of {len(drawn)} {name} cannot be used", "Training stops at the first one."
    fix = "Draw masks on the grid of their image, with the labels of data.regions." if name == "masks" else "See each."
    return Finding("data", name, "fail", what, why, fix, counts, items)


def _drawn(known: Sequence[Drawn]) -> Finding:
    """Of the masks that can be used, those with something in them."""
    empty = [f"row {one.row + 2}" for one in known if not one.labels]
    seen = Counter(label for one in known for label in one.labels)
    counts = {"masks": len(known), "empty": len(empty), **{f"label_{n}": seen[n] for n in sorted(seen)}}
    if len(empty) < len(known):
        what = f"{len(known) - len(empty)} of {len(known)} masks have something drawn"
        return Finding("data", "drawn", "pass", what, counts=counts, items=empty)
    why, fix = "Nothing can be learned from them.", "Leave their cells empty, or find the right files."
    return Finding("data", "drawn", "fail", "all masks are empty", why, fix, counts, empty)
