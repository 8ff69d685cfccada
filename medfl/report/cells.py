"""Rows and cells of the page's tables as plain values for the template."""

from collections.abc import Sequence
from typing import Any

from medfl.report.summary import SIGNED, Comparison, Estimate, bounds, number

NONE = "–"
FORMS = {"hd95": ".2f", "psnr": ".2f"}  # start of a metric -> form of its numbers; three decimals for the others
Section = dict[str, Any]


def cell(known: Estimate | None, form: str = ".3f") -> Section:
    """A number and its interval as text; the sign counts for differences."""
    if known is None:
        return {"value": NONE, "interval": ""}
    sign = known.sign if form == SIGNED else 0
    return {"value": number(known.value, form), "interval": bounds(known, form), "sign": sign}


def row(
    name: str, estimates: Sequence[Estimate | None], tag: str = "", *, form: str = ".3f", whole: bool = False
) -> Section:
    """A row of a table; `whole`: it sums up those above."""
    cells = [cell(known, form) for known in estimates]
    return {"name": name, "tag": tag, "cells": cells, "whole": whole, "group": "", "height": 1}


def words_row(name: str, words: Sequence[str]) -> Section:
    """A last row of texts."""
    return {**row(name, [], whole=True), "cells": [{"value": text, "interval": ""} for text in words]}


def grouped(title: str, rows: Sequence[Section]) -> list[Section]:
    """The rows under one heading at their left."""
    return [{**part, "group": title, "height": 0 if at else len(rows)} for at, part in enumerate(rows)]


def by_site(scores: Comparison, arms: Sequence[str]) -> list[Section]:
    """The sites with a value in any arm, those in no mean last, and then their mean."""
    order = (*scores.compared, *scores.left_out, *scores.unseen)
    sites = [site for site in order if any((arm, site) in scores.cells for arm in scores.arms)]
    form = form_of(scores.metric)
    rows = [row(site, [scores.cells.get((arm, site)) for arm in arms], tag(scores, site), form=form) for site in sites]
    return [*rows, row("Mean", [scores.mean(arm) for arm in arms], form=form, whole=True)]


def tag(scores: Comparison, site: str) -> str:
    return "unseen" if site in scores.unseen else "in no mean" if site in scores.left_out else ""


def form_of(metric: str) -> str:
    return FORMS.get(metric.partition("_")[0], ".3f")
