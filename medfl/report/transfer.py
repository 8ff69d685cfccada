"""The section on transfer: what was trained at one site and tested at another, as heat maps with their summaries."""

from collections.abc import Collection, Mapping, Sequence

from medfl.report.cells import NONE, Section
from medfl.report.figures import padded
from medfl.report.sentences import matrix, recovered_cross, recovered_own
from medfl.report.summary import SIGNED, Estimate, alike, bounds, difference, mean, number, written
from medfl.report.tables import Run, ordered_sites
from medfl.report.words import TITLES, metric_name

KINDS = {  # kind -> (heading, what a cell is)
    "representation": (
        "Representation",
        "of an encoder trained on one site's images (row), with a probe trained and tested at another (column)",
    ),
    "end_to_end": (
        "End to end",
        "of encoder and head trained at one site (row), used as they are on another's test images (column)",
    ),
}
DARK = 65  # per cent of the heat scale from which light text reads better than dark
Cells = Mapping[tuple[str, str], Estimate]  # (trained on, tested on)


def section(run: Run) -> Section:
    """Every matrix of transfer.csv, with one colour scale for each metric."""
    found = {
        (kind, metric): cells
        for kind in KINDS
        for metric in dict.fromkeys(row.metric for row in run.transfers if row.kind == kind)
        if (cells := matrix(run.transfers, kind, metric))
    }
    shared = {metric: [kind for kind, other in found if other == metric] for _, metric in found}
    scales = {
        metric: padded([cell.value for kind in kinds for cell in found[kind, metric].values()])
        for metric, kinds in shared.items()
    }
    return {
        "matrices": [_matrix(run, kind, metric, cells, scales[metric]) for (kind, metric), cells in found.items()],
        "shared": [metric_name(metric) for metric, kinds in shared.items() if len(kinds) > 1],
    }


def _matrix(run: Run, kind: str, metric: str, cells: Cells, scale: tuple[float, float]) -> Section:
    """One heat map: the sites, then the arms of all sites."""
    asked = [row for row in run.transfers if (row.kind, row.metric) == (kind, metric)]
    columns = [site for site in ordered_sites(run) if any(row.tested_on == site for row in asked)]
    origins = _origins(run, {row.trained_on for row in asked})
    heading, words = KINDS[kind]
    seen = [site for site in columns if site not in run.unseen]
    return {
        "heading": heading,
        "note": f"{metric_name(metric)[:1].upper()}{metric_name(metric)[1:]} {words}.",
        "columns": [(site, "unseen" if site in run.unseen else "") for site in columns],
        "rows": [
            {
                "name": TITLES.get(origin, origin),
                "arm": origin in TITLES,
                "cells": [_heat(cells.get((origin, site)), scale, own=origin == site) for site in columns],
            }
            for origin in origins
        ],
        "facts": _facts(
            cells, [o for o in origins if o not in TITLES], seen, [site for site in columns if site in run.unseen]
        ),
        "gaps": [text for text in (recovered_own(cells, seen), recovered_cross(cells, seen)) if text],
    }


def _origins(run: Run, trained: Collection[str]) -> list[str]:
    """In order: the sites, those too that have no score of their own, then the arms of all sites."""
    known = ordered_sites(run)
    return [name for name in (*known, *sorted({*trained} - {*known, *TITLES}), *TITLES) if name in trained]


def _heat(cell: Estimate | None, scale: tuple[float, float], *, own: bool) -> Section:
    if cell is None:
        return {"value": NONE, "heat": None, "class": "", "interval": ""}
    low, high = scale
    share = round(100 * (cell.value - low) / (high - low))
    return {
        "value": f"{cell.value:.3f}",
        "heat": share,
        "class": " ".join(["own"] * own + ["strong"] * (share > DARK)),
        "interval": bounds(cell),
    }


def _facts(cells: Cells, trained: Sequence[str], sites: Sequence[str], unseen: Sequence[str]) -> list[tuple[str, str]]:
    """The summary of a matrix over the sites that took part; those that did not are told apart at the end.

    Args:
        trained: sites with an encoder of their own; `sites` and `unseen` are tested.
    """
    own = {site: cells[site, site] for site in sites if (site, site) in cells}
    others = {site: found for site in sites if (found := _others(cells, trained, site))}
    diagonal, off = mean(list(own.values())), mean([m for o in others.values() if (m := alike(list(o.values())))])
    federated = {site: cells["federated", site] for site in sites if ("federated", site) in cells}
    best = {
        site: max((*found.values(), *_own(own, site)), key=lambda cell: cell.value) for site, found in others.items()
    }
    gap = difference(diagonal, off) if diagonal and off else None
    return [
        (name, text)
        for name, text in (
            ("Own site (diagonal mean)", written(diagonal) if diagonal else ""),
            ("Other sites (off-diagonal mean)", written(off) if off else ""),
            ("Gap, own minus other sites", written(gap, SIGNED) if gap else ""),
            ("Asymmetry, mean of |there − back|", _asymmetry(cells, sites)),
            ("Benefit of federated over the site's own", _differences(federated, own)),
            ("Federated minus the best single site", _differences(federated, best)),
            ("Worst site of federated", _worst(federated)),
            *((f"{site}, which took no part", _outside(cells, trained, site)) for site in unseen),
        )
        if text
    ]


def _others(cells: Cells, trained: Sequence[str], at: str) -> dict[str, Estimate]:
    """What was trained at the other sites, tested at this one."""
    return {site: cells[site, at] for site in trained if site != at and (site, at) in cells}


def _own(own: Mapping[str, Estimate], site: str) -> list[Estimate]:
    return [own[site]] if site in own else []


def _asymmetry(cells: Cells, sites: Sequence[str]) -> str:
    """Mean |T_ij - T_ji| over the pairs of sites."""
    pairs = [(a, b) for at, a in enumerate(sites) for b in sites[at + 1 :] if (a, b) in cells and (b, a) in cells]
    apart = [abs(cells[a, b].value - cells[b, a].value) for a, b in pairs]
    return f"{sum(apart) / len(apart):.3f}" if apart else ""


def _differences(first: Mapping[str, Estimate], second: Mapping[str, Estimate]) -> str:
    """ "site-1 +0.021, site-2 −0.004"."""
    both = [site for site in first if site in second]
    return ", ".join(f"{site} {number(first[site].value - second[site].value, SIGNED)}" for site in both)


def _worst(federated: Mapping[str, Estimate]) -> str:
    if not federated:
        return ""
    worst = min(federated, key=lambda site: federated[site].value)
    return f"{worst}, {federated[worst].value:.3f}"


def _outside(cells: Cells, trained: Sequence[str], at: str) -> str:
    """At a site that took no part: federated, and the best of the sites."""
    single = _others(cells, trained, at)
    found = [f"federated {cells['federated', at].value:.3f}"] if ("federated", at) in cells else []
    if single:
        best = max(single, key=lambda site: single[site].value)
        found.append(f"best single site {single[best].value:.3f} ({best})")
    return ", ".join(found)
