"""The result in plain sentences: what was reached, against what, how sure it is, and what must be said beside it."""

import math
from collections.abc import Mapping, Sequence

from medfl.evaluation.statistics import SMALLEST_GAP
from medfl.report.rows import Transfer
from medfl.report.summary import (
    SIGNED,
    Comparison,
    Estimate,
    alike,
    difference,
    mean,
    name_of,
    number,
    written,
)
from medfl.report.words import ARMS

WIDTH = 3.92  # of a 95 % interval in standard errors
OWN, CROSS = "", " outside the own hospital"  # forms of the recovered gap
LOWER = {OWN: "sites training alone", CROSS: "the models of other sites"}  # what each form starts from
KIND = {"linear": "representation"}  # protocol -> the transfer matrix in its terms; of the others, end to end
Cells = Mapping[tuple[str, str], Estimate]  # (trained on, tested on)


def sentence(comparison: Comparison) -> str:
    """The result in one plain sentence; says what is lacking where arms were not evaluated."""
    federated = comparison.mean("federated")
    if federated is None:
        have = " and ".join(ARMS[arm] for arm in comparison.arms if comparison.compared)
        return f"No result yet for federated pretraining{f': only {have} evaluated so far' * bool(have)}."
    over = f"{len(comparison.compared)} site{'s' * (len(comparison.compared) != 1)}"
    text = f"Federated pretraining reached a mean {name_of(comparison)} of {written(federated)} over {over}"
    others = {arm: comparison.mean(arm) for arm in ("local", "random", "central")}
    against = [f"{known.value:.3f} for {ARMS[arm]}" for arm, known in others.items() if known and arm != "central"]
    text += f", against {' and '.join(against)}" * bool(against)
    if (central := others["central"]) is not None:
        text += f"{';' if against else ','} central training reached {central.value:.3f}"
    return f"{text}."


def remarks(comparison: Comparison, transfers: Sequence[Transfer] = ()) -> list[str]:
    """What must be said beside the sentence: direction, certainty, gap, single sites, what was left out."""
    kind = KIND.get(comparison.protocol, "end_to_end")
    cells = matrix(transfers, kind, comparison.metric)
    found = [_versus(comparison, arm) for arm in ("local", "central", "random")]
    found += [recovered(comparison), recovered_cross(cells, comparison.compared)]
    found += [_range(comparison), _untrained(comparison)]
    found += [_unseen(comparison, site) for site in comparison.unseen]
    found += [f"{site} is in no mean: {why}." for site, why in comparison.left_out.items()]
    return [text for text in found if text]


def recovered(comparison: Comparison) -> str:
    """Own form: the share of central's gain over training alone that federation reached, or why it is not printed."""
    return _share(*(comparison.mean(arm) for arm in ("local", "federated", "central")), form=OWN)


def recovered_own(cells: Cells, sites: Sequence[str]) -> str:
    """Own form from a transfer matrix: the same sites behind all three means."""
    known = [s for s in sites if all((origin, s) in cells for origin in (s, "federated", "central"))]
    columns = (
        [cells[s, s] for s in known],
        [cells["federated", s] for s in known],
        [cells["central", s] for s in known],
    )
    return _share(*(mean(column) for column in columns), form=OWN)


def recovered_cross(cells: Cells, sites: Sequence[str]) -> str:
    """Cross form: in place of a site's own model those of the other sites, tested there; "" where not measured."""
    known = [site for site in sites if (("federated", site) in cells and ("central", site) in cells)]
    others = {
        site: alike([cell for (a, at), cell in cells.items() if at == site and a not in (at, *ARMS)]) for site in known
    }
    parts = [(alone, cells["federated", s], cells["central", s]) for s, alone in others.items() if alone]
    return _share(*(mean(column) for column in zip(*parts, strict=True)), form=CROSS) if parts else ""


def matrix(transfers: Sequence[Transfer], kind: str, metric: str) -> dict[tuple[str, str], Estimate]:
    """The cells of one transfer matrix that have a value."""
    return {
        (row.trained_on, row.tested_on): Estimate(row.value, row.low, row.high)
        for row in transfers
        if (row.kind, row.metric) == (kind, metric) and row.value is not None
    }


