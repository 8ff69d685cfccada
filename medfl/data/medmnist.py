"""MedMNIST v2 (Yang et al., Scientific Data 2023): names, addresses and checksums are those of the
`medmnist` package.

The package's own download needs torchvision, which this project does without; the files and their place are
the same.
"""

import difflib
import hashlib
import os
import sys
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfl.data.sample import SPLITS, Records, require
from medfl.errors import ConfigError, DataError

FIELD_OF_VIEW = 28.0  # the published grids carry no spacing: 1 voxel of the 28-grid counts as 1 mm
TIMEOUT = 60.0  # s without any byte


def facts(name: str) -> tuple[int, int]:
    """(spatial dimensions, channels) of a set, known from its name alone.

    Raises:
        ConfigError: unknown name, with the nearest ones.
    """
    return (3 if name.endswith("3d") else 2), int(_published(name)["n_channels"])


def complete(node: dict[str, Any]) -> dict[str, Any]:
    """The config node with `spatial_dims` and `channels` filled in where they are null.

    Raises:
        ConfigError: unknown name, with the nearest ones.
    """
    dims, channels = facts(str(node["name"]))
    known = {"spatial_dims": dims, "channels": channels}
    return node | {key: value for key, value in known.items() if node.get(key) is None}


@dataclass(frozen=True, kw_only=True)
class MedMNIST:
    """One MedMNIST set with its official splits; every image is its own patient, since none are published.

    Args:
        name: such as "breastmnist" or "adrenalmnist3d".
        root: folder of the npz files; null is ~/.medmnist.
        spatial_dims, channels: as `facts(name)`; null to take them from there.
        size: 28, or 64 | 128 | 224 (3D: 64) where published.
        download: fetch a missing file.
        verify: what to do with a file whose MD5 is not the published one: warn | strict | off.

    Raises:
        ConfigError: unknown name or size, or dimensions that the set does not have.
    """

    name: str
    root: str | None
    spatial_dims: int
    channels: int
    size: int
    download: bool
    verify: str

    def __post_init__(self) -> None:
        dims, channels = facts(self.name)
        for field, value in {"spatial_dims": dims, "channels": channels}.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        sizes = _sizes(_published(self.name))
        require(
            "data",
            {
                "spatial_dims": (self.spatial_dims, self.spatial_dims == dims, f"{dims}, as {self.name} has"),
                "channels": (self.channels, self.channels == channels, f"{channels}, as {self.name} has"),
                "size": (self.size, self.size in sizes, f"one of {sizes}, as published for {self.name}"),
                "verify": (self.verify, self.verify in ("warn", "strict", "off"), "warn, strict or off"),
            },
        )

    def load(self) -> Records:
        """All images, (N, channels, size, ...) = x / 127.5 - 1, with the official splits.

        Raises:
            DataError: the file is absent, cannot be downloaded, is damaged, or is a multi-label set.
        """
        published = _published(self.name)
        if "multi-label" in published["task"]:
            raise DataError(f"{self.name}: multi-label sets are not supported yet. Choose a set with one label.")
        path = self._file(published)
        arrays = _read(path)
        images, labels, splits = [], [], []
        for split in SPLITS:
            pixels, targets = _pair(arrays, split, path)
            images.append(pixels)
            labels.append(targets.reshape(-1))
            splits += [split] * len(pixels)
        classes = tuple(text for _, text in sorted(published["label"].items(), key=lambda item: int(item[0])))
        target = torch.from_numpy(np.concatenate(labels).astype(np.int64))
        if int(target.min()) < 0 or int(target.max()) >= len(classes):
            raise DataError(
                f"{path}: got labels {int(target.min())} to {int(target.max())}, need 0 to {len(classes) - 1}."
            )
        return Records(
            images=self._tensor(np.concatenate(images), path),
            labels=target,
            patients=tuple(f"{self.name}-{index:06d}" for index in range(len(target))),
            splits=tuple(splits),
            sites=None,
            classes=classes,
            spacing=(FIELD_OF_VIEW / self.size,) * self.spatial_dims,
            masks=None,
        )

    def _tensor(self, pixels: NDArray[Any], path: Path) -> Tensor:
        grid = (self.size,) * self.spatial_dims
        need = (*grid, self.channels) if self.channels > 1 else grid
        if pixels.dtype != np.uint8 or pixels.shape[1:] != need:
            raise DataError(f"{path}: got images {pixels.shape[1:]} {pixels.dtype}, need {need} uint8. Fetch it again.")
        scaled = torch.from_numpy(pixels).to(torch.float32).div_(127.5).sub_(1)
        return scaled.movedim(-1, 1).contiguous() if self.channels > 1 else scaled[:, None]

    def _file(self, published: Mapping[str, Any]) -> Path:
        suffix = "" if self.size == 28 else f"_{self.size}"
        url, checksum = str(published[f"url{suffix}"]), str(published[f"MD5{suffix}"])
        folder = Path(self.root).expanduser() if self.root else Path.home() / ".medmnist"
        path = folder / f"{self.name}{suffix}.npz"
        if not path.is_file():
            if not self.download:
                raise DataError(f"{path} does not exist. Put the file there, from {url} , or set data.download=true.")
            _download(url, checksum, path)
        elif self.verify != "off":
            _verify(path, checksum, strict=self.verify == "strict")
        return path


