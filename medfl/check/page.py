"""private.html: everything that was found, with the names of files. One offline page that stays at the site."""

from collections.abc import Sequence
from typing import Any

from medfl.check import fit, sheet
from medfl.check.finding import GROUPS, MOST_ITEMS, NOTHING, RANK, Finding, number, worst
from medfl.check.run import Result, Verdict
from medfl.check.table import next_step, summary
from medfl.check.template import PAGE, STYLE
from medfl.report.style import STYLE as REPORT_STYLE

MOST_FILES = 5000


def render(result: Result) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    scope, invited = result.scope, result.scope.invitation
    return environment.from_string(PAGE).render(
        style=REPORT_STYLE + STYLE,
        site=scope.site.site,
        data=scope.data,
        study="the default study" if invited is None else f"{invited.name}, {invited.study_id}",
        state=worst(result.findings),
        summary=summary(result),
        next_step=next_step(result),
        tiles=_tiles(result),
        groups=_groups(result.findings),
        pictures=[] if result.fit is None else sheet.pictures(result.fit.views),
        volumes=result.fit is not None and result.fit.views.ndim == 5,
        files=[_file(verdict) for verdict in result.verdicts[:MOST_FILES]],
        left_out=max(len(result.verdicts) - MOST_FILES, 0),
    )


def _tiles(result: Result) -> list[tuple[str, str]]:
    usable = sum(not verdict.text for verdict in result.verdicts)
    tiles = [
        (str(number(result.findings, "fail")), "problems"),
        (str(number(result.findings, "warn")), "warnings"),
    ]
    if result.verdicts:
        tiles.append((f"{usable} of {len(result.verdicts)}", "images can be used"))
    times = [one.counts["minutes"] for one in result.findings if (one.group, one.name) == ("fit", "time")]
    return [*tiles, *((fit.span(minutes), "a round, about") for minutes in times)]


def _groups(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Groups with a problem first, and in each the findings likewise."""
    found = []
    for group, title in GROUPS.items():
        members = sorted((one for one in findings if one.group == group), key=lambda one: RANK[one.state])
        if members:
            shown = [one for one in members if one.what != NOTHING]
            rows = [(one, one.items[:MOST_ITEMS], len(one.items[MOST_ITEMS:])) for one in shown]
            clean = ", ".join(one.name for one in members if one.what == NOTHING)
            found.append({"title": title, "state": worst(members), "rows": rows, "clean": clean})
    return sorted(found, key=lambda one: RANK[one["state"]])


def _file(verdict: Verdict) -> dict[str, str]:
    seen = verdict.seen
    return {
        "name": verdict.name,
        "split": verdict.split,
        "text": verdict.text or "can be used",
        "state": "fail" if verdict.text else "pass",
        "size": " x ".join(map(str, seen.shape)),
        "spacing": " x ".join(f"{mm:.3g}" for mm in seen.spacing),
        "values": f"{seen.low:.4g} to {seen.high:.4g}" if seen.shape else "",
    }
