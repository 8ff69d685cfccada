"""How the sites of a round behave: who sent nothing new, a copy or an old update, and whose encoder sticks out.

All of it needs single updates. What is found is remarked; with rounds.inspect=exclude it is left out of that round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from medfl import inspector
from medfl.ballot import Ballot
from medfl.gate import Update
from medfl.layout import Layout
from medfl.study import Study
from medfl.whole import SAME, Whole

KEPT = 512  # coordinates of each group that are kept of an update, to know it again
ROUNDS = 8  # that are kept
ROUNDING = 1e-7  # of the broadcast's length: a shorter update is none
AGAINST = 0.05  # an honest update may be this far from the others', or half as far as they agree: rare scanners
TINY = 1e-100  # in place of a length of 0
LONG = 2.0  # times the median length of the round; good sites came to 1.12 with AdamW
Earlier = dict[str, torch.Tensor]  # site -> (rounds, 2, K): samples of its last updates and moves, the newest last


@dataclass
class Judged:
    """What was found in a round: remarks, figures (site, name, value), and places of updates to leave out with why."""

    remarks: list[str] = field(default_factory=list)
    told: list[tuple[str, str, float]] = field(default_factory=list)
    out: dict[int, str] = field(default_factory=dict)

    def found(self, place: int, text: str) -> None:
        """Remark on an update that should not count."""
        self.remarks.append(text)
        self.out.setdefault(place, text)


def judge(study: Study, sends: Layout, updates: Sequence[Update], ballot: Ballot, earlier: Earlier) -> Judged:
    """Everything that can be said of the updates, in site order; a lone site is not judged.

    With rounds.inspect=exclude, `out` never holds all of them: where it would, nobody is left out.

    Args:
        earlier: what was kept of earlier rounds; this round's is added.
    """
    judged, names = Judged(), [update.site for update in updates]
    if len(updates) < 2:
        return judged
    length = float(np.sqrt(sum(float(array @ array) for array in ballot.before.values())))
    idle = [place for place, norm in enumerate(ballot.whole.norms) if norm <= ROUNDING * length]
    for place in idle:
        judged.found(place, f"site '{names[place]}' sent the broadcast back unchanged: it has not trained.")
    for first, second in ballot.whole.copies():
        if not {first, second} & set(idle):
            text = f"sites '{names[first]}' and '{names[second]}' sent the same update: one copies, or they share data."
            judged.found(second, text)  # counts once
    for place in _replayed(names, ballot, earlier, idle):
        judged.found(place, f"site '{names[place]}' sent an update of an earlier round again.")
    if study.rounds.inspect != "none":
        _inspect(study, sends, names, ballot, judged)
    if study.rounds.inspect != "exclude" or len(judged.out) == len(updates):
        judged.out.clear()
    return judged


def _replayed(names: Sequence[str], ballot: Ballot, earlier: Earlier, idle: Sequence[int]) -> list[int]:
    """Places of updates whose weights, or whose moves from the broadcast, are those of an own earlier one."""
    thin, found = ballot.thinned(KEPT), []
    before = np.concatenate([*thin.before.values()]).astype(np.float32)
    for place, (name, flat) in enumerate(zip(names, thin.flats, strict=True)):
        values = np.concatenate([flat.get(group, old) for group, old in thin.before.items()]).astype(np.float32)
        now = torch.from_numpy(np.stack([values, values - before]))  # (2, K)
        old = earlier.get(name, now[None, :, :][:0])
        gaps, length = torch.linalg.vector_norm(now - old, dim=2), torch.linalg.vector_norm(now[1])  # (rounds, 2), ()
        if place not in idle and bool(((gaps <= SAME * length) & (length > 0)).any()):
            found.append(place)
        earlier[name] = torch.cat([old, now[None]])[-ROUNDS:]
    return found


def _inspect(study: Study, sends: Layout, names: Sequence[str], ballot: Ballot, judged: Judged) -> None:
    """Three signs of a poisoned update: its encoder sees otherwise, it points against the others, it is far longer."""
    if len(names) < inspector.LEAST:
        return
    embedded = inspector.embeddings(study.source, sends, ballot.before, ballot.flats)
    strange, agreed, lengths = inspector.strangeness(embedded), agreement(ballot.whole), ballot.whole.norms
    opposed, usual = -max(AGAINST, float(np.median(agreed)) / 2), max(float(np.median(lengths)), TINY)
    for place, name in enumerate(names):
        odd, along, times = strange[place], float(agreed[place]), float(lengths[place]) / usual
        judged.told += [(name, "inspect/strangeness", odd), (name, "inspect/agreement", along)]
        signs = {
            f"its encoder sees the inspection images otherwise (score {odd:.1f}, usual up to {inspector.THRESHOLD:g})":
                odd > inspector.THRESHOLD,
            f"it points against the others' (median cosine {along:.2f})": along < opposed,
            f"it is {times:.1f} times as long as the median": times > LONG,
        }  # fmt: skip
        if found := [sign for sign, there in signs.items() if there]:
            judged.found(place, f"the update of site '{name}' sticks out: {'; '.join(found)}.")


def agreement(whole: Whole) -> np.ndarray:
    """Of each site the median cosine of its update to the others', (sites,); 0 for an update of length 0."""
    lengths = np.maximum(whole.norms, TINY)
    cosines = whole.products / lengths[:, None] / lengths[None]
    sites = len(lengths)
    others = cosines[~np.eye(sites, dtype=bool)].reshape(sites, sites - 1)
    found: np.ndarray = np.median(others, axis=1)
    return found


def to_tensors(earlier: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For a checkpoint."""
    return {f"earlier/{site}": kept for site, kept in earlier.items()}


def of_tensors(tensors: Mapping[str, torch.Tensor]) -> Earlier:
    """The reverse of `to_tensors`, from all tensors of a checkpoint."""
    return {name.removeprefix("earlier/"): kept for name, kept in tensors.items() if name.startswith("earlier/")}
