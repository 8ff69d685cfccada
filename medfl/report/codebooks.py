"""The section on codebooks: how all sites together use the common codes, and how each site does."""

import math
from collections.abc import Mapping, Sequence

from medfl.report.cells import NONE, Section
from medfl.report.figures import Panel, Series
from medfl.report.panels import COLOURS, Drawn, draw, line_of, thinned
from medfl.report.remarks import spoken
from medfl.report.tables import Run, ordered_sites

ARM, PREFIX = "federated", "codebook/"  # of the events
SHARES = ("dead", "rare", "exclusivity")  # drawn from 0 to 1, so that a small one looks small
CURVES = {  # kind -> (caption, unit, how to read it)
    "perplexity": (
        "Codes in use",
        "perplexity",
        "The number of codes that would be as varied if all were used alike. A fall means that codes are lost.",
    ),
    "dead": (
        "Dead codes",
        "share of the codes",
        "Codes that hardly get a token from all sites together. 0 is best.",
    ),
    "drift": (
        "Drift of the codes",
        "distance",
        "How far a code moved in the round, in the mean; codes have length 1. It should settle.",
    ),
}
MORE = {  # folded away
    "rare": (
        "Codes of one site only",
        "share of the codes",
        "Codes that exactly one site uses. 0 means that the sites share all codes.",
    ),
    "exclusivity": (
        "Codes split between sites",
        "largest share of one site",
        "1 / number of sites if all sites use all codes alike, 1 if each site has codes of its own.",
    ),
    "revived": (
        "Revived codes",
        "codes",
        "Dead codes that were placed anew in the round, beside codes that have too much to tell.",
    ),
}
COLUMNS = {  # kind -> (heading, how to read it)
    "js": (
        "Usage divergence",
        "how differently the site uses the codes than all sites together (Jensen-Shannon, nats). 0 is alike, 0.69 "
        "has nothing in common. A site with most of the images is most of the whole, and so lies near it.",
    ),
    "exclusive": (
        "Exclusive share",
        "share of the site's tokens in codes that no other site uses. Much of it is a language of its own, or only "
        "far more images than the others have.",
    ),
    "error": (
        "Quantisation error",
        "mean squared distance of a token to its code. Lower is closer; a site far above the others is served badly "
        "by the common codes.",
    ),
    "index_alarm": (
        "Index alarm",
        "share of the site's tokens under codes from which their mean lies farther than from another code. It must "
        "be 0: else the site works with other codes than it was sent.",
    ),
}


def section(run: Run) -> Section:
    """The codebooks of the federated arm for the template, {} where no event tells of one."""
    books = _books(run)
    if not books:
        return {}
    sizes, rows = _sizes(run), _rows(run)
    return {
        "sizes": ", ".join(
            f"{short} ({sizes[name]} codes)" if name in sizes else short for name, short in books.items()
        ),
        "figures": [drawn for kind, words in CURVES.items() if (drawn := _figure(run, kind, *words))],
        "more": [drawn for kind, words in MORE.items() if (drawn := _figure(run, kind, *words))],
        "round": _last(run),
        "columns": [COLUMNS[kind] for kind in _kinds(run)],
        "rows": rows,
        "alarms": index_alarms(run),
    }


