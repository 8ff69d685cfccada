"""What a check found: a line for people, and numbers alone for sharing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

State = Literal["pass", "warn", "fail"]
GROUPS = {
    "host": "This machine",
    "gpu": "Computing device",
    "clock": "Clock",
    "network": "Network",
    "keys": "Keys",
    "policy": "Study and policy",
    "data": "Images and labels",
    "privacy": "Identifying information",
    "budget": "Privacy of the patients",
    "fit": "A training step on these data",
}
RANK: Mapping[str, int] = {"fail": 0, "warn": 1, "pass": 2}
NOTHING = "nothing found"  # what of a check that looks for something bad
MOST_ITEMS = 200  # of one finding on the page


@dataclass(frozen=True)
class Finding:
    """One line of the check. `what` and `items` may name files: they stay at the site, `counts` may leave it."""

    group: str
    name: str
    state: State
    what: str
    why: str = ""
    fix: str = ""
    counts: Mapping[str, float | int] = field(default_factory=dict)
    items: Sequence[str] = ()  # one per file

    def __post_init__(self) -> None:
        if self.group not in GROUPS or not all(isinstance(value, int | float) for value in self.counts.values()):
            raise ValueError(f"finding {self.group}/{self.name}: an unknown group, or counts that are no numbers.")


def worst(findings: Sequence[Finding]) -> State:
    """
    Args:
        findings: none: pass.
    """
    return min((found.state for found in findings), key=lambda state: RANK[state], default="pass")


def number(findings: Sequence[Finding], state: State) -> int:
    return sum(found.state == state for found in findings)
