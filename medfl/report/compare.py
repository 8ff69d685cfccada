"""Runs beside each other: studies that are equal but for their seed are one row, with means over the seeds.

Intervals are Student's over seeds, of the mean or of paired differences; one seed has none. The intervals of a report
are over patients: they do not know how much another seed changes.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl.errors import ConfigError
from medfl.evaluation.statistics import mean_interval
from medfl.files import write_bytes
from medfl.overrides import names, studied
from medfl.report.cells import cell, form_of
from medfl.report.figures import Dot, intervals, padded
from medfl.report.panels import Drawn
from medfl.report.rows import score
from medfl.report.style import STYLE
from medfl.report.summary import ALL, SIGNED, Estimate, compare_arms, name_of
from medfl.report.tables import Run, read_config, read_sites, read_table
from medfl.report.template import HEAD, MACROS
from medfl.report.words import ARMS, TITLES, TUNED
from medfl.run_folder import RunFolder

GAIN, VERSUS_FIRST = "federated - local", "federated - row 1"
COLUMNS = ("row", "study", "quantity", "protocol", "metric", "label_fraction", "value", "low", "high", "seeds", "runs")
LOWER_IS_BETTER = ("hd95", "brier", "ece")  # starts of metrics
Seeds = Mapping[int, float]  # seed -> mean over sites


@dataclass(frozen=True)
class Question:
    """Which score is compared."""

    protocol: str
    metric: str
    fraction: float = ALL


@dataclass(frozen=True)
class Row:
    """One study: its runs by seed, and each arm's scores; `tuned` are those of the federated encoder, by protocol."""

    name: str
    runs: Mapping[int, Run]
    arms: Mapping[str, Seeds]
    tuned: Mapping[str, Seeds]

    def difference(self, arm: str, other: Seeds) -> dict[int, float]:
        """Over the seeds that both have."""
        own = self.arms.get(arm, {})
        return {seed: value - other[seed] for seed, value in own.items() if seed in other}


@dataclass(frozen=True)
class Table:
    """What the runs say to one question. Each column is name -> one set of values for each row."""

    title: str
    metric: str
    rows: tuple[Row, ...]
    means: Mapping[str, Sequence[Seeds]]  # by arm
    differences: Mapping[str, Sequence[Seeds]]
    tuned: Mapping[str, Sequence[Seeds]]  # by protocol
    remarks: tuple[str, ...]


def compare(paths: Sequence[Path], question: Question) -> Table:
    """
    Raises:
        ConfigError: a folder is no run, two runs are the same study and seed, or a study has no such score.
    """
    runs = {path: _read(RunFolder.open(path).path) for path in paths}
    groups: dict[str, list[Path]] = {}
    for path, run in runs.items():
        groups.setdefault(json.dumps(studied(run.config), sort_keys=True, default=str), []).append(path)
    named = names([runs[members[0]].config for members in groups.values()])
    rows = [
        _row(name, {path: runs[path] for path in members}, question)
        for name, members in zip(named, groups.values(), strict=True)
    ]
    first = rows[0].arms.get("federated", {})
    differences = {GAIN: [row.difference("federated", row.arms.get("local", {})) for row in rows]}
    differences[VERSUS_FIRST] = [{}, *(row.difference("federated", first) for row in rows[1:])]
    title = name_of(compare_arms(runs[paths[0]], question.protocol, question.metric))
    return Table(
        title=title + f" with {question.fraction:g} of the labels" * (question.fraction != ALL),
        metric=question.metric,
        rows=tuple(rows),
        means={arm: [row.arms.get(arm, {}) for row in rows] for arm in ARMS if any(arm in r.arms for r in rows)},
        differences={name: every for name, every in differences.items() if any(every)},
        tuned={how: [row.tuned.get(how, {}) for row in rows] for how in TUNED if any(how in r.tuned for r in rows)},
        remarks=tuple(_remarks(rows, question)),
    )