def index_alarms(run: Run) -> list[str]:
    """One sentence for each site that worked with other codes than the broadcast ones, in whatever round."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for event in run.events:
        if event.arm == ARM and event.name.startswith(PREFIX) and event.value > 0:
            book, _, kind = event.name.removeprefix(PREFIX).rpartition("/")
            if kind == "index_alarm":
                found.setdefault(event.site, {}).setdefault(_short(book), []).append((event.round, event.value))
    return [
        f"Index alarm: {site} counted tokens under codes that do not fit them: {_told(books)}. It does not work with "
        "the codes that it was sent; check its release and its data."
        for site, books in sorted(found.items())
    ]


def _told(books: Mapping[str, list[tuple[int, float]]]) -> str:
    """ "fine (rounds 2-3, up to 12 % of its tokens)"."""
    return ", ".join(
        f"{book} ({spoken(at for at, _ in points)}, up to {_percent(max(value for _, value in points))} of its tokens)"
        for book, points in books.items()
    )


def _books(run: Run) -> dict[str, str]:
    """Names of the codebooks, in the order of the record -> names to show."""
    books = [name.removeprefix(PREFIX).rpartition("/")[0] for name, _ in _recorded(run)]
    return {book: _short(book) for book in books}


def _recorded(run: Run) -> list[tuple[str, str]]:
    """(name, site) of the lines of the federated arm that tell of a codebook."""
    return [(name, site) for name, arm, site in run.lines if arm == ARM and name.startswith(PREFIX)]


def _short(book: str) -> str:
    """ "fine" of "scales.fine.quantizer"."""
    return book.removeprefix("scales.").removesuffix(".quantizer")


def _sizes(run: Run) -> dict[str, int]:
    """Codes of each codebook, as far as wire.csv tells: the length of its counts."""
    return {
        row.name.removesuffix(".counts"): int(row.shape)
        for row in run.crossings
        if row.role == "codebook" and row.name.endswith(".counts") and row.shape.isdecimal() and int(row.shape)
    }


def _figure(run: Run, kind: str, caption: str, unit: str, note: str) -> Drawn | None:
    """One line per codebook; perplexity as a share of the codes where their number is known."""
    books, sizes = _books(run), _sizes(run)
    relative = kind == "perplexity" and books.keys() <= sizes.keys()
    lines = []
    for index, (book, short) in enumerate(books.items()):
        if line := line_of(run, f"{PREFIX}{book}/{kind}", ARM, ""):
            rounds, values = line
            whole = sizes[book] if relative else 1
            lines.append(Series(short, rounds, tuple(value / whole for value in values), _ink(index, len(books))))
    if not lines:
        return None
    unit = "perplexity / number of codes" if relative else unit
    top = 1.0 if relative or kind in SHARES else _top(lines)
    return draw(Panel(caption, unit, thinned(lines), (-0.02 * top, 1.02 * top)), note)


def _top(lines: Sequence[Series]) -> float:
    """The largest value, 1 where all are 0."""
    return max(value for line in lines for value in line.values if math.isfinite(value)) or 1.0


def _ink(index: int, books: int) -> str:
    return f"s{index + 1}" if books <= COLOURS else "muted"


def _last(run: Run) -> int:
    return max(run.lines[name, ARM, site][-1][0] for name, site in _recorded(run))


def _kinds(run: Run) -> list[str]:
    """The columns that were measured: the index alarm, for one, is not under every rule."""
    seen = {name.rpartition("/")[2] for name, site in _recorded(run) if site}
    return [kind for kind in COLUMNS if kind in seen]


def _rows(run: Run) -> list[Section]:
    """Codebook by codebook the sites, in the last round; a site that did not answer then has no values."""
    known = {site for _, site in _recorded(run)}
    sites = [site for site in ordered_sites(run) if site in known]
    return [
        {
            "book": short,
            "height": 0 if index else len(sites),
            "site": site,
            "cells": [_cell(kind, _value(run, f"{PREFIX}{book}/{kind}", site)) for kind in _kinds(run)],
        }
        for book, short in _books(run).items()
        for index, site in enumerate(sites)
    ]


def _value(run: Run, name: str, site: str) -> float:
    return dict(run.lines.get((name, ARM, site), ())).get(_last(run), math.nan)


def _cell(kind: str, value: float) -> tuple[str, bool]:
    """The text, and whether it is an alarm."""
    if not math.isfinite(value):
        return NONE, False
    alarm = kind == "index_alarm" and value > 0
    return (_percent(value) if kind in ("exclusive", "index_alarm") else f"{value:.3f}") + " !" * alarm, alarm


def _percent(share: float) -> str:
    """A small one is not rounded to nothing."""
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else "< 0.1 %"
