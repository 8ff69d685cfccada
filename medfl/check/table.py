"""What the check shows in the terminal."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medfl.check.finding import GROUPS, NOTHING, Finding, number
from medfl.check.run import Result

WORDS = {"pass": ("ok", "green"), "warn": ("WARN", "yellow"), "fail": ("FAIL", "bold red")}
SHOWN = 3  # of a finding's files


def show(console: Console, result: Result) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for group, title in GROUPS.items():
        members = [one for one in result.findings if one.group == group]
        if not members:
            continue
        table.add_row("", "", "")
        table.add_row("", Text(title, style="bold"), "")
        for one in members:
            if one.what != NOTHING:
                word, style = WORDS[one.state]
                table.add_row(Text(word, style=style), Text(one.name), _details(one))
        if clean := [one.name for one in members if one.what == NOTHING]:
            table.add_row(Text("ok", style="green"), Text("nothing found"), Text(", ".join(clean)))
    console.print(table)
    console.print(Text("\n" + summary(result), style="bold"))
    console.print(Text(next_step(result)))


def _details(one: Finding) -> Text:
    text = Text(one.what)
    if one.state == "pass":
        return text
    for line in one.items[:SHOWN]:
        text.append(f"\n  {line}")
    if len(one.items) > SHOWN:
        text.append(f"\n  and {len(one.items) - SHOWN} more", style="dim")
    if one.why:
        text.append(f"\nwhy: {one.why}", style="dim")
    if one.fix:
        text.append("\nto do: ", style="dim").append(one.fix)
    return text


def summary(result: Result) -> str:
    problems, warnings = number(result.findings, "fail"), number(result.findings, "warn")
    told = _many(problems, "problem") if problems else "No problems"
    return f"{told} and {_many(warnings, 'warning')} in {len(result.findings)} checks."


def next_step(result: Result) -> str:
    site = result.scope.site
    if number(result.findings, "fail"):
        return f"Next: repair what says FAIL, then again: medfl site check {site.folder}"
    if result.scope.invitation is None:
        return f"Next: send {site.request.name} to the study lead; then medfl site review INVITATION"
    if result.scope.approval is None:
        return "Next: medfl site review INVITATION, then medfl site approve INVITATION --by NAME"
    return f"Next: medfl site join {result.scope.approval.study_id} --site {site.folder}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def watching(console: Console) -> tuple[Callable[[], None], Callable[[str, int, int], None]]:
    """A line that says what is going on: how to end it, and how to change it."""
    status = console.status("looking around")
    status.start()

    def tell(what: str, done: int, count: int) -> None:
        status.update(what if count <= 1 else f"{what}: {done} of {count}")

    return status.stop, tell