def _published(name: str) -> Mapping[str, Any]:
    from medmnist.info import INFO

    if name not in INFO:
        near = difflib.get_close_matches(name, INFO, n=3, cutoff=0.5) or sorted(INFO)
        raise ConfigError(f"data.name: got {name!r}, which MedMNIST does not have. Nearest: {', '.join(near)}.")
    found: Mapping[str, Any] = INFO[name]
    return found


def _sizes(published: Mapping[str, Any]) -> list[int]:
    return [28, *sorted(int(field[4:]) for field in published if field.startswith("url_"))]


def _verify(path: Path, checksum: str, *, strict: bool) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found == checksum:
        return
    message = f"{path}: its MD5 is {found}, the published one is {checksum}"
    if strict:
        raise DataError(f"{message}. Delete it and set data.download=true, or set data.verify=warn.")
    warnings.warn(f"{message}; results cannot be compared with published ones.", stacklevel=2)


def _download(url: str, checksum: str, path: Path) -> None:
    """Fetch `url` to `path`: into a temporary file beside it, verified, then renamed.

    Raises:
        DataError: no connection, no space, or another MD5 than published.
    """
    sys.stderr.write(f"medfl: downloading {url} to {path}\n")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written ({error}). Set data.root to another folder.") from error
    try:
        # S310: the address is one of the package's constants, never a user's text
        reply = urllib.request.urlopen(url, timeout=TIMEOUT)  # noqa: S310
        with os.fdopen(handle, "wb") as file, reply:
            while chunk := reply.read(2**20):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != checksum:
            raise DataError(
                f"{url}: the download has MD5 {digest.hexdigest()}, the published one is {checksum}; "
                f"nothing was kept. Try again, or put a good file at {path}."
            )
        Path(partial).replace(path)
    except OSError as error:
        raise DataError(f"{url}: cannot be downloaded ({error}). Put the file at {path} by hand.") from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: is not a readable npz file ({error}). Delete it and fetch it again.") from error


def _pair(arrays: Mapping[str, NDArray[Any]], split: str, path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and labels of one split, of equal length."""
    if missing := [name for name in (f"{split}_images", f"{split}_labels") if name not in arrays]:
        raise DataError(f"{path}: has no array {missing[0]!r}. Fetch it again.")
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise DataError(f"{path}: got {len(images)} {split} images and labels {labels.shape}. Fetch it again.")
    constant = int((images.reshape(len(images), -1) == images.reshape(len(images), -1)[:, :1]).all(1).sum())
    if constant:
        warnings.warn(f"{path}: {constant} {split} images are constant; the copy may be damaged.", stacklevel=2)
    return images, labels
