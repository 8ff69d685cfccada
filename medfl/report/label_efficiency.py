"""Label efficiency: the main score over the share of labels that a site's training could read, by protocol and arm."""

from collections.abc import Mapping
from dataclasses import dataclass

from medfl.report import charts, summary
from medfl.report.cells import Section, row
from medfl.report.figures import ARM_INKS, padded
from medfl.report.panels import Drawn
from medfl.report.summary import Estimate, compare_arms, mean
from medfl.report.tables import Run
from medfl.report.words import ARMS, FROZEN, TITLES, TUNED, metric_name, percent


@dataclass(frozen=True)
class Measured:
    """One protocol's main metric by share of the labels; the same sites are behind all means."""

    protocol: str
    metric: str
    sites: tuple[str, ...]
    means: Mapping[str, Mapping[float, Estimate]]  # arm -> share -> mean over the sites

    @property
    def ends(self) -> list[float]:
        """All that a figure must have room for."""
        known = [estimate for line in self.means.values() for estimate in line.values()]
        return [end for e in known for end in (e.value, e.low, e.high) if end is not None]


def curves(run: Run) -> list[Section]:
    """A figure and its numbers for each protocol with more than one share; one scale for each metric."""
    found = [part for protocol in (*FROZEN, *TUNED) if (part := measure(run, protocol))]
    limits = {
        metric: padded([end for part in found if part.metric == metric for end in part.ends])
        for metric in {part.metric for part in found}
    }
    return [_drawn(part, limits[part.metric]) for part in found]


def measure(run: Run, protocol: str) -> Measured | None:
    """None with fewer than two shares, or where no site has a value for every arm at each of them."""
    metric = summary.main_metric(run, protocol)
    shares = summary.fractions(run, protocol, metric)
    tables = [table for share in shares if (table := compare_arms(run, protocol, metric, share)).cells]
    if len(tables) < 2:
        return None
    sites = tuple(site for site in tables[0].compared if all(site in table.compared for table in tables))
    means = {
        arm: {t.fraction: found for t in tables if arm in t.arms and (found := mean([t.cells[arm, s] for s in sites]))}
        for arm in ARMS
    }
    return Measured(protocol, metric, sites, {arm: line for arm, line in means.items() if line}) if sites else None


def _drawn(part: Measured, limits: tuple[float, float]) -> Section:
    title = {**FROZEN, **TUNED}[part.protocol]
    over = f"Mean over {len(part.sites)} site{'s' * (len(part.sites) != 1)}."
    lines = [
        charts.Efficiency(TITLES[arm], dict(line), ARM_INKS[arm], arm == "federated")
        for arm, line in part.means.items()
    ]
    shares = sorted({share for line in part.means.values() for share in line})
    return {
        "figure": Drawn(title, charts.shares(title, metric_name(part.metric), lines, limits), over),
        "heading": title,
        "columns": [TITLES[arm] for arm in part.means],
        "rows": [row(percent(share), [line.get(share) for line in part.means.values()]) for share in shares],
    }