def _read(folder: Path) -> Run:
    """What a comparison needs of a run folder; a report reads more."""
    config, bad_config = read_config(folder / "config.yaml")
    scores, bad_scores = read_table(folder / "evaluation.csv", score)
    sites, _, bad_sites = read_sites(folder / "sites.json")
    problems = bad_config + bad_scores + bad_sites
    return Run(folder.resolve().name, config=config, scores=scores, sites=sites, problems=problems)


def estimate(values: Seeds) -> Estimate | None:
    """The mean over seeds."""
    found = mean_interval(list(values.values()))
    return None if found.value is None else Estimate(found.value, found.low, found.high)


def few(values: Seeds, row: Row) -> str:
    """How many seeds are behind a value, where it is not all of the row's."""
    return f"n={len(values)}" if 0 < len(values) < len(row.runs) else ""


def _row(name: str, members: Mapping[Path, Run], question: Question) -> Row:
    runs: dict[int, Run] = {}
    places: dict[int, Path] = {}
    for path, run in members.items():
        seed = int(run.config.get("seed", 0))
        if seed in runs:
            raise ConfigError(f"{places[seed]} and {path} are the same study with seed {seed}. Leave one of them out.")
        runs[seed], places[seed] = run, path
    runs = dict(sorted(runs.items()))
    tuned = {} if question.protocol in TUNED else {protocol: Question(protocol, question.metric, question.fraction)
                                                   for protocol in TUNED}  # fmt: skip
    row = Row(
        name,
        runs,
        {arm: found for arm in ARMS if (found := _scores(runs, question, arm))},
        {protocol: found for protocol, asked in tuned.items() if (found := _scores(runs, asked, "federated"))},
    )
    if not row.arms:
        have = sorted({f"{s.protocol} {s.metric}" for run in runs.values() for s in run.scores if s.value is not None})
        asked = f"{question.protocol} {question.metric} at fraction={question.fraction:g}"
        raise ConfigError(
            f"{', '.join(map(str, members))}: no {asked}; there is {', '.join(have) or 'no score at all'}. "
            "Choose with protocol=, metric= and fraction=."
        )
    return row


def _scores(runs: Mapping[int, Run], question: Question, arm: str) -> dict[int, float]:
    found = {seed: compare_arms(run, question.protocol, question.metric, question.fraction).mean(arm)
             for seed, run in runs.items()}  # fmt: skip
    return {seed: known.value for seed, known in found.items() if known is not None}


def _remarks(rows: Sequence[Row], question: Question) -> list[str]:
    """What must be known to read the tables."""
    found = [
        "Scores are means over the sites of a run, then over seeds; ranges are 95 % over seeds, and one seed has none."
    ]
    if len(rows) > 1:
        found.append("Differences are paired: of the same seed, over the seeds that both have.")
    sites: dict[tuple[str, ...], str] = {}
    for number, row in enumerate(rows, start=1):
        for seed, run in row.runs.items():
            compared = compare_arms(run, question.protocol, question.metric, question.fraction).compared
            sites.setdefault(compared, f"row {number}, seed {seed}: {', '.join(compared) or 'none'}")
        found += [f"{run.name}: {text}" for run in row.runs.values() for text in run.problems]
    if len(sites) > 1:
        found.append(f"Not all means are over the same sites: {'; '.join(sites.values())}.")
    versions = sorted({str(_version(run)) for row in rows for run in row.runs.values()})
    if len(versions) > 1:
        found.append(f"The runs are of different versions of medfl: {', '.join(versions)}.")
    return found


def _version(run: Run) -> object:
    return (run.config.get("provenance") or {}).get("medfl", "unknown")


def write(table: Table, question: Question, folder: Path) -> tuple[Path, Path]:
    """comparison.csv and comparison.html, one page that needs nothing else."""
    sheet, page = folder / "comparison.csv", folder / "comparison.html"
    write_bytes(sheet, _csv(table, question).encode())
    write_bytes(page, render(table).encode())
    return sheet, page


