"""The run folder: the one owner of its file names and formats. Tools, tests and users rely on them."""

import csv
import fcntl
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TextIO

import yaml

from medfl.errors import ConfigError, InternalError, MedflError
from medfl.files import room_for, write_bytes

EVALUATION = ("arm", "site", "task", "protocol", "label_fraction", "metric", "value", "low", "high")
TRANSFER = ("trained_on", "tested_on", "kind", "metric", "value", "low", "high")
WIRE = ("round", "site", "direction", "name", "role", "dtype", "shape", "bytes", "arm", "stage")
LOOKS = 20  # at another process' lock, 0.1 s apart
CLOSED = "round/sites"  # the event that is written when a round is over, and not before
TRAININGS = ("pretrain", "finetune")  # stages of rounds; the names of their arms differ
Row = Mapping[str, object]


@dataclass(frozen=True)
class Event:
    """One line of metrics.jsonl. `site` is "" for a figure of the whole arm."""

    stage: str
    arm: str
    round: int
    site: str
    name: str
    value: float
    reason: str = ""


@dataclass(frozen=True)
class Evaluated:
    """One line of evaluation.csv; an empty value could not be computed."""

    arm: str
    site: str
    protocol: str
    metric: str
    value: str
    low: str = ""
    high: str = ""
    task: str = "classification"
    label_fraction: str = "1"


@dataclass(frozen=True)
class Counted:
    """One line of counts.jsonl: counts of a site's test images, as `medfl.evaluation.counts` makes them."""

    arm: str
    site: str
    protocol: str
    label_fraction: str
    classes: list[str]
    least: int
    histogram: list[list[list[int]]]
    confusion: list[list[int]]


