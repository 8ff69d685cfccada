"""What a download holds: the files of a folder and of the archives in it, by name, before anything is unpacked.

An archive is a stranger's: a name that leaves the folder refuses it, links and devices in it are left out.
"""

import gzip
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from medfl.errors import DataError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
TABLES = (".csv", ".json", ".txt")
LARGEST_TABLE = 2**28  # bytes; ten times the largest of the data sets known here
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, PermissionError)
LINK = "links, which are not followed"
TWICE = "files whose name is there twice"


class Missing(LookupError):
    """A file that the data set should have; the text says which."""


class File(NamedTuple):
    """Where one file is."""

    size: int  # bytes, as stated
    archive: Path | None = None  # None: it lies in the folder itself
    member: str = ""  # its name inside the archive, as written there


@dataclass(frozen=True)
class Contents:
    """Files by name: the path below the folder, or inside the archive, with slashes."""

    source: Path  # what the user gave
    folder: Path  # resolved; the folder, or that of the only archive
    files: dict[str, File] = field(default_factory=dict)
    tables: dict[str, bytes] = field(default_factory=dict)  # small texts of tar archives: only the listing passes them
    left_out: Counter[str] = field(default_factory=Counter)

    def matching(self, pattern: str) -> list[tuple[str, re.Match[str]]]:
        """The files whose name, from its start or after a slash, matches to its end; capitals do not matter."""
        wanted = re.compile(f"(?:.*/)?{pattern}", re.IGNORECASE)
        return [(name, found) for name in self.files if (found := wanted.fullmatch(name))]

    def one(self, pattern: str, what: str) -> str:
        """The name of the file that matches.

        Raises:
            Missing: none does.
            DataError: several that differ do.
        """
        found = [name for name, _ in self.matching(pattern)]
        if not found:
            raise Missing(what)
        if len({self.text(name) for name in found}) > 1:
            raise DataError(
                f"{self.source}: has {len(found)} different {what}, such as {found[0]} and {found[1]}. "
                "Give one data set, or one release of it, as from=."
            )
        return found[0]

    def text(self, name: str) -> str:
        """A table as text.

        Raises:
            DataError: it is too large for one, or cannot be read.
        """
        file = self.files[name]
        if file.size > LARGEST_TABLE:
            raise DataError(f"{name}: has {file.size / 1e6:.0f} MB, a table has {LARGEST_TABLE / 1e6:.0f} at most.")
        if name not in self.tables:
            try:
                self.tables[name] = self._bytes(name, file)
            except DAMAGE as error:
                raise damaged(file.archive or self.folder / name, error) from error
        return self.tables[name].decode("utf-8-sig", errors="replace")

    def _bytes(self, name: str, file: File) -> bytes:
        if file.archive is None:
            return (self.folder / name).read_bytes()
        with zipfile.ZipFile(file.archive) as archive, archive.open(file.member) as stream:
            return stream.read(LARGEST_TABLE)


def scan(source: Path, *, besides: Path, show: Callable[[str], None]) -> Contents:
    """What a folder, with the archives in it, or one archive holds.

    Args:
        besides: a folder that is not looked into, where an earlier run may have written.
        show: takes one line per archive.

    Raises:
        DataError: no such folder or archive, or an archive that is damaged, encrypted, or names a place outside itself.
    """
    if not source.exists():
        raise DataError(f"from: {str(source)!r} does not exist. Give the downloaded file, or the folder it is in.")
    if source.is_file() and not source.name.lower().endswith(ARCHIVES):
        raise DataError(f"from: {str(source)!r} is no folder and no archive. Need {', '.join(ARCHIVES)} or a folder.")
    home = source.resolve() if source.is_dir() else source.resolve().parent
    contents = Contents(source, home)
    archives = [source]
    if source.is_dir():
        archives = []
        for path in _walk(home, besides.resolve(), contents.left_out):
            if path.name.lower().endswith(ARCHIVES):
                archives.append(path)
            else:
                contents.files[path.relative_to(home).as_posix()] = File(path.stat().st_size)
    for archive in archives:
        show(f"listing {archive.name}")
        try:
            _list(archive, contents)
        except DAMAGE as error:
            raise damaged(archive, error) from error
    return contents


def damaged(path: Path, error: BaseException) -> DataError:
    return DataError(
        f"{path}: cannot be read ({type(error).__name__}: {error}). Download it again, or unpack it by hand and give "
        "the folder as from=."
    )


def _walk(home: Path, besides: Path, left_out: Counter[str]) -> Iterator[Path]:
    """All files in order but hidden ones; links to folders, and to files outside, are left out."""
    for place, folders, files in os.walk(home):
        here = Path(place)
        shown = sorted(name for name in folders if not _hidden(name) and (here / name) != besides)
        left_out[LINK] += sum((here / name).is_symlink() for name in shown)
        folders[:] = [name for name in shown if not (here / name).is_symlink()]
        for path in (here / name for name in sorted(files) if not _hidden(name)):
            if path.is_symlink() and not path.resolve().is_relative_to(home):
                left_out[LINK] += 1
            elif path.is_file():
                yield path


def _hidden(name: str) -> bool:
    """Also what a Mac adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def _list(path: Path, contents: Contents) -> None:
    members = _zip_members(path, contents) if path.name.lower().endswith(".zip") else _tar_members(path, contents)
    for member, size, text in members:
        name = safe(member, path)
        if any(map(_hidden, name.split("/"))):
            continue
        if name in contents.files:
            contents.left_out[TWICE] += 1
            continue
        contents.files[name] = File(size, path, member)
        if text is not None:
            contents.tables[name] = text


def _zip_members(path: Path, contents: Contents) -> Iterator[tuple[str, int, bytes | None]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if stat.S_ISLNK(member.external_attr >> 16):
                contents.left_out[LINK] += 1
            elif not member.is_dir():
                if member.flag_bits & 1:
                    raise DataError(f"{path}: is encrypted. Unpack it by hand and give the folder as from=.")
                yield member.filename, member.file_size, None


def _tar_members(path: Path, contents: Contents) -> Iterator[tuple[str, int, bytes | None]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                stream = archive.extractfile(member) if _table(member) else None
                yield member.name, member.size, stream.read() if stream else None
            elif not member.isdir():
                contents.left_out[LINK] += 1


def _table(member: tarfile.TarInfo) -> bool:
    return member.name.lower().endswith(TABLES) and member.size <= LARGEST_TABLE


def safe(member: str, archive: Path) -> str:
    """The name of an archive's member below the folder that it will be unpacked into.

    Raises:
        DataError: it is absolute, goes upwards, or could be read so on some system.
    """
    path = PurePosixPath(member)
    odd = re.match("[A-Za-z]:", member) or any(letter < " " or letter == "\\" for letter in member)
    if path.is_absolute() or ".." in path.parts or odd or not path.parts:
        raise DataError(
            f"{archive}: holds the name {member!r}, which could lie outside the folder. Nothing was unpacked. "
            "Download the archive again, from its publisher."
        )
    return path.as_posix()
