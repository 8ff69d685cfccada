"""The page's figures: small panels that wrap on a phone, as inline SVG that takes its colours from the page.

Colours are drawn as markers ("inks") and replaced by CSS variables, so that one file is right on light and
dark screens and in print. Nothing here touches matplotlib's global state outside `style`.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INKS = {"ink": "#01010a", "muted": "#01010b", "line": "#01010c", "paper": "#01010d", "accent": "#01010e"}
INKS |= {f"s{n}": f"#02020{n}" for n in range(1, 9)}
ARM_INKS = {"random": "muted", "local": "s2", "federated": "accent", "central": "ink"}
WIDTH, HEIGHT, TEXT = 340, 224, 11.5  # units of the SVG, one per CSS pixel at its natural size
LABEL = 12  # characters of a direct label
LETTER = 5.6  # width of a small letter


@dataclass(frozen=True)
class Series:
    """One line: values over rounds, with its name at its end. NaN makes a gap."""

    label: str
    rounds: tuple[float, ...]
    values: tuple[float, ...]
    ink: str
    strong: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over the rounds of one quantity. `limits` are shared where panels are compared.

    `marks` are (round, name) of what begins at a round, drawn as a line before it.
    """

    title: str
    unit: str
    series: tuple[Series, ...]
    limits: tuple[float, float] | None = None
    marks: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Dot:
    """One row of an interval panel; no value is drawn as words."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    ink: str


def curves(panel: Panel) -> str:
    """A panel as SVG."""
    with style(panel.title):
        figure, axes = canvas(HEIGHT)
        figure.subplots_adjust(left=0.135, right=0.77, top=0.92, bottom=0.19)
        for series in panel.series:
            marker = "o" if len(series.rounds) == 1 else ""
            width = 2.4 if series.strong else 1.2
            axes.plot(series.rounds, series.values, color=INKS[series.ink], lw=width, marker=marker, ms=4)
        if panel.limits:
            axes.set_ylim(*panel.limits)
        _integer_rounds(axes, panel.series)
        _mark_starts(axes, panel.marks)
        axes.set_xlabel("round", color=INKS["muted"])
        axes.text(0, 1.03, panel.unit, transform=axes.transAxes, size=TEXT - 1, color=INKS["muted"])
        axes.grid(axis="y", color=INKS["line"], lw=0.7)
        axes.locator_params(axis="y", nbins=5)
        label_ends(axes, panel.series)
        return svg(figure, panel.title)


def intervals(title: str, unit: str, dots: Sequence[Dot], limits: tuple[float, float]) -> str:
    """Values with their 95 % intervals, one row each, as SVG; the rows' names at the left."""
    height = 44 + 25 * len(dots)
    with style(title):
        figure, axes = canvas(height)
        figure.subplots_adjust(left=0.23, right=0.86, top=1 - 4 / height, bottom=38 / height)
        for row, dot in enumerate(dots):
            _draw_dot(axes, row, dot, limits)
        axes.set_xlim(*limits)
        axes.set_ylim(len(dots) - 0.4, -0.6)
        axes.set_yticks(range(len(dots)), [dot.label for dot in dots])
        axes.tick_params(axis="y", labelcolor=INKS["ink"])
        axes.set_xlabel(unit, color=INKS["muted"])
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color=INKS["line"], lw=0.7)
        return svg(figure, title)


def limits_of(panels: Sequence[Sequence[Series]]) -> tuple[float, float] | None:
    """One value range for panels that are compared; None when nothing is finite."""
    values = [v for lines in panels for line in lines for v in line.values if math.isfinite(v)]
    return padded(values) if values else None


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values with some room at both ends."""
    low, high = min(values), max(values)
    room = share * (high - low) or max(abs(high), 1.0) * share
    return low - room, high + room


def short(label: str) -> str:
    """A name that fits beside a line; its end is kept, since names often differ only there."""
    return label if len(label) <= LABEL else f"{label[: LABEL - 5]}…{label[-4:]}"


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions near `wanted`, in its order, at least `gap` apart; those moved are centred on their group."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[tuple[float, int]] = []  # (centre, members), from low to high
    for index in order:
        centre, members = wanted[index], 1
        while groups and centre - groups[-1][0] < gap * (members + groups[-1][1]) / 2:
            before, count = groups.pop()
            centre = (centre * members + before * count) / (members + count)
            members += count
        groups.append((centre, members))
    placed = [centre + gap * (i - (members - 1) / 2) for centre, members in groups for i in range(members)]
    found = dict(zip(order, placed, strict=True))
    return [found[i] for i in range(len(wanted))]


def label_ends(axes: "Axes", lines: Sequence[Series]) -> None:
    """Each line's name beside its last finite value, moved apart where they would overlap."""
    ends = [(line, *last) for line in lines if (last := _last(line))]
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    heights = spread([(value - low) / (high - low) for _, _, value in ends], gap=0.085)
    above = max(0.0, *heights, 1.0) - 1.0  # labels pushed out at the top come down together
    for (line, at, value), pushed in zip(ends, heights, strict=True):
        height = pushed - above
        axes.annotate(
            short(line.label),
            xy=(at, value),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            size=TEXT - 1,
            weight="bold" if line.strong else "normal",
            color=INKS[line.ink],
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": INKS["muted"], "shrinkA": 1, "shrinkB": 1}
            if abs(height - (value - low) / (high - low)) > 0.03 or at < right - 0.5
            else None,
        )


