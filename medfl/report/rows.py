"""One line of each file of the run folder, typed: what a cell may hold, and which lines cannot be used."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfl.evaluation.counts import BINS


@dataclass(frozen=True, slots=True)
class Event:
    """One line of metrics.jsonl. `site` is "" for the aggregate; `value` may be NaN (a diverged run)."""

    time: str
    stage: str
    arm: str
    round: int
    site: str
    name: str
    value: float
    reason: str


@dataclass(frozen=True, slots=True)
class Score:
    """One line of evaluation.csv; `value` is None where it could not be computed."""

    arm: str
    site: str
    task: str
    protocol: str
    label_fraction: float
    metric: str
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Transfer:
    """One line of transfer.csv: an encoder of one origin, tested at one site."""

    trained_on: str
    tested_on: str
    kind: str
    metric: str
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """One line of counts.jsonl: how often an arm at a site gave which probability, over `classes` (K).

    `histogram` (K, 2, B): test images of other classes and of class k, by the bin of their probability of k.
    `confusion` (K, K): true class by named class, -1 where withheld. No count told is of fewer images than `least`.
    """

    arm: str
    site: str
    protocol: str
    label_fraction: float
    classes: tuple[str, ...]
    least: int
    histogram: NDArray[np.int64]
    confusion: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Crossing:
    """One line of wire.csv: a tensor or number that crossed a site's border; up = it left the site."""

    round: int
    site: str
    direction: str
    name: str
    role: str
    dtype: str
    shape: str
    bytes: int
    arm: str
    stage: str


@dataclass(frozen=True, slots=True)
class Site:
    """One site of sites.json: images per split, and images per class of the training split.

    Of images of several modalities also: training images that have each, and training images with a mask.
    """

    name: str
    train: int
    val: int
    test: int
    classes: Mapping[str, int]
    profile: str
    held_out: bool
    modalities: Mapping[str, int]
    labelled: int


def event(line: str) -> Event:
    """From one line of metrics.jsonl."""
    node = json.loads(line)
    value = node["value"]
    return Event(
        time=str(node.get("t", "")),
        stage=str(node["stage"]),
        arm=str(node.get("arm", "")),  # enrolment belongs to no arm
        round=int(node["round"]),
        site=str(node.get("site") or ""),
        name=str(node["name"]),
        value=math.nan if value is None else float(value),
        reason=str(node.get("reason", "")),
    )


def score(row: Mapping[str, str]) -> Score:
    """From one row of evaluation.csv."""
    names = ("arm", "site", "task", "protocol")
    arm, site, task, protocol = (_filled(row, name) for name in names)
    return Score(arm, site, task, protocol, float(row["label_fraction"]), _filled(row, "metric"), *_estimate(row))


def transfer(row: Mapping[str, str]) -> Transfer:
    """From one row of transfer.csv."""
    trained, tested, kind, metric = (_filled(row, n) for n in ("trained_on", "tested_on", "kind", "metric"))
    return Transfer(trained, tested, kind, metric, *_estimate(row))


def counted(line: str) -> Counted:
    """From one line of counts.jsonl.

    Raises:
        ValueError: the shapes do not belong together.
    """
    node = json.loads(line)
    classes = tuple(map(str, node["classes"]))
    histogram = np.array(node["histogram"], dtype=np.int64)
    confusion = np.array(node["confusion"], dtype=np.int64)
    if histogram.shape != (len(classes), 2, BINS) or confusion.shape != (len(classes), len(classes)):
        raise ValueError(f"counts of {len(classes)} classes: got {histogram.shape} and {confusion.shape}.")
    return Counted(
        str(node["arm"]), str(node["site"]), str(node["protocol"]), float(node["label_fraction"]),
        classes, int(node["least"]), histogram, confusion,
    )  # fmt: skip


def crossing(row: Mapping[str, str]) -> Crossing:
    """From one row of wire.csv."""
    if row["direction"] not in ("up", "down"):
        raise ValueError(f"direction: got {row['direction']!r}, need up or down.")
    return Crossing(
        round=int(row["round"]),
        site=row["site"],
        direction=row["direction"],
        name=_filled(row, "name"),
        role=row["role"] or "",
        dtype=row["dtype"] or "",
        shape=row["shape"] or "",
        bytes=int(row["bytes"]),
        arm=row.get("arm") or "",
        stage=row.get("stage") or "",
    )


def site(node: Mapping[str, Any]) -> Site:
    """From one entry of sites.json."""
    return Site(
        name=str(node["name"]),
        train=int(node["train"]),
        val=int(node["val"]),
        test=int(node["test"]),
        classes=_counts(node, "classes"),
        profile=str(node.get("profile") or ""),
        held_out=bool(node.get("held_out")),
        modalities=_counts(node, "modalities"),
        labelled=int(node.get("labelled") or 0),
    )


def _counts(node: Mapping[str, Any], key: str) -> dict[str, int]:
    return {str(name): int(count) for name, count in (node.get(key) or {}).items()}


def _filled(row: Mapping[str, str], name: str) -> str:
    """A cell that must not be empty: a row cut short by a running writer has None here."""
    if not row[name]:
        raise ValueError(f"{name} is empty.")
    return row[name]


def _estimate(row: Mapping[str, str]) -> tuple[float | None, float | None, float | None]:
    return _number(row["value"]), _number(row["low"]), _number(row["high"])


def _number(text: str | None) -> float | None:
    """None for an empty or non-finite cell; a row cut short raises."""
    if text is None:
        raise ValueError("the row is cut short.")
    value = float(text) if text.strip() else math.nan
    return value if math.isfinite(value) else None
