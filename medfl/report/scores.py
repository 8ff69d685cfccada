"""The section on the arms: their scores beside each other, as plain values for the template."""

from collections.abc import Mapping

from medfl.report import summary
from medfl.report.cells import NONE, Section, cell, tag
from medfl.report.figures import Dot, intervals, padded
from medfl.report.panels import Drawn
from medfl.report.summary import SIGNED, Comparison, Estimate
from medfl.report.tables import Run
from medfl.report.words import TITLES, TUNED

COUNTS = ("n_test", "constant_accuracy")  # not scores of an arm
REFERENCE = "average"  # protocol: the mean of the sources in the place of the fused image
VOLUMES = ("fusion", REFERENCE, "segmentation")  # protocols of volumes, with a section of their own


def arms(run: Run, main: Comparison) -> Section:
    """AUC by site and arm with intervals, all scores as means, accuracy beside the constant predictor."""
    tested = {
        s.site: f"{s.value:.0f}"
        for s in run.scores
        if (s.protocol, s.metric, s.label_fraction) == (main.protocol, "n_test", main.fraction) and s.value is not None
    }
    rows = [_site_row(main, site, tested) for site in (*main.compared, *main.left_out, *main.unseen)]
    means = [main.mean(arm) for arm in main.arms]
    gain = _mean_gain(main)
    return {
        "arms": [TITLES[arm] for arm in main.arms],
        "rows": rows,
        "mean": [cell(known) for known in means] if main.compared else [],
        "mean_gain": cell(gain, SIGNED) if gain else None,
        "over": len(main.compared),
        "figures": _dots(main),
        "titles": list(TITLES.values()),
        "others": _others(run),
        "accuracy": _accuracy(run),
        "metric": summary.name_of(main)[:1].upper() + summary.name_of(main)[1:],
    }


def _site_row(main: Comparison, site: str, tested: Mapping[str, str]) -> Section:
    benefit = main.benefit(site)
    return {
        "name": site,
        "test": tested.get(site, NONE),
        "cells": [cell(main.cells.get((arm, site))) for arm in main.arms],
        "gain": cell(benefit, SIGNED) if benefit else None,
        "note": tag(main, site),
    }


def _mean_gain(main: Comparison) -> Estimate | None:
    federated, alone = main.mean("federated"), main.mean("local")
    return summary.difference(federated, alone) if federated and alone else None


def _dots(main: Comparison) -> list[Drawn]:
    """One panel for the mean and one per site, on one scale."""
    columns = [("Mean over sites", {arm: main.mean(arm) for arm in main.arms})] if main.compared else []
    order = (*main.compared, *main.left_out, *main.unseen)
    columns += [(site, {arm: main.cells.get((arm, site)) for arm in main.arms}) for site in order]
    columns = [(title, cells) for title, cells in columns if any(cells.values())]
    known = [cell for _, cells in columns for cell in cells.values() if cell]
    if not known:
        return []
    limits = padded([end for c in known for end in (c.value, c.low, c.high) if end is not None])
    unit = summary.name_of(main)
    return [
        Drawn(title, intervals(title, unit, [_dot(arm, cell) for arm, cell in cells.items()], limits))
        for title, cells in columns
    ]


def _dot(arm: str, known: Estimate | None) -> Dot:
    ink = "accent" if arm == "federated" else "ink"
    if known is None:
        return Dot(TITLES[arm], None, None, None, ink)
    return Dot(TITLES[arm], known.value, known.low, known.high, ink)


def _others(run: Run) -> list[Section]:
    """Every metric of the frozen encoder's protocols, as means over the sites."""
    apart = (*VOLUMES, *TUNED)
    written = [s for s in run.scores if s.metric not in COUNTS and s.label_fraction == summary.ALL]
    pairs = {(s.protocol, s.metric) for s in written if s.protocol not in apart}
    found = []
    for protocol, metric in sorted(pairs, key=lambda pair: (pair[0] != "linear", pair)):
        scores = summary.compare_arms(run, protocol, metric)
        means = [scores.mean(arm) for arm in TITLES]
        cells = [NONE if known is None else f"{known.value:.3f}" for known in means]
        if scores.cells:
            found.append({"name": summary.name_of(scores), "cells": cells, "over": len(scores.compared)})
    return found


def _accuracy(run: Run) -> Section:
    """Linear-probe accuracy per site beside the accuracy of always naming the most frequent class."""
    scores = summary.compare_arms(run, "linear", "accuracy")
    constant = {s.site: s.value for s in run.scores if s.metric == "constant_accuracy" and s.value is not None}
    rows = []
    for site in (*scores.compared, *scores.left_out, *scores.unseen):
        floor = constant.get(site)
        cells = [_beside(scores.cells.get((arm, site)), floor) for arm in scores.arms]
        rows.append({"name": site, "constant": NONE if floor is None else f"{floor:.3f}", "cells": cells})
    return {
        "arms": [TITLES[arm] for arm in scores.arms],
        "rows": rows,
        "any_low": any(low for r in rows for _, low in r["cells"]),
    }


def _beside(known: Estimate | None, floor: float | None) -> tuple[str, bool]:
    """The accuracy, and whether it is no better than the constant predictor's."""
    if known is None:
        return NONE, False
    return f"{known.value:.3f}", floor is not None and known.value <= floor
