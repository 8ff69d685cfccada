"""A folder or a tar file in which every byte is accounted for: SHA256SUMS names all that may be there.

Only the standard library: a bundle is verified and installed before anything else of medfl is there.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from medfl.errors import ConfigError

SUMS = "SHA256SUMS"
BLOCK = 512  # bytes of a tar header, and what contents are padded to
CHUNK = 1 << 20  # bytes
MOST_TEXT = 16 << 20  # bytes of SHA256SUMS
NAME = re.compile(r"(?!\.{1,2}(/|$))[A-Za-z0-9@_+.!-]+(/(?!\.{1,2}(/|$))[A-Za-z0-9@_+.!-]+)*")
LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def seal(folder: Path) -> str:
    """Write SHA256SUMS over all files of `folder`; returns the fingerprint.

    Raises:
        ConfigError: a name that a bundle may not have, or something that is not a file.
    """
    text = _rendered({name: digest for name, digest in _of_folder(folder) if name != SUMS})
    (folder / SUMS).write_text(text)
    return fingerprint(text.encode())


def fingerprint(content: bytes) -> str:
    """Eight groups of four hex digits of the SHA-256, to compare by phone."""
    digest = hashlib.sha256(content).hexdigest()
    return " ".join(digest[place : place + 4] for place in range(0, 32, 4))


def verify(bundle: Path) -> tuple[str, dict[str, str]]:
    """Fingerprint, and SHA-256 of every file, of a folder or a tar file made of one.

    Raises:
        ConfigError: a changed byte, a missing or additional file, a link, or a path out of the bundle; it is named.
    """
    found = dict(_of_folder(bundle) if bundle.is_dir() else _of_tar(bundle))
    text = found.pop(SUMS, None)
    if text is None:
        raise ConfigError(f"{bundle} has no {SUMS}: it is not a bundle, or not a whole one. Get it again.")
    listed = _listed(bundle, text)
    problems = [
        *(f"{name!r} is missing" for name in sorted(listed.keys() - found.keys())),
        *(f"{name!r} is not in {SUMS}" for name in sorted(found.keys() - listed.keys())),
        *(f"{name!r} has other bytes" for name in sorted(listed.keys() & found.keys()) if listed[name] != found[name]),
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        named = ", ".join(problems[:5])
        raise ConfigError(f"{bundle} is not as it was made: {named}{more}. Do not use it; get it again.")
    return fingerprint(text.encode()), listed


def text_of(bundle: Path, name: str) -> str | None:
    """A small file of a bundle; None where it has none of this name."""
    if bundle.is_dir():
        path = bundle / name
        return path.read_text() if path.is_file() else None
    with bundle.open("rb") as file:
        for member, size in _members(bundle, file):
            if member == name:
                return b"".join(_parts(file, min(size, MOST_TEXT))).decode("utf-8", "replace")
    return None


def pack(folder: Path, target: Path) -> None:
    """Write the files of `folder` as a tar file: same files, same bytes."""
    with target.open("xb") as file:
        for name, path in _files(folder):
            size = path.stat().st_size
            file.write(_header(name, size))
            with path.open("rb") as source:
                while part := source.read(CHUNK):
                    file.write(part)
            file.write(bytes(-size % BLOCK))
        file.write(bytes(2 * BLOCK))


def unpack(bundle: Path, folder: Path) -> None:
    """Write the files of the tar file `bundle` below `folder`. Verify the folder afterwards: contents are not checked.

    Raises:
        ConfigError: what `pack` does not write, such as links and paths out of `folder`.
    """
    with bundle.open("rb") as file:
        for name, size in _members(bundle, file):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as target:
                for part in _parts(file, size):
                    target.write(part)


def _of_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 of every file; of SHA256SUMS its text."""
    for name, path in _files(folder):
        with path.open("rb") as file:
            if name == SUMS:
                yield name, file.read(MOST_TEXT).decode("utf-8", "replace")
            else:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()


