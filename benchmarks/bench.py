"""All speed figures: one script after the other, their table in RESULTS.md, and a check against the committed ratios.

    PYTHONPATH=. python benchmarks/bench.py [--quick | --full] [--only NAME ...] [--keep] [--check]

Each script writes runs/bench/NAME.json, in the form that `harness.py` tells. The section between the two markers in
RESULTS.md is made from those files, and nothing else of it is touched; without `--quick` the ratios go to ratios.json
too. `--check` writes neither: it compares the new ratios (never times, which another machine does not share) with
those in ratios.json, and names each that is worse by more than the tolerance. `--keep` runs nothing and takes the
files that are there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness import ABSENT, met

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs/bench"
RESULTS, RATIOS = HERE / "RESULTS.md", HERE / "ratios.json"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
TOLERANCE = 0.25  # share of the committed ratio by which a median may be worse
SLACK = 0.1  # and at least this much, for exponents around 0
LIMIT = 3600  # seconds of a script
SCRIPTS = (
    "floors", "views", "epoch", "steps", "quantizer", "aggregation", "traffic", "memory", "rounds", "overhead",
    "engines", "curves", "gpu",
)  # fmt: skip
QUICK = {"views", "epoch", "quantizer", "rounds", "overhead", "curves"}  # those that know --quick
FULL = {"views": 7, "epoch": 5, "quantizer": 7, "rounds": 5, "overhead": 5}  # rounds of a full run
Found = dict[str, Any]


def run(name: str, *, quick: bool, full: bool) -> Found:
    """What a script wrote; it ends with another status than 0 if a bar of its own is not met, which the table tells."""
    script, target = HERE / f"{name}.py", RUNS / f"{name}.json"
    if not script.exists():
        return absent(name, "the script is missing")
    target.unlink(missing_ok=True)
    words = ["--quick"] if quick and name in QUICK else []
    words += ["--rounds", str(FULL[name])] if full and name in FULL else []
    command = [sys.executable, str(script), "--json", str(target), *words]
    print("\n" + " ".join(["python", f"benchmarks/{name}.py", *words]), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(HERE.parent)}
    try:
        ended = subprocess.run(command, cwd=HERE.parent, env=environment, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return absent(name, f"it took more than {LIMIT} s")
    return read(name) if target.exists() else absent(name, f"it ended with status {ended.returncode} and wrote nothing")


def read(name: str) -> Found:
    """What a script wrote."""
    path = RUNS / f"{name}.json"
    if not path.exists():
        return absent(name, "there is no file of it")
    found: Found = json.loads(path.read_text())
    if "figures" not in found:
        return found | absent(name, "its file has no figures")
    return found


def absent(name: str, why: str) -> Found:
    """In place of what a script would have written."""
    return {"figures": [{"name": name, "not_run": why}]}


def section(found: Mapping[str, Found], *, extent: str) -> str:
    """The text between the markers."""
    told = [one["machine"] for one in found.values() if "machine" in one]
    lines = [f"Made {datetime.now(UTC):%Y-%m-%d} by `python benchmarks/bench.py {extent}`.".replace(" `.", "`."), ""]
    if told:
        rows = [item for one in told for item in one.get("versions", {}).items()]
        versions = dict(sorted(rows, key=lambda row: row[1] != ABSENT))  # a peer may have been there for some scripts
        loads = [one["load"][0] for one in told if "load" in one]
        lines += [
            f"{told[0]['processor']}, {told[0]['cores']} cores; load {min(loads):.1f} to {max(loads):.1f}; Python "
            f"{told[0]['python']}, " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
            "",
        ]
    if floor := found.get("floors", {}).get("floors"):
        lines += ["One thread: " + "; ".join(f"{name} {value:.1f}" for name, value in floor.items()) + ".", ""]
    lines += [
        "Ratios are of times or amounts within one process and round, median (min..max). Read those marked ≥ as "
        "times faster, those marked ≤ as times the bound.", "", "| figure | ratio | bar | |", "|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*lines, *(line(entry) for one in found.values() for entry in one["figures"])])


def line(entry: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "not_run" in entry:
        return f"| {entry['name']} | not run | – | {entry['not_run']} |"
    middle, low, high = (entry["ratio"][name] for name in ("median", "min", "max"))
    sign = "≥" if entry["better"] == "higher" else "≤"
    verdict = ""
    if entry["bar"] is not None:
        by = abs(middle / entry["bar"] - 1)
        verdict = "met" if met(entry) else f"not met, by {by:.0%}"
    bar = "–" if entry["bar"] is None else f"{sign} {entry['bar']:g}"
    return f"| {entry['name']} | {middle:.3g} ({low:.3g}..{high:.3g}) | {bar} | {verdict} |"


def place(text: str) -> None:
    """Put the section between the markers; append both, under a heading, where there are none."""
    whole = RESULTS.read_text()
    if BEGIN not in whole:
        whole = f"{whole.rstrip()}\n\n## Speed\n\n    make bench\n\n{BEGIN}\n{END}\n"
    before, rest = whole.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    RESULTS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def entries(found: Mapping[str, Found]) -> Iterable[dict[str, Any]]:
    """Every figure that has a ratio."""
    return (entry for one in found.values() for entry in one["figures"] if "ratio" in entry)


def worse(entry: Mapping[str, Any], committed: float) -> bool:
    """Whether a median is worse than the committed one by more than the tolerance."""
    lost = committed - entry["ratio"]["median"]
    return bool((lost if entry["better"] == "higher" else -lost) > max(TOLERANCE * committed, SLACK))


def compare(found: Mapping[str, Found]) -> list[str]:
    """The ratios that are worse than the committed ones.

    Raises:
        SystemExit: nothing was committed.
    """
    if not RATIOS.exists():
        raise SystemExit(f"{RATIOS.name} is missing: run without --check first")
    committed: dict[str, float] = json.loads(RATIOS.read_text())
    return [
        f"{entry['name']}: {entry['ratio']['median']:.3g}, committed {committed[entry['name']]:.3g}"
        for entry in entries(found)
        if entry["name"] in committed and worse(entry, committed[entry["name"]])
    ]


def keep(found: Mapping[str, Found]) -> None:
    """Commit to the new ratios; those of scripts that were not run stay."""
    before = json.loads(RATIOS.read_text()) if RATIOS.exists() else {}
    after = before | {entry["name"]: float(f"{entry['ratio']['median']:.4g}") for entry in entries(found)}
    RATIOS.write_text(json.dumps(dict(sorted(after.items())), indent=1) + "\n")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = options.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="fewer cases, in minutes; the table is shown, not written")
    extent.add_argument("--full", action="store_true", help="more rounds")
    options.add_argument("--check", action="store_true")
    options.add_argument("--keep", action="store_true")
    options.add_argument("--only", nargs="*", default=list(SCRIPTS))
    given = options.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in SCRIPTS if name in given.only]
    found = {name: read(name) if given.keep else run(name, quick=given.quick, full=given.full) for name in chosen}
    words = "--full" if given.full else "--quick" if given.quick else ""
    text = section(found if len(chosen) == len(SCRIPTS) else {n: read(n) for n in SCRIPTS} | found, extent=words)
    if given.check:
        lost = compare(found)
        for entry in (entry for one in found.values() for entry in one["figures"] if "not_run" in entry):
            print(f"not run: {entry['name']}: {entry['not_run']}")
        print(f"\n{len(lost)} ratios worse than committed by more than {TOLERANCE:.0%}", *lost, sep="\n  ")
        raise SystemExit(1 if lost else 0)
    print("\n" + text)
    if not given.quick:
        place(text)
        keep(found)


if __name__ == "__main__":
    main()
