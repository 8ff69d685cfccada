"""Faults, injected into a study of real processes on loopback: nginx, SuperLink, SuperNodes and their apps.

    PYTHONPATH=. python benchmarks/faults.py [--only NAME ...] [--json FILE]

Each fault is one run of three rounds at three sites. The encoder that it ends with is compared, by SHA-256, with that
of a simulation that goes on without the same replies: those that the run itself says it went without, and of those only
the ones that the fault may cost. Needs nginx; full disks also need the right to mount a small file system.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fault_kinds import Fault, faults
from fault_rig import HANG, Rig
from harness import machine, write

from medfl.errors import MedflError

DISK = "24m"  # of a small file system; a study of this size needs 2 MB


@dataclass
class Outcome:
    """What became of one injection."""

    kind: str
    fault: str
    as_expected: bool
    wrong_model: bool
    hang: bool
    recovery: float | None  # s from the fault until the study went on, or was told of it
    whole: float  # s from the request to the end of the run
    remark: str = ""


def inject(rig: Rig, fault: Fault, name: str) -> Outcome:
    """One run with one fault."""
    env = fault.env | ({"MEDFL_KILLED": str(rig.study.folder / f"killed-{name}")} if fault.env else {})
    outcome, act, began = (
        Outcome(fault.kind, fault.name, False, False, False, None, 0.0),
        fault.act(rig),
        time.monotonic(),
    )
    try:
        next(act)
        began = rig.begin(**env)
        outcome.recovery = next(act)
        state, lost = rig.end(), rig.lost()
        outcome.whole = time.monotonic() - began
        outcome.wrong_model = bool(rig.encoder()) and rig.encoder() != rig.expected(lost)
        right = fault.must_lose <= lost <= fault.may_lose
        outcome.as_expected = state == "finished" and bool(rig.encoder()) and right and not outcome.wrong_model
        outcome.remark = "" if outcome.as_expected and not lost else _said(rig, state, sorted(lost))
        next(act, None)
    except (AssertionError, subprocess.TimeoutExpired, MedflError, OSError, ValueError, IndexError) as error:
        outcome.hang = "not within" in str(error)
        outcome.as_expected, outcome.remark = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"[:200]
        outcome.whole = time.monotonic() - began
        act.close()
        with contextlib.suppress(AssertionError):
            rig.down()
    return outcome


def _said(rig: Rig, state: str, lost: Sequence[tuple[str, int]]) -> str:
    ended = "" if state == "finished" else f"{state}: {rig.attempt()['error'][:400]}; "
    return ended + "without " + (", ".join(f"{site} in {number}" for site, number in lost) or "nobody")


@contextlib.contextmanager
def rig_of(fault: Fault) -> Iterator[Rig]:
    """A rig with all sites joined, on small file systems of its own where the fault fills one."""
    with tempfile.TemporaryDirectory(prefix="medfl-faults-") as place, contextlib.ExitStack() as stack:
        rig = Rig(Path(place), fault.study)
        for folder in (rig.lead, *rig.places.values()) if fault.small_disks else ():
            stack.enter_context(small_disk(folder))
        stack.callback(rig.study.stop)
        rig.join()
        yield rig


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Put a folder on a file system of its own."""
    aside = folder.with_name(f"{folder.name}-aside")
    folder.rename(aside)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "tmpfs", str(folder)], check=True)
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True, symlinks=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """A row for each kind."""
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.kind].append(outcome)
    lines = [
        "| fault | injections | as expected | wrong models | hangs | recovery, s: median, largest |",
        "|---|---|---|---|---|---|",
    ]
    for kind, them in kinds.items():
        times = [outcome.recovery for outcome in them if outcome.recovery is not None]
        shown = f"{statistics.median(times):.0f}, {max(times):.0f}" if times else "–"
        counts = (len(them), *(sum(getattr(o, n) for o in them) for n in ("as_expected", "wrong_model", "hang")))
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    known = faults()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    groups: dict[tuple[tuple[str, ...], bool], list[str]] = defaultdict(list)
    for name in given.only:
        groups[known[name].study, known[name].small_disks].append(name)
    outcomes: list[Outcome] = []
    for names in groups.values():
        if known[names[0]].small_disks and os.geteuid() != 0:
            print(f"skipped, for want of the right to mount a small file system: {', '.join(names)}")
            continue
        with rig_of(known[names[0]]) as rig:
            for name in names:
                one = inject(rig, known[name], name)
                outcomes.append(one)
                told = f"recovery {one.recovery:.0f} s" if one.recovery is not None else ""
                yes = "as expected" if one.as_expected else "NOT AS EXPECTED"
                print(f"{name}: {yes}; run {one.whole:.0f} s; {told} {one.remark}", flush=True)
    print(f"\n{table(outcomes)}\n\n{len({o.kind for o in outcomes})} kinds, {len(outcomes)} injections, "
          f"{sum(o.wrong_model for o in outcomes)} wrong final models, {sum(o.hang for o in outcomes)} hangs "
          f"(above {HANG:.0f} s)")  # fmt: skip
    if given.json:
        write(given.json, {"machine": machine(), "faults": [asdict(outcome) for outcome in outcomes]})


if __name__ == "__main__":
    main()
