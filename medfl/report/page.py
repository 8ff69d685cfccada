"""Write report.html: one offline file from what the run folder holds, the same bytes for the same folder."""

from pathlib import Path

from medfl.files import write_bytes
from medfl.report import codebooks, panels, remarks, scores, sections, volumes
from medfl.report.style import STYLE
from medfl.report.summary import headline
from medfl.report.tables import Run, read_run
from medfl.report.template import CONTENTS, PAGE


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
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    main = headline(run)
    some = {  # {} where nothing is recorded
        "volumes": volumes.section(run),
        "codebooks": codebooks.section(run),
        "remarks": remarks.section(run),
    }
    return template.render(
        name=run.name,
        style=STYLE,
        contents=[(name, title) for name, title in CONTENTS if some.get(name, True)],
        study=sections.study(run, main),
        sites=sections.sites(run),
        losses=panels.losses(run),
        pace=panels.pace(run),
        arms=scores.arms(run, main),
        transfer=scores.transfer(run),
        monitors=panels.monitors(run),
        collapse=panels.collapse_words(run),
        **some,
        wire=sections.crossed(run),
        refusals=sections.refusals(run),
        provenance=sections.provenance(run),
        limits=sections.limits(run, main),
    )
