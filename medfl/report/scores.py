"""The score sections: arms beside each other, and the transfer matrix, as plain values for the template."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medfl.report import summary
from medfl.report.figures import Dot, intervals, padded
from medfl.report.panels import Drawn
from medfl.report.rows import Transfer
from medfl.report.summary import SIGNED, Comparison, Estimate, bounds, number
from medfl.report.tables import Run, ordered_sites

TITLES = {"random": "Untrained", "local": "Alone", "federated": "Federated", "central": "Central"}
NONE = "–"
DARK = 65  # per cent of the heat scale from which light text reads better than dark
COUNTS = ("n_test", "constant_accuracy")  # not scores of an arm
REFERENCE = "average"  # protocol: the mean of the sources in the place of the fused image
VOLUMES = ("fusion", REFERENCE, "segmentation")  # protocols with a section of their own
Section = dict[str, Any]


def arms(run: Run, main: Comparison) -> Section:
    """AUC by site and arm with intervals, all scores as means, accuracy beside the constant predictor."""
    tested = {
        s.site: f"{s.value:.0f}"
        for s in run.scores
        if (s.protocol, s.metric) == (main.protocol, "n_test") and s.value is not None
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


def transfer(run: Run) -> Section:
    """The matrix, trained on by tested on, and its summary."""
    cells = {(t.trained_on, t.tested_on): t for t in run.transfers if t.kind == "representation" and t.metric == "auc"}
    known = [t.value for t in cells.values() if t.value is not None]
    columns = [site for site in ordered_sites(run) if any(site == tested for _, tested in cells)]
    origins = [*columns, "federated", "central", "random"]
    present = [origin for origin in origins if any(origin == trained for trained, _ in cells)]
    low, high = padded(known) if known else (0.0, 1.0)
    rows = [
        {
            "name": TITLES.get(origin, origin),
            "arm": origin in TITLES,
            "cells": [_heat(cells.get((origin, site)), low, high, own=origin == site) for site in columns],
        }
        for origin in present
    ]
    return {"columns": columns, "rows": rows, "facts": _transfer_facts(cells, columns)}


def cell(known: Estimate | None, form: str = ".3f") -> Section:
    """A number and its interval as text; the sign counts for differences."""
    if known is None:
        return {"value": NONE, "interval": ""}
    sign = known.sign if form == SIGNED else 0
    return {"value": number(known.value, form), "interval": bounds(known, form), "sign": sign}


def _site_row(main: Comparison, site: str, tested: Mapping[str, str]) -> Section:
    benefit = main.benefit(site)
    return {
        "name": site,
        "test": tested.get(site, NONE),
        "cells": [cell(main.cells.get((arm, site))) for arm in main.arms],
        "gain": cell(benefit, SIGNED) if benefit else None,
        "note": "unseen" if site in main.unseen else "in no mean" if site in main.left_out else "",
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
    """Every protocol and metric but those of volumes, as means over the sites."""
    pairs = {(s.protocol, s.metric) for s in run.scores if s.metric not in COUNTS and s.protocol not in VOLUMES}
    found = []
    for protocol, metric in sorted(pairs, key=lambda pair: (pair[0] != "linear", pair)):
        scores = summary.compare_arms(run, protocol, metric)
        means = [scores.mean(arm) for arm in TITLES]
        cells = [NONE if known is None else f"{known.value:.3f}" for known in means]
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


def _heat(cell: Transfer | None, low: float, high: float, *, own: bool) -> Section:
    if cell is None or cell.value is None:
        return {"value": NONE, "heat": None, "class": "", "interval": ""}
    share = round(100 * (cell.value - low) / (high - low))
    return {
        "value": f"{cell.value:.3f}",
        "heat": share,
        "class": " ".join(["own"] * own + ["strong"] * (share > DARK)),
        "interval": bounds(Estimate(cell.value, cell.low, cell.high)),
    }


def _transfer_facts(cells: Mapping[tuple[str, str], Transfer], columns: Sequence[str]) -> list[tuple[str, str]]:
    known = {key: cell.value for key, cell in cells.items() if cell.value is not None}
    diagonal = [known[site, site] for site in columns if (site, site) in known]
    others = [known[a, b] for a in columns for b in columns if a != b and (a, b) in known]
    federated = {site: known["federated", site] for site in columns if ("federated", site) in known}
    gains = {site: value - known[site, site] for site, value in federated.items() if (site, site) in known}
    facts = []
    if diagonal:
        facts.append(("Own site (diagonal mean)", f"{math.fsum(diagonal) / len(diagonal):.3f}"))
    if others:
        facts.append(("Other sites (off-diagonal mean)", f"{math.fsum(others) / len(others):.3f}"))
    if gains:
        listed = ", ".join(f"{site} {number(gain, SIGNED)}" for site, gain in gains.items())
        facts.append(("Benefit of the federated encoder over the site's own", listed))
    if federated:
        worst = min(federated, key=lambda site: federated[site])
        facts.append(("Worst site of the federated encoder", f"{worst}, {federated[worst]:.3f}"))
    return facts
