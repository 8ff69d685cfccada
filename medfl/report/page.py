"""Write report.html: one offline file from what the run folder holds, the same bytes for the same folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medfl.files import write_bytes
from medfl.report import (
    codebooks,
    compute,
    finetuned,
    panels,
    predictions,
    privacy,
    remarks,
    scores,
    sections,
    shown_pictures,
    synthetic,
    transfer,
    volumes,
)
from medfl.report.style import STYLE
from medfl.report.summary import headline
from medfl.report.tables import Run, read_run
from medfl.report.template import CONTENTS, PAGE

MOST = 8_000_000  # bytes of the page, pictures and all
FRAME = 600  # bytes of the page around a picture
OPTIONAL = (
    "finetuned",
    "predictions",
    "volumes",
    "pictures",
    "synthetic",
    "codebooks",
    "remarks",
    "compute",
    "privacy",
)


def write(run_dir: Path) -> Path:
    """Write `run_dir`/report.html atomically; the page of a partial study says what is lacking.

    Raises:
        DataError: no such folder, or none of the files of a run in it.
        ResourceError: the disk is full.
    """
    path = run_dir / "report.html"
    write_bytes(path, render(read_run(run_dir)).encode())
    return path


def render(run: Run) -> str:
    """The page as text; of the pictures those that fit into `MOST` bytes."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(PAGE)
    values = _values(run)
    if not run.pictures:
        return template.render(values)
    bare = template.render(values)
    values["pictures"] = shown_pictures.section(run, MOST - len(bare.encode()) - FRAME * len(run.pictures))
    return template.render(values | {"contents": _contents(values)})


def _values(run: Run) -> dict[str, Any]:
    """What the template shows, pictures apart; {} where nothing is recorded."""
    main = headline(run)
    values: dict[str, Any] = {
        "name": run.name,
        "style": STYLE,
        "study": sections.study(run, main),
        "sites": sections.sites(run),
        "losses": panels.losses(run),
        "pace": panels.pace(run),
        "tuned_losses": panels.tuned_losses(run),
        "arms": scores.arms(run, main),
        "finetuned": finetuned.section(run),
        "predictions": predictions.section(run, main),
        "volumes": volumes.section(run),
        "transfer": transfer.section(run),
        "pictures": {},
        "synthetic": synthetic.section(run),
        "monitors": panels.monitors(run),
        "collapse": panels.collapse_words(run),
        "codebooks": codebooks.section(run),
        "remarks": remarks.section(run),
        "compute": compute.section(run),
        "wire": sections.crossed(run),
        "privacy": privacy.section(run),
        "refusals": sections.refusals(run),
        "provenance": sections.provenance(run),
        "limits": sections.limits(run, main),
    }
    return values | {"contents": _contents(values)}


def _contents(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sections that are on the page: those of `OPTIONAL` only where they have something to show."""
    return [(name, title) for name, title in CONTENTS if name not in OPTIONAL or values[name]]
