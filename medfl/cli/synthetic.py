"""Synthetic images: making them at each site, and a site's decision to give some away."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medfl import config, site_synthesis
from medfl.cli.main import asks_help, run_argument
from medfl.errors import ConfigError, DataError, PolicyError
from medfl.files import sha256, write_bytes

COMMAND_DEFAULTS = {"sites": "sites=iid", "sites.count": "sites.count=1", "stages": "stages=[synthesize]"}


def synthesize(words: Sequence[str]) -> None:
    """Train a latent diffusion model on a site's images and curate what it makes.

    medfl synthesize [key=value ...]         for example data=medmnist data.name=breastmnist
    medfl synthesize sites=hospital sites.count=4      one model at each of four sites
    medfl simulate stages=[synthesize,pretrain,evaluate,report] training.synthetic=0.5

    One site by default. Models: synthesis=small (CPU) | paper (GPU) | tiny (tests). A stopped command goes on with
    resume=true. Images, model and a contact sheet stay in RUN/sites/synthetic/SITE.
    """
    from medfl.cli import research

    if asks_help(synthesize, words):
        return
    given = {word.partition("=")[0] for word in words}
    sites = () if "sites" in given else ("sites", "sites.count")
    added = [COMMAND_DEFAULTS[key] for key in (*sites, "stages") if key not in given]
    if "run.dir" not in given:
        study = config.compose([*added, *words])
        name = study.data.get("name") or "data"
        added.append(f"run.dir=runs/synthesize-{name}-seed{study.seed}")
    research.simulate([*added, *words])


def share(words: Sequence[str]) -> None:
    """Copy one site's synthetic images to a folder, once someone there has seen the copy test.

    medfl share FOLDER to=FOLDER             shows the record and copies nothing
    medfl share FOLDER to=FOLDER by=NAME     copies images, record and the name

    FOLDER is .../synthetic/SITE. The model never goes along: its weights can reproduce patients.
    """
    if asks_help(share, words):
        return
    folder, rest = run_argument("share", words)
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    if "to" not in options or options.keys() - {"to", "by"} or len(options) < len(rest):
        raise ConfigError("usage: medfl share FOLDER to=FOLDER [by=NAME]")
    source, target = Path(folder), Path(options["to"])
    record = site_synthesis.read_record(source)
    if not record:
        raise DataError(
            f"{source} holds no finished synthesis. Give the folder of one site, as RUN/sites/synthetic/SITE."
        )
    console = Console(highlight=False)
    console.print(table([record]), copy_figure(record), f"contact sheet: {source / site_synthesis.SHEET}", sep="\n")
    if not record["exportable"]:
        raise PolicyError(f"these images may not be shared: {' '.join(record['reasons'])}")
    if sha256(source / site_synthesis.IMAGES) != record["sha256"]:
        raise DataError(f"{source / site_synthesis.IMAGES} is not what was curated. Run medfl synthesize again.")
    if "by" not in options:
        console.print("nothing copied: look at the contact sheet, then repeat with by=NAME")
        return
    if target.exists():
        raise ConfigError(f"to={target} exists. Name a new folder.")
    target.mkdir(parents=True)
    shutil.copyfile(source / site_synthesis.IMAGES, target / site_synthesis.IMAGES)
    approved = {"by": options["by"], "at": datetime.now(UTC).isoformat(timespec="seconds")}
    write_bytes(target / site_synthesis.RECORD, json.dumps({**record, "shared": approved}, indent=1).encode())
    console.print(f"wrote {target}/: {record['counts'].get('kept', 0)} images and their record")


def table(records: Sequence[dict[str, Any]]) -> Table:
    """What became of the images made at each site; one column a site."""
    found = Table(title="synthetic images", title_justify="left")
    found.add_column("verdict")
    for record in records:
        found.add_column(record["site"], justify="right")
    for reason in dict.fromkeys(reason for record in records for reason in record["counts"]):
        told = reason if reason == "kept" else f"refused: {reason}"
        found.add_row(told, *(str(record["counts"].get(reason, 0)) for record in records))
    found.add_row("copies (95 %)", *(_share(record) for record in records))
    return found


def copy_figure(record: dict[str, Any]) -> str:
    """The figure to decide by, in one sentence."""
    return (
        f"copies: {_share(record)} of the images made were found to be copies of a training image; among held-out "
        "images of other patients, the same test is set to find 5 % at most"
    )


def _share(record: dict[str, Any]) -> str:
    copies = record["copies"]
    return "{share:.1%} ({share_low:.1%}–{share_high:.1%})".format(**copies) if copies["share"] is not None else "–"


@contextmanager
def progress_in(console: Console) -> Iterator[None]:
    """Show what the sites of this process log of their synthesis."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(record.getMessage(), soft_wrap=True)

    lines, level = Lines(), site_synthesis.log.level
    site_synthesis.log.addHandler(lines)
    site_synthesis.log.setLevel(logging.INFO)
    try:
        yield
    finally:
        site_synthesis.log.removeHandler(lines)
        site_synthesis.log.setLevel(level)
