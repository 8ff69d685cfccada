"""What the scores of a run say: means over sites, differences between arms, the result in plain sentences.

Intervals of a mean or a difference are put together from the cells' own intervals by MOVER (Zou & Donner
2008, Statistics in Medicine 27:1693), as if the cells were independent. Arms share their test patients, so
their differences are known somewhat better than stated here: the error is on the careful side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from medfl.evaluation.statistics import SMALLEST_GAP
from medfl.report.rows import Score
from medfl.report.tables import Run, ordered_sites

SIGNED = "+.3f"
INTERVAL = 3.92  # width of a 95 % interval in standard errors
HEADLINES = (("linear", "auc"), ("segmentation", "dice_wt"), ("fusion", "ssim"))  # the first that was measured
PROTOCOLS = {"linear": "linear-probe", "knn": "kNN"}
METRICS = {"auc": "AUC", "dice_wt": "Dice (whole tumour)", "ssim": "SSIM"}
UNDEFINED = {  # protocol -> an instance of why a site has no value
    "segmentation": "no mask in its test split",
    "fusion": "no test image of two modalities",
}
ARMS = {
    "random": "an untrained encoder",
    "local": "sites training alone",
    "federated": "federated pretraining",
    "central": "central training",
}


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, which may be unknown."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out zero, else 0: the sign is not known."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """One metric of one protocol: arms by site.

    `compared` are the sites behind every mean, `unseen` took no part in training, `left_out` says why not.
    """

    protocol: str
    metric: str
    cells: Mapping[tuple[str, str], Estimate]  # (arm, site)
    arms: tuple[str, ...]
    compared: tuple[str, ...]
    unseen: tuple[str, ...]
    left_out: Mapping[str, str]

    def mean(self, arm: str) -> Estimate | None:
        """Over the compared sites: the same sites for every arm."""
        return mean([self.cells[arm, site] for site in self.compared]) if arm in self.arms else None

    def benefit(self, site: str) -> Estimate | None:
        """What a site gains by taking part: federated minus training alone, on its own test images."""
        if ("federated", site) not in self.cells or ("local", site) not in self.cells:
            return None
        return difference(self.cells["federated", site], self.cells["local", site])


def mean(parts: Sequence[Estimate]) -> Estimate | None:
    """The plain mean of independent estimates; None of nothing."""
    if not parts:
        return None
    value, n = fmean(part.value for part in parts), len(parts)
    below = _length([None if part.low is None else part.value - part.low for part in parts])
    above = _length([None if part.high is None else part.high - part.value for part in parts])
    if below is None or above is None:
        return Estimate(value)
    return Estimate(value, value - below / n, value + above / n)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second."""
    value = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Estimate(value)
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above)


def compare_arms(run: Run, protocol: str, metric: str) -> Comparison:
    """The cells of one metric. A site counts in the means only if every evaluated arm has a value there.

    `local:<site>` is read at that site only; the largest label fraction is taken.
    """
    scores = [s for s in run.scores if s.protocol == protocol and s.metric == metric]
    most = max((s.label_fraction for s in scores), default=1.0)
    cells = {(kind, s.site): estimate for s in scores if s.label_fraction == most
             if (kind := _kind(s)) and (estimate := _estimate(s))}  # fmt: skip
    arms = tuple(arm for arm in ARMS if any(arm == kind for kind, _ in cells))
    held_out = {site.name for site in run.sites if site.held_out}
    reported = {s.site for s in run.scores} if scores else set()  # a site without this metric is named, not lost
    tested = [site for site in ordered_sites(run) if site in reported]
    short = {site: [arm for arm in arms if (arm, site) not in cells] for site in tested if site not in held_out}
    return Comparison(
        protocol=protocol,
        metric=metric,
        cells=cells,
        arms=arms,
        compared=tuple(site for site, lacking in short.items() if not lacking and arms),
        unseen=tuple(site for site in tested if site in held_out),
        left_out={site: _why(lacking, arms, protocol) for site, lacking in short.items() if lacking or not arms},
    )


def headline(run: Run) -> Comparison:
    """The comparison behind the result: the first of `HEADLINES` that has a value."""
    found = [compare_arms(run, protocol, metric) for protocol, metric in HEADLINES]
    return next((comparison for comparison in found if comparison.cells), found[0])


def recovered(comparison: Comparison) -> str:
    """The share of central's gain over training alone that federation reached, or why it is not printed."""
    alone, federated, central = (comparison.mean(arm) for arm in ("local", "federated", "central"))
    if alone is None or federated is None or central is None:
        return ""
    gap = difference(central, alone)
    if gap.low is None or gap.high is None:
        return "Recovered gap not resolvable: the interval of central training over sites alone is not known."
    need = max(SMALLEST_GAP, (gap.high - gap.low) / INTERVAL * 2)
    if gap.value <= need:
        order = "below" if gap.value < 0 else "above"
        bound = " Central training is a reference, not a bound." if gap.value < 0 else ""
        return (
            f"Recovered gap not resolvable: central training is {abs(gap.value):.3f} {order} sites training "
            f"alone, and must be more than {need:.3f} above (2 standard errors, at least {SMALLEST_GAP})."
            f"{bound}"
        )
    share = (federated.value - alone.value) / gap.value
    text = f"Recovered gap: {100 * share:.0f} % of what central training gains over sites training alone."
    more = " More than 100 % means that it passed central training, which is a reference and not a bound."
    return text + more * (share > 1)


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


def remarks(comparison: Comparison) -> list[str]:
    """What must be said beside the sentence: direction, certainty, gap, single sites, what was left out."""
    found = [_versus(comparison, arm) for arm in ("local", "central", "random")]
    found += [recovered(comparison), _range(comparison), _untrained(comparison)]
    found += [_unseen(comparison, site) for site in comparison.unseen]
    found += [f"{site} is in no mean: {why}." for site, why in comparison.left_out.items()]
    return [text for text in found if text]


def name_of(comparison: Comparison) -> str:
    """The metric in words, such as "linear-probe AUC"."""
    metric = METRICS.get(comparison.metric, comparison.metric.replace("_", " "))
    return f"{PROTOCOLS.get(comparison.protocol, comparison.protocol)} {metric}"


def written(estimate: Estimate, form: str = ".3f") -> str:
    """ "0.812 (95 % 0.790 to 0.834)"."""
    span = bounds(estimate, form)
    return number(estimate.value, form) + (f" (95 % {span})" if span else "")


def bounds(estimate: Estimate, form: str = ".3f") -> str:
    """ "0.790 to 0.834", or "" where the interval is not known."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{number(estimate.low, form)} to {number(estimate.high, form)}"


def number(value: float, form: str = ".3f") -> str:
    """With a minus sign as long as the plus sign."""
    return f"{value:{form}}".replace("-", "−")


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


def _why(lacking: Sequence[str], arms: Sequence[str], protocol: str) -> str:
    if len(lacking) == len(arms):
        instance = UNDEFINED.get(protocol, "one class only in its test split")
        return f"no arm has a value there (for instance, {instance})"
    return f"no value for {', '.join(ARMS[arm] for arm in lacking)}"


def _kind(score: Score) -> str:
    kind, _, owner = score.arm.partition(":")
    return kind if kind in ARMS and (not owner or owner == score.site) else ""


def _estimate(score: Score) -> Estimate | None:
    return None if score.value is None else Estimate(score.value, score.low, score.high)


def _length(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return math.hypot(*known) if len(known) == len(parts) else None
