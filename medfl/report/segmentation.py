"""Scores of segmentation by region, as tables: the regions and their names come from what was written."""

import re
from collections.abc import Sequence

from medfl.report import summary
from medfl.report.cells import Section, by_site, form_of, grouped, row
from medfl.report.summary import ALL, Comparison
from medfl.report.tables import Run
from medfl.report.words import REGIONS, TITLES, region_name

MEASURES = {  # name with the region left open -> words
    "dice_{}_present": "Dice, where there is such a region",
    "iou_{}": "IoU",
    "sensitivity_{}": "Sensitivity",
    "specificity_{}": "Specificity",
    "accuracy_{}": "Accuracy",
    "hd95_{}": "HD95, mm (lower is better)",
    "hd95_{}_present": "HD95, mm, where there is such a region",
}
OF_REGION = re.compile(r"(dice|iou|sensitivity|specificity|accuracy|hd95)_(.+?)(_present)?")
SEGMENTATION = "segmentation"  # protocol of methods that segment by themselves; task of fine-tuned ones


def regions(run: Run, protocol: str) -> list[str]:
    """Those with a Dice, the known ones first, then in the order of the file."""
    names = dict.fromkeys(
        found[2]
        for s in run.scores
        if s.protocol == protocol and (found := OF_REGION.fullmatch(s.metric)) and found[1] == "dice" and not found[3]
    )
    return [*(name for name in REGIONS if name in names), *(name for name in names if name not in REGIONS)]


def table(run: Run, protocol: str, fraction: float = ALL) -> Section:
    """Dice by region and site, and the other measures by region as means over the sites; {} without a Dice."""
    found = {
        region: summary.compare_arms(run, protocol, f"dice_{region}", fraction) for region in regions(run, protocol)
    }
    dice = {region: scores for region, scores in found.items() if scores.cells}
    if not dice:
        return {}
    arms = next(iter(dice.values())).arms
    return {
        "columns": [TITLES[arm] for arm in arms],
        "sites": [
            part for region, scores in dice.items() for part in grouped(region_name(region), by_site(scores, arms))
        ],
        "means": [
            part for form, words in MEASURES.items() for part in grouped(words, _measured(run, form, dice, arms))
        ],
        "over": len(next(iter(dice.values())).compared),
    }


def _measured(run: Run, form: str, dice: dict[str, Comparison], arms: Sequence[str]) -> list[Section]:
    """One measure in every region, as means over the sites."""
    found = {
        region: summary.compare_arms(run, known.protocol, form.format(region), known.fraction)
        for region, known in dice.items()
    }
    return [
        row(region_name(region), [scores.mean(arm) for arm in arms], form=form_of(form))
        for region, scores in found.items()
        if scores.cells
    ]