def _csv(table: Table, question: Question) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    asked = (question.protocol, question.metric, f"{question.fraction:g}")
    tuned = {f"federated, {protocol}": every for protocol, every in table.tuned.items()}
    for quantity, every in {**table.means, **table.differences, **tuned}.items():
        for number, (row, values) in enumerate(zip(table.rows, every, strict=True), start=1):
            if known := estimate(values):
                ends = ["" if end is None else f"{end:.6g}" for end in (known.low, known.high)]
                runs = [" ".join(map(str, values)), " ".join(row.runs[seed].name for seed in values)]
                writer.writerow([number, row.name, quantity, *asked, f"{known.value:.6g}", *ends, *runs])
    return text.getvalue()


def render(table: Table) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE)
    form = form_of(table.metric)
    parts = [
        ("Arms", [TITLES[arm] for arm in table.means], _cells(table, table.means, form)),
        ("Differences", list(table.differences), _cells(table, table.differences, SIGNED)),
        ("The federated encoder after fine-tuning", [TUNED[p] for p in table.tuned], _cells(table, table.tuned, form)),
    ]
    return template.render(
        name="comparison",
        style=STYLE,
        title=f"{table.title[:1].upper()}{table.title[1:]}",
        remarks=table.remarks,
        parts=[part for part in parts if part[1]],
        figures=figures(table),
        rows=[(row.name, [(seed, run.name) for seed, run in row.runs.items()]) for row in table.rows],
    )


def _cells(table: Table, columns: Mapping[str, Sequence[Seeds]], form: str) -> list[dict[str, Any]]:
    """Rows for the template."""
    return [
        {
            "name": row.name,
            "seeds": len(row.runs),
            "cells": [_cell(every[index], row, form, table.metric) for every in columns.values()],
        }
        for index, row in enumerate(table.rows)
    ]


def _cell(values: Seeds, row: Row, form: str, metric: str) -> dict[str, Any] | None:
    if (known := estimate(values)) is None:
        return None
    shown = cell(known, form)
    sign = -shown["sign"] if metric.startswith(LOWER_IS_BETTER) else shown["sign"]
    return {**shown, "sign": sign, "interval": " ".join(filter(None, (shown["interval"], few(values, row))))}


def figures(table: Table) -> list[Drawn]:
    """One panel per arm on one scale, with the rows by their number."""
    means = {arm: [estimate(values) for values in every] for arm, every in table.means.items()}
    known = [cell for cells in means.values() for cell in cells if cell]
    limits = padded([end for c in known for end in (c.value, c.low, c.high) if end is not None])
    drawn = {arm: [_dot(number, cell, arm) for number, cell in enumerate(cells, 1)] for arm, cells in means.items()}
    return [Drawn(TITLES[arm], intervals(TITLES[arm], table.title, dots, limits)) for arm, dots in drawn.items()]


def _dot(number: int, known: Estimate | None, arm: str) -> Dot:
    label, ink = f"row {number}", "accent" if arm == "federated" else "ink"
    return Dot(label, known.value, known.low, known.high, ink) if known else Dot(label, None, None, None, ink)


PAGE = "".join((MACROS, HEAD, """
<header><h1>medfl comparison</h1>
<p class="lead">{{ title }}</p>
<ul class="remarks">{% for text in remarks %}<li>{{ text }}</li>{% endfor %}</ul></header>
{% for heading, columns, lines in parts %}
<section><h2>{{ heading }}</h2>
<div class="scroll" tabindex="0"><table><thead><tr><th class="l">Study</th><th>Seeds</th>
{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for line in lines %}
<tr><th>{{ loop.index }} · {{ line.name }}</th><td>{{ line.seeds }}</td>
{% for one in line.cells %}{{ gain(one) }}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if loop.first %}{{ grid(figures) }}{% endif %}
</section>
{% endfor %}
<section><h2>Runs</h2>
<div class="scroll" tabindex="0"><table>
<thead><tr><th class="l">Study</th><th class="l">Seed and folder</th></tr></thead>
<tbody>{% for name, runs in rows %}<tr><th>{{ loop.index }} · {{ name }}</th>
<td class="l text">{% for seed, folder in runs %}{{ seed }}: {{ folder }}{{ ", " if not loop.last }}{% endfor %}</td>
</tr>{% endfor %}</tbody></table></div></section>
</main></body></html>
"""))  # fmt: skip
