"""The command that puts runs beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from medfl.cli.main import asks_help
from medfl.errors import ConfigError

if TYPE_CHECKING:
    from medfl.report.compare import Row, Seeds, Table

WIDTH = 100  # columns, where the output is no terminal
OPTIONS = ("to", "metric", "protocol", "fraction")
USAGE = "medfl compare RUN... [to=FOLDER] [metric=auc] [protocol=linear] [fraction=1]"


def compare(words: Sequence[str]) -> None:
    """Tables and a figure over runs and seeds: medfl compare RUN... [to=FOLDER].

    medfl compare runs/*                           runs that differ in nothing but the seed are one row
    medfl compare runs/* to=FOLDER                 also comparison.csv and comparison.html
    medfl compare runs/* protocol=knn              linear | knn | finetune | federated_finetune | segmentation | ...
    medfl compare runs/* metric=balanced_accuracy  auc | accuracy | dice_wt | ..., as in evaluation.csv
    medfl compare runs/* protocol=finetune fraction=0.1

    The first run's study is row 1, with which the others are compared.
    """
    if asks_help(compare, words):
        return
    from medfl.report import compare as over_runs

    options = dict(word.split("=", 1) for word in words if word.partition("=")[0] in OPTIONS and "=" in word)
    paths = [Path(word) for word in words if word.partition("=")[0] not in OPTIONS]
    if not paths or any(word.startswith("-") for word in words):
        raise ConfigError(f"usage: {USAGE}")
    question = over_runs.Question(
        options.get("protocol", "linear"), options.get("metric", "auc"), _share(options.get("fraction", "1"))
    )
    table = over_runs.compare(paths, question)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    for grid in grids(table):
        console.print(grid)
    for text in table.remarks:
        console.print(text, soft_wrap=True)
    if "to" in options:
        console.print(f"wrote {' and '.join(map(str, over_runs.write(table, question, Path(options['to']))))}")


def _share(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ConfigError(f"fraction: got {word!r}, need a share of the labels such as 0.1.") from None


def grids(table: "Table") -> list[Grid]:
    """The arms, their differences, and the federated encoder after fine-tuning, where there are any."""
    from medfl.report.cells import form_of
    from medfl.report.summary import SIGNED
    from medfl.report.words import TITLES

    form = form_of(table.metric)
    parts = [
        (
            f"{table.title}, mean over sites and seeds",
            {TITLES[arm].lower(): cells for arm, cells in table.means.items()},
            form,
        ),
        ("differences, paired by seed", table.differences, SIGNED),
        ("the federated encoder after fine-tuning", table.tuned, form),
    ]
    return [_grid(table, title, columns, form) for title, columns, form in parts if columns]


def _grid(table: "Table", title: str, columns: Mapping[str, Sequence["Seeds"]], form: str) -> Grid:
    grid = Grid(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("study", overflow="fold")
    grid.add_column("seeds", justify="right")
    for name in columns:
        grid.add_column(name.replace("_", " "), justify="right")
    for index, row in enumerate(table.rows):
        cells = [_cell(every[index], row, form) for every in columns.values()]
        grid.add_row(f"{index + 1} {row.name}", str(len(row.runs)), *cells)
    return grid


def _cell(values: "Seeds", row: "Row", form: str) -> str:
    from medfl.report.compare import estimate, few
    from medfl.report.summary import bounds, number

    known = estimate(values)
    parts = (number(known.value, form), bounds(known, form), few(values, row)) if known else ("–",)
    return "\n".join(filter(None, parts))