def _of_tar(bundle: Path) -> Iterator[tuple[str, str]]:
    """As `_of_folder`, without writing anything."""
    if not bundle.is_file():
        raise ConfigError(f"got {bundle}, need a bundle: a folder, or a file that `medfl bundle build` wrote.")
    with bundle.open("rb") as file:
        for name, size in _members(bundle, file):
            if name == SUMS:
                yield name, b"".join(_parts(file, min(size, MOST_TEXT))).decode("utf-8", "replace")
                continue
            digest = hashlib.sha256()
            for part in _parts(file, size):
                digest.update(part)
            yield name, digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below `folder` by name, in order; anything else, and odd names, are refused."""
    found = []
    for place, folders, names in os.walk(folder):
        for path in (Path(place, name) for name in (*names, *(f for f in folders if Path(place, f).is_symlink()))):
            name = path.relative_to(folder).as_posix()
            if path.is_symlink() or not path.is_file() or not NAME.fullmatch(name):
                raise ConfigError(f"{folder} has {name!r}, which is no plain file with a plain name. Remove it.")
            found.append((name, path))
    return iter(sorted(found))


def _members(bundle: Path, file: BinaryIO) -> Iterator[tuple[str, int]]:
    """Name and size in bytes of each member, `file` standing at its contents.

    Only the very bytes that `pack` writes are taken, so that links, devices, extensions and hidden bytes have no place.
    """
    end, seen, name = bundle.stat().st_size, set(), "its beginning"
    while (header := file.read(BLOCK)) != bytes(BLOCK):
        name, size = _read_header(bundle, file, header, name)
        start = file.tell()
        if name in seen or start + size > end:
            raise ConfigError(f"{bundle}: {name!r} is there twice or cut short. Do not use it; get it again.")
        seen.add(name)
        yield name, size
        file.seek(start + size)
        if any(file.read(-size % BLOCK)):
            raise ConfigError(f"{bundle}: bytes are hidden behind {name!r}. Do not use it; get it again.")
    if file.read(BLOCK + 1) != bytes(BLOCK):
        raise ConfigError(f"{bundle}: bytes differ behind {name!r}, its last file. Do not use it; get it again.")


def _read_header(bundle: Path, file: BinaryIO, header: bytes, before: str) -> tuple[str, int]:
    try:
        if header[156:157] == tarfile.GNUTYPE_LONGNAME:  # then a block with the name, then the file's own header
            header += file.read(2 * BLOCK)
        member = tarfile.TarInfo.frombuf(header[-BLOCK:], "utf-8", "strict")
        member.name = (header[BLOCK : 2 * BLOCK].rstrip(b"\0").decode() if len(header) > BLOCK else "") or member.name
    except (tarfile.HeaderError, UnicodeError):
        raise ConfigError(f"{bundle} is damaged behind {before!r}, or not a bundle. Get it again.") from None
    if not NAME.fullmatch(member.name):
        raise ConfigError(f"{bundle} has a file {member.name!r}: a path out of it, or an odd name. Do not use it.")
    if len(member.name) >= BLOCK or header != _header(member.name, member.size):
        raise ConfigError(f"{bundle}: {member.name!r} is no plain file as a bundle has it. Do not use it.")
    return member.name, member.size


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size and (part := file.read(min(size, CHUNK))):
        size -= len(part)
        yield part


def _rendered(digests: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def _listed(bundle: Path, text: str) -> dict[str, str]:
    """What SHA256SUMS lists.

    Raises:
        ConfigError: it is not as `seal` writes it, or lists a path out of the bundle.
    """
    digests: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = LINE.fullmatch(line)
        if not match:
            raise ConfigError(f"{bundle}: line {number} of {SUMS} is damaged. Do not use it; get it again.")
        digest, name = match.groups()
        if name == SUMS or not NAME.fullmatch(name):
            raise ConfigError(f"{bundle}: {SUMS} lists {name!r}, a path out of the bundle. Do not use it.")
        digests[name] = digest
    if text != _rendered(digests):
        raise ConfigError(f"{bundle}: {SUMS} is not as it was written. Do not use it; get it again.")
    return digests
