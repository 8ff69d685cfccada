"""Looking at one image file: can it be used as the product would read it, and what is it like."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfl.data import dicom, volume
from medfl.errors import DataError

BACKGROUND = 0.995  # share of one value above which nothing is left to learn from


@dataclass(frozen=True)
class Rules:
    """What the study's data source asks of each image."""

    spatial_dims: int
    channels: int
    normalize: str
    window: tuple[float, float] | None


@dataclass(frozen=True)
class Seen:
    """One file. `check`: the check that it fails, "" where it can be used."""

    check: str = ""
    text: str = ""
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    digest: bytes = b""  # of shape and values
    low: float = 0.0  # 0.5th percentile
    high: float = 0.0  # 99.5th
    placed: bool = True  # whether the file says where its axes point
    dropped: int = 0  # localisers
    flat: bool = False  # almost all of one value


def look(path: Path, rules: Rules) -> Seen:
    """Never raises for what a file holds."""
    dropped: list[int] = []

    def decoded(path: Path) -> volume.Scan:
        if not volume.is_dicom(path):
            return volume.decoded(path)
        found = dicom.read(path)
        dropped.append(found.dropped)
        return volume.of_dicom(found)

    if not path.exists():
        return Seen("missing", f"no such file{_near(path)}")
    try:
        scan = volume.opened(path, decoded)
    except dicom.GeometryError as error:
        return Seen("series", _without_path(error, path))
    except DataError as error:
        return Seen("readable", _without_path(error, path))
    failed = _unusable(scan.pixels, rules)
    if failed:
        return Seen(*failed)
    low, high, flat = _range(scan.pixels)
    return Seen(
        shape=tuple(scan.pixels.shape[1:]),
        spacing=scan.spacing,
        digest=hashlib.blake2b(repr(scan.pixels.shape).encode() + scan.pixels.contiguous().numpy().tobytes()).digest(),
        low=low,
        high=high,
        placed=_placed(path),
        dropped=sum(dropped),
        flat=flat,
    )


def _unusable(pixels: Tensor, rules: Rules) -> tuple[str, str] | None:
    """The first check that an image fails, and how."""
    finite = torch.isfinite(pixels)
    if not bool(finite.any()):
        return "values", "all values are NaN or infinite"
    if not bool(finite.all()):
        return "values", f"{int((~finite).sum())} of {pixels.numel()} values are NaN or infinite"
    if bool((pixels == pixels.flatten()[0]).all()):
        return "constant", f"every value is {float(pixels.flatten()[0]):g}"
    if pixels.ndim != rules.spatial_dims + 1:
        return "dimensions", f"has {pixels.ndim - 1} dimensions, need {rules.spatial_dims}"
    try:
        image = volume.match_channels(pixels, rules.channels, Path())
    except DataError:
        return "channels", f"has {len(pixels)} channels, need {rules.channels}"
    try:
        volume.normalize(image, rules.normalize, rules.window)
    except DataError as error:
        return "window", str(error)
    return None


def _range(pixels: Tensor) -> tuple[float, float, bool]:
    low, middle, high = (float(value) for value in np.percentile(pixels.numpy(), (0.5, 50, 99.5)))
    return low, high, float((pixels == middle).float().mean()) > BACKGROUND


def _placed(path: Path) -> bool:
    """Whether a NIfTI header has a transform; without one its axes are a guess."""
    if not path.name.lower().endswith(volume.NIFTI):
        return True
    import nibabel

    header: Any = nibabel.load(path).header
    return bool(header.get("sform_code", 1) or header.get("qform_code", 1))


def _near(path: Path) -> str:
    """Case of letters is the most common mistake in names."""
    parent = path.parent
    names = [other.name for other in parent.iterdir()] if parent.is_dir() else []
    near = next((name for name in names if name.lower() == path.name.lower()), None)
    return f" (there is {near})" if near else ""


def _without_path(error: DataError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ").replace(str(path), path.name)


def every(paths: Sequence[Path], rules: Rules, *, threads: int, progress: Callable[[int, int], None]) -> list[Seen]:
    """All files, in order."""
    from concurrent.futures import ThreadPoolExecutor

    found = []
    with ThreadPoolExecutor(max_workers=max(threads, 1)) as pool:
        for done, seen in enumerate(pool.map(lambda path: look(path, rules), paths), start=1):
            found.append(seen)
            progress(done, len(paths))
    return found
