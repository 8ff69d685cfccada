"""A hundred rounds of real processes on loopback: memory and open files of every process, and time per round.

    PYTHONPATH=. python benchmarks/soak.py [--rounds 100] [--json FILE]

The slope is a line through the rounds after the first fifth, in which caches fill. Needs nginx.
"""

import argparse
import contextlib
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from fault_rig import Rig, processes
from harness import machine, write

PROGRAMS = {  # shown name -> whose, and what its command holds
    "proxy": ("lead", "nginx"), "link": ("lead", "flower-superlink"), "apps": ("lead", "flower-superexec"),
    "ServerApp": ("lead", "flwr-serverapp"), "keeper": ("lead", "serve keeper"),
    "site: node": ("alpha", "flower-supernode"), "site: apps": ("alpha", "flower-superexec --insecure"),
    "site: warm process": ("alpha", "medfl.deployment.warm"),
    "site: join": ("alpha", "medfl.cli.site"),
}  # fmt: skip
WARMUP = 0.2  # share of the rounds before the line


def sample(rig: Rig) -> dict[str, tuple[float, int]]:
    """Resident memory (MB) and open files of each program, all its processes together; the site's as alpha's."""
    found = {}
    for name, (whose, program) in PROGRAMS.items():
        folder = rig.lead if whose == "lead" else rig.places[whose]
        numbers = processes(folder, program)
        if name == "site: warm process":
            numbers = numbers[:1]  # its children are requests
        memory = files = 0
        for pid in numbers:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                memory += int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))
                files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        found[name] = memory / 1024, files
    return found


def slopes(series: list[tuple[int, float, int]]) -> tuple[float, float, float, float]:
    """Memory at the end (MB), its slope (MB per round), its largest value, slope of open files per round."""
    rounds, memory, files = (np.array(column, dtype=float) for column in zip(*series, strict=True))
    late = rounds >= WARMUP * rounds.max()
    return float(memory[-1]), float(np.polyfit(rounds[late], memory[late], 1)[0]), float(memory.max()), float(
        np.polyfit(rounds[late], files[late], 1)[0]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    series: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="medfl-soak-") as place:
        rig = Rig(Path(place), ("rounds.deadline=120",), rounds=given.rounds)
        try:
            rig.up()
            rig.join()
            began, done = rig.begin(), 0
            while (state := rig.state()) in ("requested", "running"):
                if rig.rounds() > done:
                    done = rig.rounds()
                    for name, (memory, files) in sample(rig).items():
                        series[name].append((done, memory, files))
                time.sleep(1)
            seconds, lost = time.monotonic() - began, rig.lost()
            right = rig.encoder() == rig.expected(lost)
            database = sum(path.stat().st_size for path in (rig.lead / "state").glob("superlink.db*")) / 1e6
            took = [e["value"] for e in rig.study.events() if e["name"] == "round/seconds"]
        finally:
            rig.study.stop()
    rows = {name: slopes(them) for name, them in series.items()}
    print("| process | memory, MB | largest | MB per round | open files per round |\n|---|---|---|---|---|")
    for name, (last, slope, largest, files) in rows.items():
        print(f"| {name} | {last:.0f} | {largest:.0f} | {slope:+.3f} | {files:+.3f} |")
    halves = [float(np.median(part)) for part in np.array_split(took, 2)]
    print(
        f"\n{state} after {done} rounds in {seconds:.0f} s, encoder as in the simulation: {right}, "
        f"replies lost: {len(lost)}; round {halves[0]:.1f} s in the first half, {halves[1]:.1f} s in the second; "
        f"database {database:.1f} MB"
    )
    if given.json:
        write(given.json, {"machine": machine(), "rounds": done, "right": right, "seconds": seconds, "rows": rows})


if __name__ == "__main__":
    main()
