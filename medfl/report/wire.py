"""What crossed the sites' borders, summed from wire.csv, and what may be said about it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from medfl.report.rows import Crossing
from medfl.report.tables import Run
from medfl.report.words import taken_apart

STAYS = ("queue", "local", "fixed")  # roles that never leave a site
TRAVELS = ("parameter", "norm_moments", "codebook", "target", "statistics", "masked", "key", "share")
METRIC = "metric"
CENTRAL = "central"  # what a simulation calls the place with all data: no site
ENDS = re.compile(r"/(value|low|high)$")  # of a metric's name
WORDS = {
    "parameter": "weights",
    "norm_moments": "batch-norm statistics over many images",
    "codebook": "codebook counts and sums over many images",
    "target": "weights of the slow copy that sets the training target",
    "statistics": "sums over many images: features for the monitors, counts of predictions for curves",
    "masked": "whole numbers under masks: they say nothing until those of all sites are added up",
    "key": "public keys of one sum",
    "share": "shares of the secrets behind masks, sealed for another site or of no further use",
    "metric": "single numbers, named below",
    "order": "the study and what to run",
    "queue": "features of single patients",
    "local": "must stay at the site",
    "fixed": "never sent, only compared",
}


@dataclass(frozen=True)
class Flow:
    """All of one role in one direction at one site."""

    site: str
    direction: str
    role: str
    names: int  # different tensors or metrics
    per_round: float | None  # bytes of one round of pretraining
    bytes: int  # of all stages


@dataclass(frozen=True)
class Verdict:
    """`alarm`: something left that must stay; `open`: it cannot be said; `clear`: only allowed roles left."""

    state: str
    text: str


def flows(run: Run) -> list[Flow]:
    """Sums by site, direction (up first) and role, in the order of `WORDS`.

    Of a simulation those of the federated arm and of what is trained from it: the arms that it is compared with would
    cross no border, a simulation only sends them over the same carrier.
    """
    groups: dict[tuple[str, str, str], list[Crossing]] = {}
    for row in run.crossings:
        if not run.sites or (_crosses(row.arm) and row.site != CENTRAL):
            groups.setdefault((row.site, row.direction, row.role), []).append(row)
    rank = {role: place for place, role in enumerate(WORDS)}
    order = sorted(groups, key=lambda key: (key[0], key[1] == "down", rank.get(key[2], len(rank)), key[2]))
    return [_flow(*key, groups[key]) for key in order]


def _crosses(arm: str) -> bool:
    tuned = taken_apart(arm)
    further = tuned is not None and tuned.encoder == "federated" and not tuned.protocol.startswith("central")
    return arm in ("federated", "") or further


def verdict(run: Run) -> Verdict:
    """What the roles of the rows that went up allow to say; no claim on an absent or damaged record."""
    if not run.crossings:
        return Verdict("open", "There is no record of what left the sites, so nothing can be said about it.")
    up = [row for row in run.crossings if row.direction == "up"]
    if kept := [row for row in up if row.role in STAYS]:
        count = f"{len(kept)} row{'s' * (len(kept) != 1)}"
        listed = ", ".join(sorted({f"{row.name} ({row.role}, {row.site})" for row in kept})[:8])
        return Verdict("alarm", f"Alarm: tensors that must stay at their site left it ({count}): {listed}.")
    if doubt := _doubt(run, up):
        return Verdict("open", doubt)
    present = {row.role for row in up}
    roles = "; ".join(f"{words} ({role.replace('_', ' ')})" for role, words in WORDS.items() if role in present)
    said = "By the roles recorded in wire.csv, no image, no patient id and no per-patient value left a site."
    return Verdict("clear", f"{said} What left: {roles or 'nothing'}.")


def metrics_up(crossings: Sequence[Crossing]) -> list[str]:
    """Names of the single numbers that left a site; of a score with its interval one name."""
    return sorted({ENDS.sub("", row.name) for row in crossings if row.direction == "up" and row.role == METRIC})


def size(count: float) -> str:
    """Bytes in decimal units: "11.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _doubt(run: Run, up: Sequence[Crossing]) -> str:
    """Why nothing can be said about what left, or ""."""
    if unknown := sorted({row.role or "(empty)" for row in up} - {*TRAVELS, METRIC}):
        roles = ", ".join(unknown)
        return f"Under a role that this report does not know, something left a site: {roles}. No claim is made."
    if lists := sorted({row.name for row in up if row.role == METRIC and _elements(row.shape) > 1}):
        names = ", ".join(lists)
        return f"Metrics with more than one value left a site and may be of single patients: {names}."
    damaged = [text for text in run.problems if text.startswith("wire.csv")]
    return f"{damaged[0]} So no claim is made about what left the sites." if damaged else ""


def _flow(site: str, direction: str, role: str, rows: Sequence[Crossing]) -> Flow:
    training = [row for row in rows if row.stage == "pretrain"]
    rounds = len({row.round for row in training})
    per_round = sum(row.bytes for row in training) / rounds if rounds else None
    return Flow(site, direction, role, len({row.name for row in rows}), per_round, sum(row.bytes for row in rows))


def _elements(shape: str) -> int:
    return math.prod(int(part) for part in re.findall(r"\d+", shape))