def _draw_dot(axes: "Axes", row: int, dot: Dot, limits: tuple[float, float]) -> None:
    if dot.value is None:
        axes.text(limits[0], row, " not computed", va="center", size=TEXT - 1, color=INKS["muted"])
        return
    ink = INKS[dot.ink]
    if dot.low is not None and dot.high is not None:
        axes.plot([dot.low, dot.high], [row, row], color=ink, lw=2, solid_capstyle="butt")
    axes.plot([dot.value], [row], "o", color=ink, ms=7, mec=INKS["paper"], mew=1)
    weight, place = "bold" if dot.ink == "accent" else "normal", axes.get_yaxis_transform()
    axes.text(1.03, row, f"{dot.value:.3f}", weight=weight, transform=place, va="center", color=ink)


def _last(line: Series) -> tuple[float, float] | None:
    finite = [(at, value) for at, value in zip(line.rounds, line.values, strict=True) if math.isfinite(value)]
    return finite[-1] if finite else None


def _integer_rounds(axes: "Axes", lines: Sequence[Series]) -> None:
    rounds = sorted({int(at) for line in lines for at in line.rounds})
    if not rounds:
        return
    step = math.ceil(max(rounds[-1] - rounds[0], 1) / 8)
    axes.set_xticks(range(rounds[0], rounds[-1] + 1, step))
    axes.set_xlim(rounds[0] - 0.05 * step, rounds[-1] + 0.05 * step)


def _mark_starts(axes: "Axes", marks: Sequence[tuple[int, str]]) -> None:
    """A dashed line before each start inside the panel, and the names that fit above their part of it."""
    low, high = axes.get_xlim()
    width = (high - low) / (0.635 * WIDTH)  # rounds per unit of the SVG
    ends = [at - 0.5 for at, _ in marks[1:]] + [high]
    for (at, name), end in zip(marks, ends, strict=False):
        begin = max(low, at - 0.5)
        if begin > low:
            axes.axvline(begin, color=INKS["muted"], lw=0.8, ls=(0, (3, 3)))
        if (min(end, high) - begin) / width > LETTER * len(name):
            axes.text(begin + 2 * width, 1.03, name, transform=axes.get_xaxis_transform(), size=TEXT - 2,
                      color=INKS["muted"])  # fmt: skip


def canvas(height: float) -> tuple["Figure", "Axes"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INKS["muted"])
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INKS["muted"])
    return figure, axes


@contextmanager
def style(salt: str) -> Iterator[None]:
    """Settings that matplotlib takes from its global table only; names are never read as TeX."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "text.usetex": False,
        "font.size": TEXT,
        "font.family": "DejaVu Sans",
        "axes.unicode_minus": True,
        "path.simplify": True,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The browser draws the text with its own fonts: a character that matplotlib lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def svg(figure: "Figure", title: str) -> str:
    """Inline SVG: no prolog, no namespace addresses, no fixed size, CSS variables for colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", text)
    named = f'<svg role="img" aria-label="{html.escape(title)}"'
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', lambda _: named, text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # ids of groups repeat from figure to figure; nothing refers to them
    text = re.sub(r'( d| x| y| transform)="([^"]*)"', lambda m: f'{m[1]}="{_two_digits(m[2])}"', text)
    text = text.replace("font-family: 'DejaVu Sans'; ", "")  # the page's own font
    for name, ink in INKS.items():
        text = text.replace(ink, f"var(--{name})")
    return re.sub(r"\s*\n\s*", "\n", text)


def _two_digits(numbers: str) -> str:
    """A hundredth of a CSS pixel is enough."""
    return re.sub(r"(\.\d\d)\d+", r"\1", numbers)
