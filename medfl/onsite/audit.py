"""The record of what happened at a site: one line of JSON per event, each bound to the one before by its hash.

A changed, removed, added or moved line breaks the chain. Lines cut off at the end leave it whole, so the newest number
and hash are also given to others ("head"), who can tell later.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from medfl.errors import ConfigError, InternalError

START = "0" * 64  # the hash before the first line
OURS = ("n", "t", "what", "previous", "hash")
BLOCK = 1 << 16

Entry = dict[str, Any]
Head = tuple[int, str]  # number and hash of the newest line


class Audit:
    """Appends to one file; any number of processes may do so at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, what: str, **facts: Any) -> Head:
        """Append one line durably; returns the new head.

        A last line that a crash cut short stays as it is: a line "recovered" follows it and names its hash.

        Args:
            facts: plain values, JSON as it is.

        Raises:
            ResourceError: the disk is full; nothing was appended.
            InternalError: there are lines, and none is one of this record, so nothing can be bound to them.
        """
        if clash := sorted(set(facts) & set(OURS)):
            raise ValueError(f"{clash[0]!r} is a name of the record itself. Choose another.")
        try:
            with self._locked() as file:
                return self._append(file, what, facts)
        except OSError:
            from medfl.files import room_for  # brings torch along, which readers do without

            with room_for(self.path):
                raise

    def head(self) -> Head:
        """Number and hash of the newest whole line; (0, zeros) before the first.

        Raises:
            InternalError: there are lines, and none is one of this record.
        """
        if not self.path.exists():
            return 0, START
        with FileIO(self.path) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return self._head(_tail(file, file.seek(0, os.SEEK_END))[0])

    def entries(self) -> Iterator[Entry]:
        """The whole lines, oldest first; what cannot be read is left out (see `verify`)."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                entry = _parsed(line.removesuffix(b"\n")) if line.endswith(b"\n") else None
                if entry is not None:
                    yield entry

    @staticmethod
    def verify(path: Path, head: Head | None = None) -> list[str]:
        """What is wrong with the record, in plain words; empty: it is whole.

        Args:
            head: number and hash of a line as someone else noted them, to find lines cut off at the end.
        """
        content = path.read_bytes() if path.exists() else b""
        findings, chain = _check(content)
        if head is not None and head[0] > 0:
            number, digest = head
            if number not in chain:
                findings.append(f"line {number} was noted elsewhere but is not here: lines were cut off.")
            elif chain[number] != digest:
                findings.append(f"line {number} is not the one that was noted elsewhere: the record was rewritten.")
        return findings

    def _append(self, file: FileIO, what: str, facts: Entry) -> Head:
        end = file.seek(0, os.SEEK_END)
        last, torn = _tail(file, end)
        head, lines = self._head(last), b""
        if torn:
            if (whole := _parsed(torn)) and (whole.get("n"), whole.get("previous")) == (head[0] + 1, head[1]):
                head, torn = self._head(whole), b""  # it lacks its line end alone
            lost = {"bytes": len(torn), "torn": hashlib.sha256(torn).hexdigest()}
            entry = _entry(head, "recovered", lost)
            lines, head = b"\n" + _line(entry), (entry["n"], entry["hash"])
        entry = _entry(head, what, facts)
        _extend(file, end, lines + _line(entry))
        return entry["n"], entry["hash"]

    def _head(self, last: Entry | None) -> Head:
        if last is None:
            return 0, START
        if not isinstance(last.get("n"), int) or not isinstance(last.get("hash"), str):
            raise InternalError(f"{self.path}: its last line cannot be read. Run: medfl site audit verify")
        return last["n"], last["hash"]

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        number = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with FileIO(number, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        if new:
            from medfl.files import sync_folder  # brings torch along, which readers do without

            sync_folder(self.path.parent)


def parse_head(text: str) -> Head:
    """The head that is written as NUMBER:HASH.

    Raises:
        ConfigError: not of that form.
    """
    number, _, digest = text.partition(":")
    if not number.isdecimal() or len(digest) != len(START) or set(digest) - set("0123456789abcdef"):
        raise ConfigError(f"head: got {text!r}, need NUMBER:HASH as the study lead's status shows it.")
    return int(number), digest


def _entry(head: Head, what: str, facts: Entry) -> Entry:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry: Entry = {"n": head[0] + 1, "t": now, "what": what, **facts, "previous": head[1]}
    return entry | {"hash": _digest(entry)}


def _digest(entry: Entry) -> str:
    return hashlib.sha256(_text({key: value for key, value in entry.items() if key != "hash"})).hexdigest()


def _text(entry: Entry) -> bytes:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode()


def _line(entry: Entry) -> bytes:
    return _text(entry) + b"\n"


def _parsed(line: bytes) -> Entry | None:
    """None: no JSON object, or one that this record would have written in other bytes."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry, dict) and _text(entry) == line else None
    except (ValueError, RecursionError):
        return None


def _tail(file: FileIO, end: int) -> tuple[Entry | None, bytes]:
    """The newest whole line, and the bytes after it that a crash left."""
    start, tail = end, b""
    while start > 0:
        start = max(0, start - BLOCK)
        file.seek(start)
        tail = file.read(end - start)
        *whole, torn = tail.split(b"\n")
        found = [entry for line in reversed(whole[1 if start else 0 :]) if (entry := _parsed(line)) is not None]
        if found:
            return found[0], torn
    whole_lines, _, torn = tail.rpartition(b"\n")
    return ({"n": None} if whole_lines else None), torn


def _extend(file: FileIO, end: int, content: bytes) -> None:
    file.seek(end)
    try:
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), end)  # nothing was promised yet: the record stays as it was
        raise


def _check(content: bytes) -> tuple[list[str], dict[int, str]]:
    """Findings, and the hash of each number."""
    findings: list[str] = []
    chain: dict[int, str] = {}
    number, previous, broken = 0, START, b""
    *lines, torn = content.split(b"\n")
    for place, line in enumerate(lines, 1):
        entry = _parsed(line)
        if entry is None:
            if broken:
                findings.append(f"line {place - 1} of the file cannot be read.")
            broken = line or b"\n"
            continue
        if broken and entry.get("what") != "recovered":
            findings.append(f"line {place - 1} of the file cannot be read.")
        if entry.get("what") == "recovered" and entry.get("torn") != hashlib.sha256(broken).hexdigest():
            findings.append(f"line {place} of the file names a line cut short that is not the one before it.")
        broken = b""
        findings += _faults(entry, place, number, previous)
        number, previous = entry.get("n", number), entry.get("hash", previous)
        if isinstance(number, int) and isinstance(previous, str):
            chain.setdefault(number, previous)
        else:
            number, previous = -1, ""
    if broken:
        findings.append(f"line {len(lines)} of the file cannot be read.")
    if torn:
        findings.append(f"the last line was cut off after {len(torn)} bytes, as by a crash.")
    return findings, chain


def _faults(entry: Entry, place: int, number: int, previous: str) -> Iterator[str]:
    if entry.get("hash") != _digest(entry):
        yield f"line {place} of the file was changed after it was written."
    if entry.get("n") != number + 1:
        yield f"line {place} of the file has number {entry.get('n')}, not {number + 1}: lines were added or removed."
    if entry.get("previous") != previous:
        yield f"line {place} of the file is not bound to the line before it."
