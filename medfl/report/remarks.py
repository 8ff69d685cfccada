"""What the program remarked while it trained: each text once per arm, with the rounds in which it was said."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from medfl.report.cells import NONE, Section
from medfl.report.tables import Run

NAME = "remark"  # of the events
COLLAPSED = "collapsed"  # how the text of a collapse begins
SHOWN = 10  # remarks that are not folded away
SPANS = 5  # runs of rounds that are listed
NUMBER = re.compile(r"('[^']*')|(?<![\w.-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")  # a quoted name keeps its digits


@dataclass(frozen=True)
class Remark:
    """A text of one arm as it was last said, and its rounds."""

    arm: str
    text: str
    rounds: tuple[int, ...]

    @property
    def collapsed(self) -> bool:
        return self.text.startswith(COLLAPSED)


def section(run: Run) -> Section:
    """The remarks for the template, {} where there is none."""
    rows = [
        {
            "arm": said.arm or NONE,
            "rounds": spans(said.rounds),
            "text": said.text[:1].upper() + said.text[1:],
            "alarm": said.collapsed,
        }
        for said in distinct(run)
    ]
    first = max(SHOWN, sum(row["alarm"] is True for row in rows))
    return {"first": rows[:first], "rest": rows[first:]} if rows else {}


def distinct(run: Run) -> list[Remark]:
    """Texts that differ in numbers alone are one remark; collapses first, then in the order of their first round."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for event in run.events:
        if event.name == NAME and event.reason:
            key = event.arm, NUMBER.sub(lambda found: found[1] or "#", event.reason)
            groups.setdefault(key, []).append((event.round, event.reason))
    said = [
        Remark(arm, max(lines, key=lambda line: line[0])[1], tuple(sorted({at for at, _ in lines})))
        for (arm, _), lines in groups.items()
    ]
    return sorted(said, key=lambda remark: (not remark.collapsed, remark.rounds[0]))


def collapse_alarm(run: Run) -> str:
    """For the top of the page: which arms collapsed, or ""."""
    fallen = [f"{said.arm} ({spoken(said.rounds)})" for said in distinct(run) if said.collapsed]
    return f"Warning: training collapsed in arm {', '.join(fallen)}. See the remarks." if fallen else ""


def spoken(rounds: Iterable[int]) -> str:
    """ "round 2" or "rounds 3-5, 7"."""
    known = sorted(set(rounds))
    return f"round{'s' * (len(known) > 1)} {spans(known)}"


def spans(rounds: Iterable[int]) -> str:
    """ "3-5, 7"; many separate ones are counted: "12 from 1 to 97"."""
    found: list[list[int]] = []
    known = sorted(set(rounds))
    for at in known:
        if found and at == found[-1][-1] + 1:
            found[-1].append(at)
        else:
            found.append([at])
    if len(found) > SPANS:
        return f"{len(known)} from {known[0]} to {known[-1]}"
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in found)