class RunFolder:
    """A run's files. Listeners see every event of this process as it is written (progress bars)."""

    listeners: ClassVar[list[Callable[[Event], None]]] = []

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def watched(cls, listener: Callable[[Event], None]) -> Iterator[None]:
        cls.listeners.append(listener)
        try:
            yield
        finally:
            cls.listeners.remove(listener)

    @classmethod
    def create(cls, path: Path, config: str, *, resume: bool) -> "RunFolder":
        """Make the folder, or go on in one that the same study made.

        Raises:
            ConfigError: the folder exists and `resume` is false, or its study is another one.
        """
        file = path / "config.yaml"
        if file.exists() and not resume:
            raise ConfigError(f"{path} holds a run already. Add resume=true to go on with it, or run.dir=OTHER.")
        if file.exists() and _study(file.read_text()) != _study(config):
            raise ConfigError(
                f"{path} holds another study than this command's. Repeat its own overrides, or run.dir=OTHER."
            )
        if not file.exists():
            write_bytes(file, config.encode())
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A finished or interrupted run.

        Raises:
            ConfigError: no run is there.
        """
        if not (path / "config.yaml").is_file():
            raise ConfigError(
                f"{path} is no run folder: it has no config.yaml. Give the folder that medfl simulate made."
            )
        return cls(path)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """While it lasts, attempt.lock is held, with the attempt's name in it; then outcome.json says how it ended:
        {"state", "error", "code"}. One that was killed leaves no outcome, and its lock is free.

        Raises:
            ConfigError: another process works in this folder.
        """
        file = self.path / "outcome.json"
        with (self.path / "attempt.lock").open("a+") as lock:
            self._claim(lock)
            lock.truncate(0)
            lock.write(name)
            lock.flush()
            file.unlink(missing_ok=True)
            with self._told(file):
                yield

    def _claim(self, lock: TextIO) -> None:
        for _ in range(LOOKS):  # who only looks at the lock holds it for an instant
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.1)
        raise ConfigError(f"another process works in {self.path}. Wait for its end, or end it.")

    @contextmanager
    def _told(self, file: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            code = error.exit_code if isinstance(error, MedflError) else InternalError.exit_code
            text = {"state": "failed", "error": f"{type(error).__name__}: {error}", "code": code}
            write_bytes(file, json.dumps(text).encode())
            raise
        write_bytes(file, json.dumps({"state": "finished", "error": "", "code": 0}).encode())

    def config(self) -> str:
        """The study, with this folder as its place: a run may have been moved since it was made.

        Raises:
            ConfigError: config.yaml is damaged.
        """
        try:
            study = yaml.safe_load((self.path / "config.yaml").read_text())
            study.pop("provenance", None)
            study["run"]["dir"] = str(self.path)
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
            raise ConfigError(f"{self.path}/config.yaml is damaged. Restore it from a backup.") from None
        return yaml.safe_dump(study, sort_keys=False, allow_unicode=True)

    def arm(self, arm: str) -> Path:
        """The folder of an arm; the federated one is the run itself."""
        return self.path if arm == "federated" else self.path / "arms" / arm.replace(":", "-")

    def write(self, events: Iterable[Event]) -> None:
        events = list(events)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        lines = [
            json.dumps({"t": now} | {k: v for k, v in asdict(e).items() if v != "" or k == "site"}) for e in events
        ]
        self._append("metrics.jsonl", "".join(f"{line}\n" for line in lines))
        for event in events:
            for listener in self.listeners:
                listener(event)

    def events(self) -> list[dict[str, Any]]:
        """All complete lines; a last line that a crash cut short is left out."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def wire(self, rows: Iterable[Row]) -> None:
        self._append_rows("wire.csv", WIRE, rows)

    def wire_rows(self) -> list[dict[str, str]]:
        """All complete lines of wire.csv."""
        file = self.path / "wire.csv"
        if not file.exists():
            return []
        with file.open(newline="") as lines:
            return [row for row in csv.DictReader(lines) if row["stage"]]

    def evaluated(self, rows: Iterable[Evaluated]) -> None:
        """All of these rows or, after a crash, none: a site that has one is not asked again."""
        file = self.path / "evaluation.csv"
        before = file.read_bytes() if file.exists() else _csv(EVALUATION, (), header=True).encode()
        write_bytes(file, before + _csv(EVALUATION, [asdict(row) for row in rows], header=False).encode())

    def counted(self, rows: Iterable[Counted]) -> None:
        self._append("counts.jsonl", "".join(f"{json.dumps(asdict(row))}\n" for row in rows))

    def transfers(self, rows: Sequence[Row]) -> None:
        write_bytes(self.path / "transfer.csv", _csv(TRANSFER, rows, header=True).encode())

    def evaluations(self) -> list[dict[str, str]]:
        file = self.path / "evaluation.csv"
        if not file.exists():
            return []
        with file.open(newline="") as lines:
            return list(csv.DictReader(lines))

    def forget_after(self, arm: str, round: int) -> None:  # noqa: A002
        """Drop what was written of rounds that a resumed arm will repeat, and lines that a crash cut short."""
        kept = [
            e for e in self.events() if not (e.get("arm") == arm and e["stage"] in TRAININGS and e["round"] > round)
        ]
        if (file := self.path / "metrics.jsonl").exists():
            write_bytes(file, "".join(json.dumps(event) + "\n" for event in kept).encode())
        if rows := self.wire_rows():
            again = [r for r in rows if not (r["arm"] == arm and r["stage"] in TRAININGS and int(r["round"]) > round)]
            write_bytes(self.path / "wire.csv", _csv(WIRE, again, header=True).encode())

    def _append_rows(self, name: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        self._append(name, _csv(columns, rows, header=False), header=_csv(columns, (), header=True))

    def _append(self, name: str, text: str, *, header: str = "") -> None:
        """After the last whole line: what a crash cut short goes."""
        if not text and not header:
            return
        with room_for(self.path / name), (self.path / name).open("ab+") as file:
            end = _whole(file)
            file.truncate(end)
            file.write((text if end else header + text).encode())


def _whole(file: BinaryIO) -> int:
    """Bytes up to the end of the last whole line."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 1))
    if not size or file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _csv(columns: Sequence[str], rows: Iterable[Row], *, header: bool) -> str:
    """Each row has all of the columns and nothing else; csv.DictWriter takes twice the time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(columns)
    writer.writerows([row[name] for name in columns] for row in rows)
    return text.getvalue()


def _study(config: str) -> dict[str, Any]:
    """What makes a study: all of config.yaml but its place and its provenance."""
    return {name: part for name, part in yaml.safe_load(config).items() if name not in ("run", "provenance")}
