"""Figures of scores, beside those over the rounds: shares of labels, curves in the unit square, violins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from medfl.evaluation.metrics import Array
from medfl.report import figures
from medfl.report.figures import INKS, TEXT, Series
from medfl.report.summary import Estimate
from medfl.report.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SQUARE = 300  # height of a panel of the unit square
Corner = Literal["lower right", "lower left", "upper left"]
UPRIGHT = 4  # names below a figure that stand side by side
LEVELS = 61  # of probability, of a violin
KERNEL = 0.05  # of probability, standard deviation
DODGE = 0.02  # of the range of shares, between the intervals of two lines at one share


@dataclass(frozen=True)
class Efficiency:
    """The scores of one arm by share of the labels."""

    label: str
    estimates: dict[float, Estimate]
    ink: str
    strong: bool


@dataclass(frozen=True)
class Curve:
    """A line in the unit square; `marked`: its points are shown."""

    label: str
    x: Array
    y: Array
    ink: str
    strong: bool
    marked: bool = False


@dataclass(frozen=True)
class Violin:
    """How many images have a probability in each bin: `edges` (B + 1,), `counts` (B,), not all 0."""

    label: str
    edges: Array
    counts: Array
    ink: str


def shares(title: str, unit: str, lines: Sequence[Efficiency], limits: tuple[float, float]) -> str:
    """Scores with their 95 % intervals over the share of labels, on a logarithmic axis, as SVG."""
    ticks = sorted({share for line in lines for share in line.estimates})
    room = DODGE * math.log(ticks[-1] / ticks[0])
    with figures.style(title):
        figure, axes = figures.canvas(figures.HEIGHT)
        figure.subplots_adjust(left=0.135, right=0.77, top=0.92, bottom=0.19)
        axes.set_xscale("log")
        for place, line in enumerate(lines):
            shift = math.exp(room * (place - (len(lines) - 1) / 2))
            _efficiency(axes, line, shift)
        axes.set_ylim(*limits)
        axes.set_xlim(ticks[0] / math.exp(3 * room), ticks[-1] * math.exp(3 * room))
        axes.set_xticks(ticks, [percent(share) for share in ticks])
        axes.minorticks_off()
        axes.set_xlabel("labels used, of all at each site", color=INKS["muted"])
        axes.text(0, 1.03, unit, transform=axes.transAxes, size=TEXT - 1, color=INKS["muted"])
        axes.grid(axis="y", color=INKS["line"], lw=0.7)
        axes.locator_params(axis="y", nbins=5)
        figures.label_ends(axes, [_series(line) for line in lines])
        return figures.svg(figure, title)


def square(title: str, x: str, y: str, lines: Sequence[Curve], *, diagonal: bool, legend: Corner) -> str:
    """Lines in the unit square as SVG. `legend`: the corner where nothing is drawn, such as "lower right"."""
    with figures.style(title):
        figure, axes = figures.canvas(SQUARE)
        figure.subplots_adjust(left=0.135, right=0.97, top=0.93, bottom=0.15)
        if diagonal:
            axes.plot([0, 1], [0, 1], color=INKS["muted"], lw=0.8, ls=(0, (3, 3)))
        for line in lines:
            axes.plot(line.x, line.y, color=INKS[line.ink], lw=2.4 if line.strong else 1.2, label=line.label,
                      marker="o" if line.marked else "", ms=4)  # fmt: skip
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_xlabel(x, color=INKS["muted"])
        axes.text(0, 1.03, y, transform=axes.transAxes, size=TEXT - 1, color=INKS["muted"])
        axes.grid(color=INKS["line"], lw=0.7)
        axes.legend(loc=legend, frameon=False, fontsize=TEXT - 1, labelcolor="linecolor", handlelength=1.2)
        return figures.svg(figure, title)


def violins(title: str, unit: str, parts: Sequence[Violin]) -> str:
    """One shape for each part, as wide at each probability as images have it, as SVG."""
    with figures.style(title):
        figure, axes = figures.canvas(figures.HEIGHT)
        many = len(parts) > UPRIGHT
        figure.subplots_adjust(left=0.17 if many else 0.135, right=0.97, top=0.92, bottom=0.27 if many else 0.12)
        for place, part in enumerate(parts):
            _violin(axes, place, part)
        axes.set_xlim(-0.6, len(parts) - 0.4)
        axes.set_ylim(-0.01, 1.01)
        axes.set_xticks(range(len(parts)), [figures.short(part.label) for part in parts])
        if many:
            axes.tick_params(axis="x", labelrotation=45)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.text(0, 1.03, unit, transform=axes.transAxes, size=TEXT - 1, color=INKS["muted"])
        axes.grid(axis="y", color=INKS["line"], lw=0.7)
        return figures.svg(figure, title)


def _efficiency(axes: "Axes", line: Efficiency, shift: float) -> None:
    ink, points = INKS[line.ink], sorted(line.estimates.items())
    for share, known in points:
        if known.low is not None and known.high is not None:
            axes.plot([share * shift] * 2, [known.low, known.high], color=ink, lw=1, solid_capstyle="butt")
    axes.plot([share * shift for share, _ in points], [known.value for _, known in points], color=ink,
              lw=2.4 if line.strong else 1.2, marker="o", ms=4.5)  # fmt: skip


def _series(line: Efficiency) -> Series:
    shares = sorted(line.estimates)
    return Series(line.label, tuple(shares), tuple(line.estimates[s].value for s in shares), line.ink, line.strong)


def _violin(axes: "Axes", place: int, part: Violin) -> None:
    """Density of images, smoothed by a normal kernel that is mirrored at 0 and 1; the widest place is 0.8 wide."""
    levels = np.linspace(0, 1, LEVELS)
    middle = (part.edges[1:] + part.edges[:-1]) / 2
    kernels = sum(np.exp(-(((levels[:, None] - end) / KERNEL) ** 2) / 2) for end in (middle, -middle, 2 - middle))
    density = kernels @ part.counts
    width = 0.4 * density / density.max()
    axes.fill_betweenx(levels, place - width, place + width, facecolor=INKS[part.ink], edgecolor="none", alpha=0.6)
    axes.plot([place, place], [0, 1], color=INKS["muted"], lw=0.5)
