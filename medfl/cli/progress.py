"""What a run shows while it goes on, and at its end."""

import re
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from medfl.cli.plain import plain
from medfl.report.words import HEADLINES, TUNED
from medfl.run_folder import CLOSED, TRAININGS, Event, RunFolder
from medfl.study import Study


class Progress:
    """The arm that trains, its round and loss, and the time left for all arms, from what rounds took so far."""

    def __init__(self, console: Console, study: Study) -> None:
        self.console, self.study = console, study
        self.planned = self.done = 0
        self.began = time.monotonic()
        self.said: set[tuple[str, str]] = set()
        self.loss = ""  # of the round; under differential privacy nobody tells it
        self.bars = Bars(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task = self.bars.add_task("enrolling sites", total=1, note="")

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def show(self, event: Event) -> None:
        """Follow one event of the run folder."""
        if event.name == "refused":
            where = f"{event.stage} round {event.round}"
            self.console.print(f"[yellow]refused[/] {where}: {plain(event.reason)}", soft_wrap=True)
        elif event.name == "joined":
            self.console.print(f"[green]joined[/] {plain(event.site)}, from round {event.round}", soft_wrap=True)
        elif event.name in ("checkpoint/damaged", "remark"):
            self._remark(event)
        elif event.name == "planned":
            self.planned += int(event.value)
            self.bars.update(self.task, total=max(1, self.planned))
        elif event.stage in TRAININGS and event.name == "loss/total" and not event.site:
            self.loss = f"  loss {event.value:.3f}"
        elif event.stage in TRAININGS and event.name == CLOSED:
            self._round(event)

    def _remark(self, event: Event) -> None:
        """Once for each arm and text up to its first number: what holds in one round mostly holds in the next."""
        words = re.split(r"\d", event.reason, maxsplit=1)[0]
        if (event.arm, words) not in self.said:
            self.said.add((event.arm, words))
            where = f"{plain(event.arm)}, round {event.round}"
            self.console.print(f"[yellow]note[/] {where}: {plain(event.reason)}", soft_wrap=True)

    def _round(self, event: Event) -> None:
        self.done += 1
        total = self.bars.tasks[0].total or 1
        left = (time.monotonic() - self.began) / self.done * max(0.0, total - self.done)
        rounds = self.study.rounds.count if event.stage == "pretrain" else self.study.finetune.rounds
        note, self.loss = f"round {event.round}/{rounds}{self.loss}  {_minutes(left)} left", ""
        self.bars.update(self.task, completed=self.done, description=plain(event.arm), note=note)
        if not self.console.is_terminal:
            self.console.print(f"{plain(event.arm):<22} {note}", soft_wrap=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def sites_table(study: Study, facts: dict[str, Any]) -> Table:
    """Who takes part, what each holds, and how different the sites are."""
    shift = facts["calibration"]
    table = Table(title=plain(study.run_dir), title_justify="left", caption_justify="left", caption=_shift_line(shift))
    held = _held(facts["sites"])
    for name in ("site", "train", "val", "test", *held, "scanner"):
        table.add_column(name, justify="right" if name in ("train", "val", "test") else "left")
    for place, site in enumerate(facts["sites"]):
        name = site["name"] + (" (held out)" if site["held_out"] else "")
        sizes = [str(site[split]) for split in ("train", "val", "test")]
        table.add_row(*map(plain, (name, *sizes, *(column[place] for column in held.values()), site["profile"])))
    return table


def _held(sites: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What the training images show, in columns: modalities and masks where there are any, classes else or as well."""
    columns = {}
    if any("modalities" in site for site in sites):
        present = [{name: count for name, count in site["modalities"].items() if count} for site in sites]
        columns["modalities in training"] = [_counted(names) for names in present]
        columns["masks"] = [str(site["labelled"]) for site in sites]
    if not columns or any(site["classes"] for site in sites):
        columns["classes in training"] = [_counted(site["classes"]) or "no labels" for site in sites]
    return columns


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _shift_line(shift: dict[str, Any]) -> str:
    words = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in shift.items() if isinstance(value, int | float)]
    return "site shift: " + ", ".join(words) if words else ""


def summary(folder: RunFolder) -> Group:
    """The study's result for every arm, the same of each way of fine-tuning, and where everything is."""
    rows = [row for row in folder.evaluations() if row["value"]]
    measured = {(row["protocol"], row["metric"]) for row in rows}
    titles = [key for key in HEADLINES if key in measured]
    shown = [key for place, key in enumerate(titles) if place == 0 or key[0] in TUNED]
    return Group(*(_scores(HEADLINES[key], _of(rows, *key)) for key in shown), _files(folder))


def _of(rows: Sequence[dict[str, str]], protocol: str, metric: str) -> list[dict[str, str]]:
    """The rows of one metric with the largest share of the labels."""
    found = [row for row in rows if (row["protocol"], row["metric"]) == (protocol, metric)]
    most = max(float(row["label_fraction"]) for row in found)
    return [row for row in found if float(row["label_fraction"]) == most]


def _scores(title: str, rows: Sequence[dict[str, str]]) -> Table:
    """Arms by site, and their means."""
    arms = list(dict.fromkeys(_group(row["arm"]) for row in rows))
    sites = list(dict.fromkeys(row["site"] for row in rows))
    table = Table(title=f"{title} (95 % interval)", title_justify="left")
    for name in ("arm", *sites, "mean"):
        table.add_column(plain(name), justify="left" if name == "arm" else "right")
    for arm in arms:
        cells = {r["site"]: r for r in rows if _group(r["arm"]) == arm and _own(r)}
        values = [float(cells[site]["value"]) for site in sites if site in cells]
        mean = f"{sum(values) / len(values):.3f}" if values else "–"
        table.add_row(plain(arm), *(_cell(cells.get(site)) for site in sites), mean)
    return table


def _files(folder: RunFolder) -> str:
    names = ("encoder.safetensors", "evaluation.csv", "transfer.csv", "wire.csv", "report.html", "sites/pictures")
    return plain(f"{folder.path}/ ") + "  ".join(name for name in names if (folder.path / name).exists())


def _group(arm: str) -> str:
    return "local (each at its own site)" if arm.startswith("local:") else arm


def _own(row: dict[str, str]) -> bool:
    return not row["arm"].startswith("local:") or row["arm"] == f"local:{row['site']}"


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    ends = f" ({float(row['low']):.2f}–{float(row['high']):.2f})" if row["low"] and row["high"] else ""
    return f"{float(row['value']):.3f}{ends}"
