"""The run folder as typed rows. Reads only; what is absent or unreadable is said in words, never guessed.

A study may still be running: the last line of a file may be half written, later files may not exist.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from medfl.errors import DataError
from medfl.report import rows
from medfl.report.pictures import Picture, read_pictures
from medfl.report.rows import Counted, Crossing, Event, Score, Site, Transfer

COUNTS = "counts.jsonl"
FILES = {  # what each file holds, for the sentence that says that it is absent
    "config.yaml": "the resolved study",
    "metrics.jsonl": "losses, monitors and times of each round",
    "evaluation.csv": "the scores of the evaluate stage",
    "transfer.csv": "the scores of the transfer stage",
    COUNTS: "how often which probability was given, for the curves",
    "wire.csv": "what crossed each site's border",
    "sites.json": "the simulated sites and their shift",
    "encoder.json": "the description of the trained encoder",
}
Row = TypeVar("Row")
Line = TypeVar("Line")
Rows = tuple[tuple[Row, ...], tuple[str, ...]]  # the rows that could be read, and what could not, in words


@dataclass(frozen=True)
class Run:
    """All that a run folder says. `missing`: absent files; `problems`: what could not be used, in words."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    events: tuple[Event, ...] = ()
    scores: tuple[Score, ...] = ()
    transfers: tuple[Transfer, ...] = ()
    counts: tuple[Counted, ...] = ()
    crossings: tuple[Crossing, ...] = ()
    sites: tuple[Site, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()
    audit: Mapping[str, Any] = field(default_factory=dict)  # of `medfl audit privacy`, where it was run
    hashes: Mapping[str, str] = field(default_factory=dict)  # file -> SHA-256 of what was read
    missing: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @cached_property
    def lines(self) -> Mapping[tuple[str, str, str], tuple[tuple[int, float], ...]]:
        """(name, arm, site) -> (round, value) by round, of the pretrain stage."""
        found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        for event in self.events:
            if event.stage == "pretrain" and event.name != "refused":
                found.setdefault((event.name, event.arm, event.site), []).append((event.round, event.value))
        return {key: tuple(sorted(points, key=lambda point: point[0])) for key, points in found.items()}

    @cached_property
    def unseen(self) -> frozenset[str]:
        """The sites that never train. Only a simulation lists its sites; the study names that of real ones."""
        if self.sites:
            return frozenset(site.name for site in self.sites if site.held_out)
        named = study_node(self, "sites").get("held_out")
        return frozenset(site for site in ordered_sites(self) if site == named)


def read_run(run_dir: Path) -> Run:
    """The run in `run_dir`, whatever of it exists.

    Raises:
        DataError: no such folder, or none of the files of a run in it.
    """
    missing = tuple(name for name in FILES if not (run_dir / name).is_file())
    if len(missing) == len(FILES):
        state = "holds none of them" if run_dir.is_dir() else "does not exist"
        raise DataError(
            f"report: got {run_dir}, which {state}; need a run folder with some of {', '.join(FILES)}. "
            "Name the folder that a study wrote (run.dir)."
        )
    config, bad_config = read_config(run_dir / "config.yaml")
    events, bad_events = read_events(run_dir / "metrics.jsonl")
    scores, bad_scores = read_table(run_dir / "evaluation.csv", rows.score)
    transfers, bad_transfers = read_table(run_dir / "transfer.csv", rows.transfer)
    counts, bad_counts = read_counts(run_dir / COUNTS)
    crossings, bad_crossings = read_table(run_dir / "wire.csv", rows.crossing)
    sites, calibration, bad_sites = read_sites(run_dir / "sites.json")
    encoder, bad_encoder = read_json(run_dir / "encoder.json")
    audit, bad_audit = read_json(run_dir / "audit.json")
    pictures = read_pictures(run_dir)
    read = {name: (run_dir / name).read_bytes() for name in FILES if name not in missing}
    read |= {picture.file: picture.content for picture in pictures}
    return Run(
        name=run_dir.resolve().name,
        config=config,
        config_text=_text(run_dir / "config.yaml"),
        events=events,
        scores=scores,
        transfers=transfers,
        counts=counts,
        crossings=crossings,
        sites=sites,
        calibration=calibration,
        encoder=encoder,
        pictures=pictures,
        audit=audit,
        hashes={name: hashlib.sha256(content).hexdigest() for name, content in read.items()},
        missing=missing,
        problems=(
            bad_config
            + bad_events
            + bad_scores
            + bad_transfers
            + bad_counts
            + bad_crossings
            + bad_sites
            + bad_encoder
            + bad_audit
        ),
    )


def read_config(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The resolved study as plain data."""
    try:
        tree = yaml.safe_load(_text(path))
    except yaml.YAMLError:
        return {}, (f"{path.name} is not valid YAML and was not used.",)
    if tree is None:
        return {}, ()
    return (tree, ()) if isinstance(tree, dict) else ({}, (f"{path.name} is not a mapping and was not used.",))


def read_json(path: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """A JSON object; {} when the file is absent."""
    if not path.is_file():
        return {}, ()
    try:
        tree = json.loads(_text(path))
    except json.JSONDecodeError:
        return {}, (f"{path.name} is not valid JSON and was not used.",)
    return (tree, ()) if isinstance(tree, dict) else ({}, (f"{path.name} is not an object and was not used.",))


def read_events(path: Path) -> Rows[Event]:
    """The lines of metrics.jsonl. A repeated (stage, arm, round, site, name) counts once: the last.

    Events with a reason, such as refusals, are all kept.
    """
    found, problems = _parsed(path.name, _text(path).splitlines(), rows.event)
    kept: dict[tuple[object, ...], Event] = {}
    for number, row in enumerate(found):
        own = number if row.reason else None
        kept[(row.stage, row.arm, row.round, row.site, row.name, own)] = row
    return tuple(kept.values()), problems


def read_table(path: Path, parse: Callable[[Mapping[str, str]], Row]) -> Rows[Row]:
    """The rows of a CSV file with a header, each through `parse`."""
    return _parsed(path.name, csv.DictReader(_text(path).splitlines()), parse)


def read_counts(path: Path) -> Rows[Counted]:
    """The lines of counts.jsonl; a repeated (arm, site, protocol, label fraction) counts once: the last."""
    found, problems = _parsed(path.name, _text(path).splitlines(), rows.counted)
    kept = {(row.arm, row.site, row.protocol, row.label_fraction): row for row in found}
    return tuple(kept.values()), problems


def read_sites(path: Path) -> tuple[tuple[Site, ...], Mapping[str, Any], tuple[str, ...]]:
    """Sites and calibration of a simulation."""
    tree, problems = read_json(path)
    listed = tree.get("sites")
    found, bad = _parsed(path.name, listed if isinstance(listed, list) else [], rows.site)
    calibration = tree.get("calibration")
    return found, calibration if isinstance(calibration, dict) else {}, problems + bad


def study_node(run: Run, name: str) -> Mapping[str, Any]:
    """A section of the study, {} where there is none."""
    node = run.config.get(name)
    return node if isinstance(node, dict) else {}


def ordered_sites(run: Run) -> tuple[str, ...]:
    """Every site that any file names: first in the order of sites.json, then by name."""
    known = [site.name for site in run.sites]
    seen = {e.site for e in run.events} | {s.site for s in run.scores} | {c.site for c in run.crossings}
    seen |= {t.tested_on for t in run.transfers}
    return (*known, *sorted(seen - set(known) - {"", "central"}))


def _parsed(name: str, lines: Iterable[Line], parse: Callable[[Line], Row]) -> Rows[Row]:
    """Each line through `parse`; lines that cannot be read are counted, not hidden."""
    found, bad = [], 0
    for line in lines:
        try:
            found.append(parse(line))
        except (KeyError, TypeError, ValueError, AttributeError):
            bad += 1
    lost = "1 line" if bad == 1 else f"{bad} lines"
    return tuple(found), (f"{name}: {lost} could not be read.",) if bad else ()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
