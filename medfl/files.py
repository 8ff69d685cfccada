"""Writing files so that a crash at any instant leaves the old file or the new one, never half of one."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

from medfl.errors import DataError, ResourceError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turn "no space left" into one line that says where and how much; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(existing(path)).free
        raise ResourceError(
            f"cannot write {path}: {os.strerror(error.errno or 0).lower()} ({free / 1e6:.0f} MB free). "
            "Free space, then run the same command with resume=true; nothing that was complete is lost."
        ) from None


def existing(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return path if path.exists() else existing(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` atomically and durably.

    Raises:
        ResourceError: the disk is full; `path` is as it was.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with draft.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> str:
    """Write safetensors atomically; returns the SHA-256 of the file."""
    content = packed(tensors)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def packed(tensors: "Mapping[str, Tensor]") -> bytes:
    """Tensors as the bytes of a safetensors file."""
    from safetensors.torch import save  # brings torch along, which commands about keys and files do without

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpacked(path: Path, content: bytes | None = None) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, or of its `content` where that was read before.

    Raises:
        DataError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes() if content is None else content)
    except SafetensorError as error:
        raise DataError(f"{path} is damaged ({error}). Restore it from a backup, or make it again.") from None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
