"""Bringing files to the folder of a data list: unpacked from archives, linked where they lie unpacked already."""

import shutil
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from medfl.errors import DataError, ResourceError
from medfl.files import FULL, existing
from medfl.prepare.contents import DAMAGE, Contents, damaged

BLOCK = 2**20
SOURCE = "source"  # the link to a folder that is unpacked already


def place(contents: Contents, names: Iterable[str], to: Path, show: Callable[[str], None]) -> dict[str, str]:
    """Where each file lies, as a path below `to`. A file that is there in full is not unpacked again.

    Args:
        show: takes one line per archive.

    Raises:
        DataError: an archive is damaged or bigger than it says, or a file is in the way.
        ResourceError: not enough space.
    """
    packed: dict[Path | None, list[str]] = defaultdict(list)
    for name in names:
        packed[contents.files[name].archive].append(name)
    loose = packed.pop(None, [])
    wanted = {path: [name for name in inside if not _there(contents, name, to)] for path, inside in packed.items()}
    _check_room(sum(contents.files[name].size for inside in wanted.values() for name in inside), to)
    try:
        to.mkdir(parents=True, exist_ok=True)
        beside = _linked(contents.folder, to) if loose else ""
    except OSError as error:
        raise DataError(f"{to}: cannot be written ({error.strerror}). Choose another folder as to=.") from error
    for path, inside in wanted.items():
        if path and inside:
            show(f"unpacking {len(inside):,} files of {path.name}")
            _unpack(contents, path, inside, to)
    return {name: name for inside in packed.values() for name in inside} | {name: beside + name for name in loose}


@contextmanager
def written(target: Path) -> Iterator[IO[bytes]]:
    """A file that is there in full, or not at all.

    Raises:
        DataError: it cannot be written there.
        ResourceError: the disk is full.
    """
    draft = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            yield file
        draft.replace(target)
    except OSError as error:
        if error.errno is None:  # a damaged archive, while it was read
            raise
        if error.errno not in FULL:
            raise DataError(f"{target}: cannot be written ({error.strerror}). Choose another folder as to=.") from error
        raise ResourceError(
            f"{target}: the disk is full. Free space and give the same command again; what is there is kept."
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def _linked(folder: Path, to: Path) -> str:
    """What comes before the path of a file of `folder`, below `to`: nothing where `to` is above, else a link.

    Raises:
        DataError: the link's name is taken.
    """
    if folder.is_relative_to(to.resolve()):
        inner = folder.relative_to(to.resolve()).as_posix()
        return "" if inner == "." else f"{inner}/"
    link = to / SOURCE
    if link.resolve() != folder:
        if link.exists() or link.is_symlink():
            raise DataError(f"{link}: exists, and is no link to {folder}. Remove it, or choose another folder as to=.")
        link.symlink_to(folder, target_is_directory=True)
    return f"{SOURCE}/"


def _there(contents: Contents, name: str, to: Path) -> bool:
    target = to / name
    return target.is_file() and target.stat().st_size == contents.files[name].size


def _check_room(need: int, to: Path) -> None:
    free = shutil.disk_usage(existing(to.absolute())).free
    if need > free:
        raise ResourceError(
            f"{to}: unpacking takes {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Free space or choose another "
            "disk as to=; a folder that is unpacked already is only linked."
        )


def _unpack(contents: Contents, path: Path, names: Sequence[str], to: Path) -> None:
    members = {contents.files[name].member: name for name in names}
    home = to.resolve()
    streams = _zip_streams if path.name.lower().endswith(".zip") else _tar_streams
    try:
        for member, stream in streams(path, members):
            target = to / members[member]
            if not target.parent.resolve().is_relative_to(home):
                raise DataError(f"{target}: lies behind a link that leaves {to}. Remove the link.")
            with written(target) as file:
                _copy(stream, contents.files[members[member]].size, file, path)
    except (DataError, ResourceError):
        raise
    except DAMAGE as error:
        raise damaged(path, error) from error


def _zip_streams(path: Path, members: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for member in members:
            with archive.open(member) as stream:
                yield member, stream


def _tar_streams(path: Path, members: Iterable[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """In the order of the archive: a compressed one is read once."""
    left = set(members)
    with tarfile.open(path) as archive:
        for entry in archive:
            if entry.name in left and entry.isfile() and (stream := archive.extractfile(entry)):
                left.remove(entry.name)
                yield entry.name, stream


def _copy(stream: IO[bytes], size: int, file: IO[bytes], path: Path) -> None:
    left = size
    while chunk := stream.read(min(BLOCK, left + 1)):
        left -= len(chunk)
        if left < 0:
            break
        file.write(chunk)
    if left:
        raise DataError(f"{path}: a file in it has not the {size} bytes that the archive states. Download it again.")