def _share(alone: Estimate | None, federated: Estimate | None, central: Estimate | None, *, form: str) -> str:
    """(federated - alone) / (central - alone), printed only where the gap below is resolved."""
    if alone is None or federated is None or central is None:
        return ""
    gap, name, lower = difference(central, alone), f"Recovered gap{form}", LOWER[form]
    if gap.low is None or gap.high is None:
        return f"{name} not resolvable: the interval of central training over {lower} is not known."
    need = max(SMALLEST_GAP, (gap.high - gap.low) / WIDTH * 2)
    if gap.value <= need:
        order = "below" if gap.value < 0 else "above"
        bound = " Central training is a reference, not a bound." if gap.value < 0 else ""
        return (
            f"{name} not resolvable: central training is {abs(gap.value):.3f} {order} {lower}, "
            f"and must be more than {need:.3f} above (2 standard errors, at least {SMALLEST_GAP}).{bound}"
        )
    share = (federated.value - alone.value) / gap.value
    span = _fieller(alone, federated, central)
    text = f"{name}: {number(100 * share, '.0f')} %{span} of what central training gains over {lower}."
    more = " More than 100 % means that it passed central training, which is a reference and not a bound."
    return text + more * (share > 1)


def _fieller(alone: Estimate, federated: Estimate, central: Estimate) -> str:
    """Fieller's 95 % bounds of the share in words, the three as independent; the gap is above 2 standard errors."""
    ends = [(known.low, known.high) for known in (alone, federated, central)]
    a, f, c = (math.nan if low is None or high is None else (high - low) ** 2 / 4 for low, high in ends)  # z² variance
    top, bottom = federated.value - alone.value, central.value - alone.value
    square, product = bottom**2 - (c + a), top * bottom - a
    half = math.sqrt(max(0.0, product**2 - square * (top**2 - (f + a)))) if math.isfinite(f) else math.nan
    low, high = (number(100 * (product + sign * half) / square, ".0f") for sign in (-1, 1))
    return f" (95 % {low} to {high} %)" if math.isfinite(half) else ""


def _versus(comparison: Comparison, arm: str) -> str:
    federated, other = comparison.mean("federated"), comparison.mean(arm)
    if federated is None or other is None:
        return ""
    change = difference(federated, other)
    if change.sign == 0:
        return f"Not distinguishable from {ARMS[arm]}: difference {written(change, SIGNED)}."
    return f"{'Better' if change.sign > 0 else 'Worse'} than {ARMS[arm]}: difference {written(change, SIGNED)}."


def _range(comparison: Comparison) -> str:
    gains = {site: gain for site in comparison.compared if (gain := comparison.benefit(site))}
    if not gains:
        return ""
    worst, best = (pick(gains, key=lambda site: gains[site].value) for pick in (min, max))
    lost = [site for site, gain in gains.items() if gain.value < 0]
    text = f"Benefit over training alone by site: from {number(gains[worst].value, SIGNED)} ({worst})"
    text += f" to {number(gains[best].value, SIGNED)} ({best})."
    return text + (f" Worse off than alone: {', '.join(lost)}." if lost else "")


def _untrained(comparison: Comparison) -> str:
    """A benchmark on which training does not beat an untrained encoder cannot rank ways of training."""
    untrained = comparison.mean("random")
    beaten = {arm: comparison.mean(arm) for arm in ("local", "central")}
    low = [ARMS[arm] for arm, known in beaten.items() if known and untrained and known.value <= untrained.value]
    if not low:
        return ""
    return f"Caution: {' and '.join(low)} did not beat the untrained encoder, so this study cannot rank arms."


def _unseen(comparison: Comparison, site: str) -> str:
    known = [(arm, comparison.cells[arm, site]) for arm in comparison.arms if (arm, site) in comparison.cells]
    if not known:
        return f"{site} took no part in training; no {name_of(comparison)} could be computed there."
    values = ", ".join(f"{cell.value:.3f} for {ARMS[arm]}" for arm, cell in known)
    return f"At {site}, which took no part in training: {values}."
