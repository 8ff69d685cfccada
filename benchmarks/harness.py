"""Timing of contestants against each other on a machine that others use too.

All contestants run in one process, interleaved, in an order that is reversed every other round; what counts is the
ratio within a round, and of those the median. Single-thread contests take the CPU time of the process, which other
work on the machine disturbs least; contests of several threads or processes take wall time.

What `bench.py` reads from the file that a script writes for `--json FILE`, beside whatever else is in it:

    {"machine": machine(),
     "figures": [{"name": "views default 28x28x28 / MONAI", "ratio": {"median": 18.1, "min": 17.2, "max": 18.9},
                  "bar": 15.0, "better": "higher"},
                 {"name": "overhead pfl", "not_run": "pfl is not installed"}]}

One entry a ratio, made by `figure`, or by `not_run` where the peer is missing: nothing is left out in silence. `bar` is
null for a ratio that is shown without a demand; `better` tells on which side of it is good. Names are unique over all
scripts and begin with the script's.
"""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

VERSIONED = ("torch", "numpy", "numba", "monai", "flwr", "medmnist", "lightly", "pfl", "vector-quantize-pytorch")
FIGURES = ("median", "min", "max")
ABSENT = "not installed"  # in place of a version


@dataclass(frozen=True)
class Race:
    """Seconds of each contestant in each round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """The median seconds of one contestant."""
        return median(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> tuple[float, float, float]:
        """How many times faster `faster` is: median, least and greatest of the rounds' ratios."""
        ratios = [a / b for a, b in zip(self.seconds[slower], self.seconds[faster], strict=True)]
        return median(ratios), min(ratios), max(ratios)


def race(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    least: float = 0.05,
    clock: Callable[[], float] = time.process_time,
) -> Race:
    """Time every contestant once a round, each repeated until `least` seconds of the clock have passed.

    One untimed run of each comes first: it compiles, allocates and fills caches.
    """
    repeats: dict[str, int] = {}
    for name, run in contestants.items():
        run()
        repeats[name] = max(1, round(least / max(_once(run, 1, clock), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        order = list(contestants)[:: 1 if number % 2 == 0 else -1]
        for name in order:
            seconds[name].append(_once(contestants[name], repeats[name], clock))
    return Race(seconds)


def _once(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Mean seconds of `repeats` runs in a row."""
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def figure(name: str, ratio: tuple[float, float, float], *, bar: float | None = None, better: str) -> dict[str, object]:
    """An entry of "figures".

    Args:
        name: begins with the script's.
        ratio: median, least and greatest of the rounds.
        bar: the least (`higher`) or greatest (`lower`) median that is good enough.
        better: higher | lower.

    Raises:
        ValueError: another word for `better`.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"figure '{name}': got better='{better}', need higher or lower.")
    return {"name": name, "ratio": dict(zip(FIGURES, ratio, strict=True)), "bar": bar, "better": better}


def not_run(name: str, why: str) -> dict[str, object]:
    """An entry of "figures" for a contest that did not take place."""
    return {"name": name, "not_run": why}


def met(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of "figures" keeps its bar; one without a bar, or that was not run, does."""
    if "not_run" in entry or entry["bar"] is None:
        return True
    median_ratio: float = entry["ratio"]["median"]
    return median_ratio >= entry["bar"] if entry["better"] == "higher" else median_ratio <= entry["bar"]


def machine() -> dict[str, object]:
    """What the figures depend on: processor, load, threads and versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONED},
    }


def _processor() -> str:
    """The processor's name as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def write(path: Path, result: Mapping[str, object]) -> None:
    """The result as JSON, folders made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
