"""What sites told of their predictions, brought together: counts by arm over the same sites, and curves from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medfl.evaluation import counts
from medfl.evaluation.disclosure import WITHHELD
from medfl.evaluation.metrics import Array
from medfl.report.rows import Counted
from medfl.report.summary import ALL
from medfl.report.tables import Run, ordered_sites
from medfl.report.words import FROZEN, TUNED

SHOWN = ("random", "local", "federated")  # kinds of arms
FEWEST = 20  # images of a class, and of the others, behind a curve: groups of 5 say too little of fewer
POINT = 10  # images behind a point of a calibration curve
GRID = np.linspace(0, 1, 101)  # where curves of several classes are averaged
XY = tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class Pooled:
    """Counts of one kind of arm, added up over `sites`; K classes.

    `histogram` (K, 2, BINS) as the curves take it, groups spread; `totals` (K,) images of each class that are known;
    `confusion` (K, K) images that are known; `hidden` (K, K): a site told less than all.
    """

    classes: tuple[str, ...]
    sites: tuple[str, ...]
    histogram: Array
    totals: NDArray[np.int64]
    confusion: NDArray[np.int64]
    hidden: NDArray[np.bool_]

    @property
    def told(self) -> list[int]:
        """Classes with a curve; of two classes the second, as in the tables."""
        whole = [k for k in range(len(self.classes)) if self.histogram[k].sum(axis=1).min() >= FEWEST]
        return [k for k in whole if k == 1 or len(self.classes) > 2]


def protocols(run: Run) -> list[str]:
    """Those with counts of an arm where it belongs, in the order of the words."""
    listed = dict.fromkeys(row.protocol for row in run.counts)
    order = [*FROZEN, *TUNED]
    known = sorted(listed, key=lambda name: order.index(name) if name in order else len(order))
    return [protocol for protocol in known if _cells(run, protocol)]


def by_arm(run: Run, protocol: str, sites: Sequence[str]) -> dict[str, Pooled]:
    """The counts of each kind of arm, added up over those of the sites that have them."""
    found = _cells(run, protocol)
    cells = {kind: [found[kind, site] for site in sites if (kind, site) in found] for kind in SHOWN}
    return {kind: _pooled(rows) for kind, rows in cells.items() if rows}


def shared_sites(run: Run, protocol: str) -> list[str]:
    """The sites that trained and have counts of every kind of arm that any site has."""
    found = _cells(run, protocol)
    kinds = [kind for kind in SHOWN if any(kind == known for known, _ in found)]
    seen = [site for site in ordered_sites(run) if site not in run.unseen]
    return [site for site in seen if all((kind, site) in found for kind in kinds)]


def sites_with_counts(run: Run, protocol: str) -> list[str]:
    known = {site for _, site in _cells(run, protocol)}
    return [site for site in ordered_sites(run) if site in known]


def roc(pooled: Pooled) -> XY | None:
    """False and true positive rate, the mean over the classes; None where nothing was told."""
    found = [counts.roc(pooled.histogram[k]) for k in pooled.told]
    if not found:
        return None
    x, y = _mean(found)
    return np.append(0.0, x), np.append(0.0, y)  # a mean need not begin there


def precision_recall(pooled: Pooled) -> XY | None:
    """Recall and precision, the mean over the classes."""
    found = [counts.precision_recall(pooled.histogram[k]) for k in pooled.told]
    return _mean(found) if found else None


def calibration(pooled: Pooled) -> XY | None:
    """Mean predicted probability and observed share where enough images are, the classes taken together."""
    if not pooled.told:
        return None
    x, y, images = counts.calibration(pooled.histogram[pooled.told].sum(axis=0))
    return x[images >= POINT], y[images >= POINT]


def _mean(curves: Sequence[XY]) -> XY:
    """One curve as it is; of several the mean height."""
    if len(curves) == 1:
        return curves[0]
    return GRID, np.mean([np.interp(GRID, x, y) for x, y in curves], axis=0)


def _cells(run: Run, protocol: str) -> Mapping[tuple[str, str], Counted]:
    """(kind of arm, site) -> its counts, of one list of classes; a lone site's arm at its own site only."""
    rows = [row for row in run.counts if (row.protocol, row.label_fraction) == (protocol, ALL)]
    found = {}
    for row in rows:
        kind, _, owner = row.arm.partition(":")
        if row.classes == rows[0].classes and (not owner or owner == row.site):
            found[kind, row.site] = row
    return found


def _pooled(rows: Sequence[Counted]) -> Pooled:
    confusions = np.array([row.confusion for row in rows])  # (sites, K, K)
    hidden = confusions == WITHHELD
    return Pooled(
        classes=rows[0].classes,
        sites=tuple(row.site for row in rows),
        histogram=np.sum([counts.spread(row.histogram.astype(np.float64), least=row.least) for row in rows], axis=0),
        totals=np.sum([row.histogram[:, 1].sum(axis=1) for row in rows], axis=0),
        confusion=np.where(hidden, 0, confusions).sum(axis=0),
        hidden=hidden.any(axis=0),
    )
