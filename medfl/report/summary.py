"""What the scores of a run say: cells, means over sites and differences between arms, with their intervals.

Intervals of a mean or a difference are put together from the cells' own intervals by MOVER (Zou & Donner
2008, Statistics in Medicine 27:1693), as if the cells were independent. Arms share their test patients, so
their differences are known somewhat better than stated here: the error is on the careful side.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from medfl.report.rows import Score
from medfl.report.tables import Run, ordered_sites
from medfl.report.words import ARMS, HEADLINES, MAIN, PROTOCOLS, metric_name

SIGNED = "+.3f"
ALL = 1.0  # label fraction: every label that the sites have
UNDEFINED = {  # start of a metric, or protocol -> an instance of why a site has no value
    "dice": "no mask in its test split",
    "fusion": "no test image of two modalities",
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
    fraction: float
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


def alike(parts: Sequence[Estimate]) -> Estimate | None:
    """The mean of scores on the same test patients, whose errors go together: its interval is the mean interval."""
    if not parts:
        return None
    lows, highs = [part.low for part in parts], [part.high for part in parts]
    value = fmean(part.value for part in parts)
    if None in lows or None in highs:
        return Estimate(value)
    return Estimate(value, fmean(low for low in lows if low is not None), fmean(h for h in highs if h is not None))


def compare_arms(run: Run, protocol: str, metric: str, fraction: float = ALL) -> Comparison:
    """The cells of one metric. A site counts in the means only if every evaluated arm has a value there.

    `local:<site>` is read at that site only.
    """
    scores = [s for s in run.scores if (s.protocol, s.metric, s.label_fraction) == (protocol, metric, fraction)]
    cells = {(kind, s.site): estimate for s in scores if (kind := _kind(s)) and (estimate := _estimate(s))}
    arms = tuple(arm for arm in ARMS if any(arm == kind for kind, _ in cells))
    reported = {s.site for s in run.scores} if scores else set()  # a site without this metric is named, not lost
    tested = [site for site in ordered_sites(run) if site in reported]
    short = {site: [arm for arm in arms if (arm, site) not in cells] for site in tested if site not in run.unseen}
    return Comparison(
        protocol=protocol,
        metric=metric,
        fraction=fraction,
        cells=cells,
        arms=arms,
        compared=tuple(site for site, lacking in short.items() if not lacking and arms),
        unseen=tuple(site for site in tested if site in run.unseen),
        left_out={
            site: _why(lacking, arms, protocol, metric) for site, lacking in short.items() if lacking or not arms
        },
    )


def main_metric(run: Run, protocol: str) -> str:
    """The metric that leads a protocol: the first of `MAIN` with a value, or ""."""
    known = {s.metric for s in run.scores if s.protocol == protocol and s.value is not None}
    return next((metric for metric in MAIN if metric in known), "")


def fractions(run: Run, protocol: str, metric: str) -> list[float]:
    """Shares of the labels that were measured, from few to all."""
    known = {s.label_fraction for s in run.scores if (s.protocol, s.metric) == (protocol, metric)}
    return sorted(known)


def headline(run: Run) -> Comparison:
    """The comparison behind the result: the first of `HEADLINES` that has a value."""
    found = [compare_arms(run, protocol, metric) for protocol, metric in HEADLINES]
    return next((comparison for comparison in found if comparison.cells), found[0])


def name_of(comparison: Comparison) -> str:
    """The metric in words, such as "linear-probe AUC"."""
    return f"{PROTOCOLS.get(comparison.protocol, comparison.protocol)} {metric_name(comparison.metric)}"


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
    """With a minus sign as long as the plus sign, and none before 0."""
    text = f"{value:{form}}"
    return (text if float(text) else f"{0:{form}}").replace("-", "−")


def _why(lacking: Sequence[str], arms: Sequence[str], protocol: str, metric: str) -> str:
    if len(lacking) == len(arms):
        kind = metric.partition("_")[0]
        instance = UNDEFINED.get(kind, UNDEFINED.get(protocol, "one class only in its test split"))
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
