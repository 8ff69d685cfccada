"""What each arm cost: rounds, steps, images seen, bytes and seconds; and whether compared arms saw as many images."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from medfl.report import wire
from medfl.report.cells import NONE, Section
from medfl.report.rows import Crossing, Event
from medfl.report.tables import Run, study_node
from medfl.report.words import ARMS, TITLES, TUNED, Tuned, arm_name, percent, taken_apart

BATCH = {"pretrain": "training", "finetune": "finetune"}  # stage -> section of the study with its batch size
STEPS, AT_SITES, WHOLE = "site/steps", "site/seconds", "round/seconds"  # events


@dataclass(frozen=True)
class Cost:
    """Sums over the rounds of one arm. `at_sites`: seconds of all sites added up; `whole`: of the rounds as such."""

    arms: int = 0
    rounds: int = 0
    steps: float = 0.0
    at_sites: float = 0.0
    whole: float = 0.0
    up: int = 0
    down: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


def section(run: Run) -> Section:
    """For the template; {} before the first round."""
    trained = {stage: costs(run, stage) for stage in BATCH}
    if not any(trained.values()):
        return {}
    pretrained, groups = trained["pretrain"], _groups(trained["finetune"])
    uneven = _uneven(run, pretrained)
    return {
        "pretrain": [_row(run, "pretrain", arm_name(arm), cost) for arm, cost in _ordered(pretrained)],
        "finetune": _tuned_rows(run, groups),
        "uneven": [text for text in (uneven, *_uneven_tuned(run, groups)) if text],
        "simulated": bool(run.sites),
        "even": len(pretrained) > 1 and not uneven,
    }


def costs(run: Run, stage: str) -> dict[str, Cost]:
    """Arm -> what its rounds of this stage took."""
    events: dict[str, list[Event]] = {}
    for event in run.events:
        if event.stage == stage and event.arm:
            events.setdefault(event.arm, []).append(event)
    rows: dict[str, list[Crossing]] = {}
    for crossing in run.crossings:
        if crossing.stage == stage:
            rows.setdefault(crossing.arm, []).append(crossing)
    return {
        arm: _cost(found, rows.get(arm, [])) for arm, found in events.items() if any(e.name == STEPS for e in found)
    }


def clock(seconds: float) -> str:
    """ "45 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _cost(events: Sequence[Event], crossings: Iterable[Crossing]) -> Cost:
    def total(name: str) -> float:
        return sum(event.value for event in events if event.name == name)

    sent = {"up": 0, "down": 0}
    for crossing in crossings:
        sent[crossing.direction] += crossing.bytes
    rounds = len({event.round for event in events if event.name == STEPS})
    return Cost(1, rounds, total(STEPS), total(AT_SITES), total(WHOLE), sent["up"], sent["down"])


def _ordered(found: Mapping[str, Cost]) -> list[tuple[str, Cost]]:
    order = list(ARMS)
    return sorted(found.items(), key=lambda item: (order.index(k) if (k := _kind(item[0])) in order else 9, item[0]))


def _kind(arm: str) -> str:
    return arm.partition(":")[0]


def _groups(found: Mapping[str, Cost]) -> dict[Tuned, list[Cost]]:
    """The runs of each protocol, kind of encoder and share of the labels, in the order of the words."""
    groups: dict[Tuned, list[Cost]] = {}
    for arm, cost in found.items():
        if key := taken_apart(arm):
            groups.setdefault(key, []).append(cost)
    protocols, arms = list(TUNED), list(ARMS)
    order = sorted(groups, key=lambda k: (protocols.index(k.protocol), -float(k.fraction), arms.index(k.encoder)))
    return {key: groups[key] for key in order}


def _row(run: Run, stage: str, name: str, cost: Cost) -> Section:
    images = _images(run, stage, cost.steps)
    return {
        "name": name,
        "height": 1,
        "words": [],
        "cells": [
            f"{cost.rounds:,}",
            f"{cost.steps:,.0f}",
            NONE if images is None else f"{images:,}",
            wire.size(cost.up) if cost.up else NONE,
            wire.size(cost.down) if cost.down else NONE,
            clock(cost.at_sites),
            clock(cost.whole),
        ],
    }


def _tuned_rows(run: Run, groups: Mapping[Tuned, Sequence[Cost]]) -> list[Section]:
    """Protocol by protocol; the trainings of one kind at single sites are added up."""
    heights = Counter(key.protocol for key in groups)
    found: list[Section] = []
    for key, costs_of in groups.items():
        whole = reduce(Cost.__add__, costs_of)
        row = _row(run, "finetune", TUNED[key.protocol], whole)
        height = heights.pop(key.protocol, 0)  # at the first row of each protocol
        words = [TITLES[key.encoder], percent(float(key.fraction))]
        found.append({**row, "height": height, "words": words, "cells": [f"{whole.arms}", *row["cells"]]})
    return found


def _images(run: Run, stage: str, steps: float) -> int | None:
    """Images seen, with repeats; None where the batch size is not recorded."""
    size = study_node(run, BATCH[stage]).get("batch_size")
    return round(steps * size) if isinstance(size, int) else None


def _uneven(run: Run, found: Mapping[str, Cost]) -> str:
    """A sentence where the pretrained arms did not see equal numbers of images, or ""."""
    groups: dict[float, list[str]] = {}
    for arm, cost in _ordered(found):
        groups.setdefault(cost.steps, []).append(_spoken(arm))
    listed = "; ".join(f"{_seen(run, 'pretrain', steps)} by {', '.join(arms)}" for steps, arms in groups.items())
    unequal = f"The pretrained arms did not see equal numbers of images, and their scores differ by that too: {listed}."
    return unequal if len(groups) > 1 else ""


def _spoken(arm: str) -> str:
    """ "federated", "site-1 alone"."""
    kind, _, owner = arm.partition(":")
    return f"{owner} alone" if owner else TITLES.get(kind, kind).lower()


def _uneven_tuned(run: Run, groups: Mapping[Tuned, Sequence[Cost]]) -> list[str]:
    """The same of the fine-tunings that are compared: those of one protocol and share of the labels."""
    found: dict[tuple[str, str], list[float]] = {}
    for key, runs in groups.items():
        found.setdefault((key.protocol, key.fraction), []).extend(cost.steps for cost in runs)
    return [
        f"{TUNED[protocol]}, {percent(float(fraction))} of the labels: the arms did not see equal numbers of images, "
        f"from {_seen(run, 'finetune', min(steps))} to {_seen(run, 'finetune', max(steps))} each."
        for (protocol, fraction), steps in found.items()
        if len(set(steps)) > 1
    ]


def _seen(run: Run, stage: str, steps: float) -> str:
    images = _images(run, stage, steps)
    return f"{steps:,.0f} steps" if images is None else f"{images:,}"
