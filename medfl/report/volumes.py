"""The section on fused and segmented images: who holds what, scores by arm and region, and the sites' own pictures."""

import base64
from collections.abc import Iterable, Sequence

from medfl.report import summary
from medfl.report.pictures import CAPTIONS, PLACE
from medfl.report.scores import NONE, REFERENCE, TITLES, VOLUMES, Section, cell
from medfl.report.summary import Comparison, Estimate
from medfl.report.tables import Run, ordered_sites

REGIONS = {"wt": "Whole tumour", "tc": "Tumour core", "et": "Enhancing tumour"}
MEASURES = {  # name with the region left open -> words
    "dice_{}_present": "Dice, where there is such tumour",
    "sensitivity_{}": "Sensitivity",
    "specificity_{}": "Specificity",
    "accuracy_{}": "Accuracy",
    "hd95_{}": "HD95, mm (lower is better)",
    "hd95_{}_present": "HD95, mm, where there is such tumour",
}
FORMS = {"hd95": ".2f", "psnr": ".2f"}  # of numbers, where three decimals are too many
FUSION = {
    "ssim": ("SSIM", "likeness of structure to each source, 1 is equal"),
    "psnr": ("PSNR", "closeness to each source in dB; 20 is a distance of a tenth of the grey scale"),
    "nmi": ("NMI", "information shared with each source, from 1 (none) to 2 (all)"),
    "sfr": ("SFR", "fine detail, as a share of the sources' own; above 1 is sharper than they are"),
    "rsfe": ("rSFe", "fine detail against the sharpest source at every place; 0 is as much"),
    "fsim": ("FSIM", "likeness of edges in slices, 1 is equal"),
    "vifp": ("VIFP", "visual information kept in slices, 1 is all"),
    "ifcp": ("IFC", "information shared in slices, approximated by pixels; higher is more"),
}


def section(run: Run) -> Section:
    """For the template; {} where no modalities are told, no such score was written and no picture is there."""
    modalities = list(dict.fromkeys(name for site in run.sites for name in site.modalities))
    measured = any(score.protocol in VOLUMES for score in run.scores)
    if not (modalities or measured or run.pictures):
        return {}
    return {
        "modalities": modalities,
        "owners": _owners(run, modalities),
        "fusion": _fusion(run),
        "segmentation": _segmentation(run),
        "pictures": _pictures(run),
        "place": PLACE.as_posix(),
    }


def _owners(run: Run, modalities: Sequence[str]) -> list[Section]:
    """Site by site the training images that have each modality, and those with a mask."""
    return [
        {
            "name": site.name,
            "tag": "unseen" if site.held_out else "",
            "counts": [_count(site.modalities.get(name, 0)) for name in modalities],
            "labelled": _count(site.labelled),
        }
        for site in run.sites
        if site.modalities
    ]


def _fusion(run: Run) -> Section:
    """The first measure by site and all measures as means, each beside that of the mean of the sources."""
    scores = {name: found for name in FUSION if (found := summary.compare_arms(run, "fusion", name)).cells}
    if not scores:
        return {}
    plain = {name: summary.compare_arms(run, REFERENCE, name) for name in scores}
    name, first = next(iter(scores.items()))
    arms = first.arms
    rows = [
        _row(site, [_of_any(plain[name], site), *(first.cells.get((arm, site)) for arm in arms)], _tag(first, site))
        for site in _sites(first)
    ]
    means = {measure: [_of_any(plain[measure], ""), *(scores[measure].mean(arm) for arm in arms)] for measure in scores}
    return {
        "metric": FUSION[name][0],
        "columns": ["Mean of the sources", *(TITLES[arm] for arm in arms)],
        "sites": [*rows, _row("Mean", means[name], whole=True)],
        "means": [_row(FUSION[n][0], found, form=FORMS.get(n, ".3f")) for n, found in means.items()],
        "over": len(first.compared),
        "readings": [FUSION[measure] for measure in scores],
    }


def _segmentation(run: Run) -> Section:
    """Dice by region and site, and the other measures by region as means over the sites."""
    dice = {region: summary.compare_arms(run, "segmentation", f"dice_{region}") for region in REGIONS}
    dice = {region: scores for region, scores in dice.items() if scores.cells}
    if not dice:
        return {}
    first = next(iter(dice.values()))
    return {
        "columns": [TITLES[arm] for arm in first.arms],
        "sites": [
            row for region, scores in dice.items() for row in _grouped(REGIONS[region], _dice(scores, first.arms))
        ],
        "means": [
            row for form, words in MEASURES.items() for row in _grouped(words, _measured(run, form, dice, first.arms))
        ],
        "over": len(first.compared),
    }


def _dice(scores: Comparison, arms: Sequence[str]) -> list[Section]:
    """The sites of one region, then their mean."""
    rows = [_row(site, [scores.cells.get((arm, site)) for arm in arms], _tag(scores, site)) for site in _sites(scores)]
    return [*rows, _row("Mean", [scores.mean(arm) for arm in arms], whole=True)]


def _measured(run: Run, form: str, regions: Iterable[str], arms: Sequence[str]) -> list[Section]:
    """One measure in every region, as means over the sites."""
    found = {region: summary.compare_arms(run, "segmentation", form.format(region)) for region in regions}
    return [
        _row(REGIONS[region], [scores.mean(arm) for arm in arms], form=FORMS.get(form.partition("_")[0], ".3f"))
        for region, scores in found.items()
        if scores.cells
    ]


def _pictures(run: Run) -> list[Section]:
    """Site by site its pictures, as addresses that hold the picture itself."""
    order = ordered_sites(run)
    sites = dict.fromkeys(picture.site for picture in run.pictures)
    return [
        {
            "site": site,
            "arm": next(picture.arm for picture in run.pictures if picture.site == site),
            "figures": [
                (CAPTIONS[picture.name], f"data:image/png;base64,{base64.b64encode(picture.content).decode()}")
                for picture in run.pictures
                if picture.site == site
            ],
        }
        for site in sorted(sites, key=lambda site: (order.index(site) if site in order else len(order), site))
    ]


def _row(
    name: str, estimates: Sequence[Estimate | None], tag: str = "", *, form: str = ".3f", whole: bool = False
) -> Section:
    """A row of a table; `whole`: it sums up those above."""
    cells = [cell(known, form) for known in estimates]
    return {"name": name, "tag": tag, "cells": cells, "whole": whole, "group": "", "height": 1}


def _grouped(title: str, rows: Sequence[Section]) -> list[Section]:
    """The rows under one heading at their left."""
    return [{**row, "group": title, "height": 0 if at else len(rows)} for at, row in enumerate(rows)]


def _sites(scores: Comparison) -> list[str]:
    """The sites with a value in any arm, those in no mean last."""
    return [
        site
        for site in (*scores.compared, *scores.left_out, *scores.unseen)
        if any((arm, site) in scores.cells for arm in scores.arms)
    ]


def _tag(scores: Comparison, site: str) -> str:
    return "unseen" if site in scores.unseen else "in no mean" if site in scores.left_out else ""


def _of_any(scores: Comparison, site: str) -> Estimate | None:
    """What is the same in every arm, at a site, or the mean over the sites for ""."""
    found = [scores.cells.get((arm, site)) if site else scores.mean(arm) for arm in scores.arms]
    return next((known for known in found if known), None)


def _count(number: int) -> str:
    return f"{number:,}" if number else NONE
