"""The section on synthetic images: how many each site made and kept, why not others, and the copy test."""

from collections.abc import Mapping

from medfl.report.cells import Section, cell
from medfl.report.summary import Estimate
from medfl.report.tables import Run, ordered_sites, study_node

STAGE, PREFIX = "synthesize", "synthesis/"  # of the events
COLUMNS = {  # event, or the start of several -> heading
    "kept": "Kept",
    "sanity": "Not like an image",
    "realism": "Not realistic",
    "copy_": "Copy of a training image",
    "duplicate": "Repeats another",
    "budget": "More than wanted",
}
SHARE = "copy_share/"  # of the images that were tested, those that copy a training image; no count


def section(run: Run) -> Section:
    """For the template; {} where no site made any."""
    told: dict[str, dict[str, float]] = {}
    for event in run.events:
        if event.stage == STAGE and event.name.startswith(PREFIX) and event.site:
            told.setdefault(event.site, {})[event.name.removeprefix(PREFIX)] = event.value
    if not told:
        return {}
    per_image = study_node(run, "training").get("synthetic")
    return {
        "columns": ["Made", *COLUMNS.values(), "Copies among all, %", "May be exported"],
        "rows": [(site, _cells(told[site])) for site in ordered_sites(run) if site in told],
        "used": per_image if isinstance(per_image, int | float) else 0.0,
    }


def _cells(told: Mapping[str, float]) -> list[Section]:
    counts = [sum(value for name, value in told.items() if _counts(name, start)) for start in COLUMNS]
    parts = [told.get(f"{SHARE}{name}") for name in ("value", "low", "high")]
    share, low, high = (None if part is None else 100 * part for part in parts)
    copies = cell(None if share is None else Estimate(share, low, high), ".2f")
    export = "yes" if told.get("exportable") else "no"
    return [*map(_plain, [f"{number:,.0f}" for number in (sum(counts), *counts)]), copies, _plain(export)]


def _plain(text: str) -> Section:
    return {"value": text, "interval": ""}


def _counts(name: str, start: str) -> bool:
    return (name.startswith(start) if start.endswith("_") else name == start) and not name.startswith(SHARE)
