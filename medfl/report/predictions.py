"""The section on predictions: curves, violins and confusion matrices, from counts that the sites told."""

from collections.abc import Callable, Mapping

from medfl.evaluation import counts
from medfl.report import charts, figures, predicted
from medfl.report.cells import Section
from medfl.report.charts import Corner, Curve, Violin
from medfl.report.figures import ARM_INKS
from medfl.report.panels import COLOURS, Drawn
from medfl.report.predicted import XY, Pooled
from medfl.report.summary import Comparison
from medfl.report.tables import Run
from medfl.report.transfer import DARK
from medfl.report.words import FROZEN, TITLES, TUNED

MOST_SITES = 12  # with figures of their own
CURVES: dict[
    str, tuple[Callable[[Pooled], XY | None], str, str, bool, Corner]
] = {  # curve, axes, diagonal, free corner
    "ROC": (predicted.roc, "false positive rate", "true positive rate", True, "lower right"),
    "Precision and recall": (predicted.precision_recall, "recall", "precision", False, "lower left"),
    "Calibration": (predicted.calibration, "mean predicted probability", "observed share", True, "upper left"),
}


def section(run: Run, main: Comparison) -> Section:
    """For the template; {} where no site told counts."""
    known = predicted.protocols(run)
    first = [main.protocol] if main.protocol in known else known[:1]
    if not first:
        return {}
    shared, sites = predicted.shared_sites(run, first[0]), predicted.sites_with_counts(run, first[0])
    shown = predicted.by_arm(run, first[0], shared)
    apart = {site: predicted.by_arm(run, first[0], [site]) for site in shared}
    silent = [site for site, found in apart.items() if not any(p.histogram.any() for p in found.values())]
    told = [site for site, found in apart.items() if not any(p.hidden.any() for p in found.values())]
    return {
        "protocol": _title(first[0]),
        "over": len(shared) - len(silent),
        "silent": silent,
        "fewest": predicted.FEWEST,
        "least": max(row.least for row in run.counts),
        "classes": _classes(shown),
        "figures": _figures(shown),
        "violins": _violins(shown),
        "confusions": _confusions(predicted.by_arm(run, first[0], told or shared)),
        "withheld": [site for site in shared if site not in told] if told else [],
        "by_class": _by_class(shown.get("federated")),
        "sites": [(site, _at(run, first[0], site)) for site in sites[:MOST_SITES]],
        "not_drawn": sites[MOST_SITES:],
        "others": [(_title(name), _pooled_figures(run, name)) for name in known if name not in first],
    }


def _title(protocol: str) -> str:
    return {**FROZEN, **TUNED}.get(protocol, protocol)


def _classes(shown: Mapping[str, Pooled]) -> list[str]:
    return list(next(iter(shown.values())).classes) if shown else []


def _at(run: Run, protocol: str, site: str) -> Section:
    shown = predicted.by_arm(run, protocol, [site])
    return {"figures": _figures(shown), "confusions": _confusions(shown)}


def _pooled_figures(run: Run, protocol: str) -> list[Drawn]:
    return _figures(predicted.by_arm(run, protocol, predicted.shared_sites(run, protocol)))


def _figures(shown: Mapping[str, Pooled]) -> list[Drawn]:
    """Each kind of curve that something was told for, the arms in one panel."""
    found = []
    for title, (curve, x, y, diagonal, corner) in CURVES.items():
        points = {arm: known for arm, pooled in shown.items() if (known := curve(pooled))}
        lines = [
            Curve(TITLES[arm], *known, ARM_INKS[arm], strong=arm == "federated", marked=title == "Calibration")
            for arm, known in points.items()
        ]
        if lines:
            found.append(Drawn(title, charts.square(title, x, y, lines, diagonal=diagonal, legend=corner)))
    return found


def _by_class(pooled: Pooled | None) -> list[Drawn]:
    """The ROC curves of single classes in the federated arm, where there are more than two."""
    if pooled is None or len(pooled.told) < 2:
        return []
    lines = [
        Curve(figures.short(pooled.classes[k]), *counts.roc(pooled.histogram[k]), _ink(k), strong=False)
        for k in pooled.told
    ]
    _, x, y, diagonal, corner = CURVES["ROC"]
    return [
        Drawn("Federated, ROC by class", charts.square("ROC by class", x, y, lines, diagonal=diagonal, legend=corner))
    ]


def _ink(place: int) -> str:
    return f"s{place + 1}" if place < COLOURS else "muted"


def _violins(shown: Mapping[str, Pooled]) -> list[Drawn]:
    """By true class the probability of the second of two classes, or of the true one of several."""
    found = []
    for arm, pooled in shown.items():
        two = len(pooled.classes) == 2
        rows = {k: pooled.histogram[1, k] if two else pooled.histogram[k, 1] for k in range(len(pooled.classes))}
        parts = [Violin(pooled.classes[k], counts.edges(), row, _ink(k)) for k, row in rows.items() if row.any()]
        unit = f"probability of {pooled.classes[1]}" if two else "probability of the true class"
        if parts:
            found.append(Drawn(TITLES[arm], charts.violins(TITLES[arm], unit, parts)))
    return found


def _confusions(shown: Mapping[str, Pooled]) -> list[Section]:
    """True class by named class, with each cell's share of its row."""
    return [
        {
            "title": TITLES[arm],
            "classes": pooled.classes,
            "rows": [
                (name, [_cell(pooled, k, at) for at in range(len(pooled.classes))])
                for k, name in enumerate(pooled.classes)
            ],
        }
        for arm, pooled in shown.items()
    ]


def _cell(pooled: Pooled, true: int, named: int) -> Section:
    """A number that a site withheld is never guessed: what the other sites told is a lower bound."""
    number, total = int(pooled.confusion[true, named]), int(pooled.totals[true])
    if pooled.hidden[true, named]:
        text = f"≥ {number:,}" if number else "withheld"
        return {"value": text, "share": None, "class": " ".join(["own"] * (true == named) + ["muted"])}
    share = round(100 * number / total) if total else None
    dark = share is not None and share > DARK
    return {"value": f"{number:,}", "share": share, "class": " ".join(["own"] * (true == named) + ["strong"] * dark)}
