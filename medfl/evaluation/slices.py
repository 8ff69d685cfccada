"""Rows of image slices in one figure, with colours, lines and words on them; and figures as PNG files."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medfl.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, MARGIN, HEAD, FOOT, GAP = 1.65, 1.1, 0.25, 0.4, 0.04  # inches
DPI, TEXT = 110, 9
MUTED, YELLOW, ORANGE = "#5b6875", "#ffd54a", "#e69f00"
LINES = 16  # of a grid, across the longer side
NAME = 16  # characters of a line beside a row
KEYS, KEY = 3, 0.16  # of a legend, in one line; inches of a line
OPACITY, HEAT = 0.6, 0.8  # of labels and of the largest amount over an image


class Slices:
    """Cells of one size: `columns` have titles, and each row shows one slice of a volume."""

    def __init__(
        self, like: Tensor, rows: int, columns: Sequence[str], *, spacing: Sequence[float], foot: float = 0.0
    ) -> None:
        """Empty cells.

        Args:
            like: a volume (*S), of the shape and with the `spacing` in mm of all that will be shown.
            foot: inches below the rows; `scale` and `note` need `FOOT`, `legend` needs `legend_foot`.
        """
        across, along = (spacing[1], spacing[0]) if like.ndim == 2 else (spacing[0], spacing[1])
        self.shape = plane(like, 0).shape
        self.tall = CELL * min(2.0, max(0.5, self.shape[0] * along / (self.shape[1] * across)))
        self.width = MARGIN + (CELL + GAP) * len(columns)
        self.height = HEAD + (self.tall + GAP) * rows + foot
        self.figure = new_figure(self.width, self.height)
        self.axes = self.figure.add_axes((0, 0, 1, 1))  # in inches from the top left corner
        self.axes.set_xlim(0, self.width)
        self.axes.set_ylim(self.height, 0)
        self.axes.set_axis_off()
        for column, title in enumerate(columns):
            left, right, _, top = self._extent(0, column)
            self._text((left + right) / 2, top - 0.07, title, ha="center", fontsize=TEXT)

    def image(self, row: int, column: int, shown: Tensor) -> None:
        """A slice (rows, columns) of greys, or (rows, columns, 3) of colours, in [0, 1]."""
        self._show(row, column, shown, cmap="gray", vmin=0, vmax=1)

    def scaled(self, row: int, column: int, shown: Tensor, top: float) -> None:
        """A slice of amounts from 0 to `top`."""
        self._show(row, column, shown, cmap="viridis", vmin=0, vmax=top)

    def heat(self, row: int, column: int, shown: Tensor) -> None:
        """Amounts in [0, 1] over what is there: 0 leaves it as it is, 1 is orange."""
        from matplotlib.colors import to_rgb

        paint = torch.tensor(to_rgb(ORANGE)).expand(*shown.shape, 3)
        self._show(row, column, torch.cat([paint, HEAT * shown[..., None]], dim=-1))

    def colours(
        self, row: int, column: int, shown: Tensor, colours: Mapping[int, str], *, opacity: float = OPACITY
    ) -> None:
        """Labels over what is there; those without a colour leave it as it is."""
        from matplotlib.colors import to_rgb

        paint = torch.zeros(*shown.shape, 4)
        for label, colour in colours.items():
            paint[shown == label] = torch.tensor([*to_rgb(colour), opacity])
        self._show(row, column, paint)

    def grid(self, row: int, column: int, moves: Tensor) -> None:
        """A regular grid whose points are moved by (2, rows, columns), in pixels down and to the right."""
        left, right, bottom, top = self._extent(row, column)
        height, width = moves.shape[1:]
        at = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")) + moves + 0.5
        y = top + (bottom - top) * (at[0] / height).clamp(0, 1)
        x = left + (right - left) * (at[1] / width).clamp(0, 1)
        step = max(1, round(max(height, width) / LINES))
        self.axes.plot(x[step // 2 :: step].T, y[step // 2 :: step].T, color=YELLOW, lw=0.6)
        self.axes.plot(x[:, step // 2 :: step], y[:, step // 2 :: step], color=YELLOW, lw=0.6)

    def title(self, row: int, *lines: str) -> None:
        """Words at the left of a row; long lines are broken."""
        left, _, bottom, top = self._extent(row, 0)
        words = "\n".join(part for line in lines for part in textwrap.wrap(line, NAME))
        self._text(left - 0.08, (bottom + top) / 2, words, ha="right", va="center", fontsize=TEXT - 1)

    def words(self, row: int, column: int, text: str) -> None:
        """Words where there is nothing to show."""
        left, right, bottom, top = self._extent(row, column)
        middle = (left + right) / 2, (bottom + top) / 2
        self._text(*middle, text, ha="center", va="center", fontsize=TEXT - 1, color=MUTED)

    def note(self, *lines: str) -> None:
        """Words for the reader, below all rows: two lines in a foot of `FOOT`."""
        self._text(0.08, self.height - 0.05, "\n".join(lines), va="bottom", fontsize=TEXT - 2, color=MUTED)

    def legend(self, colours: Mapping[str, str]) -> None:
        """Name -> colour, at the bottom."""
        from matplotlib.patches import Patch

        keys = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
        ncols = min(KEYS, len(keys))
        self.figure.legend(handles=keys, loc="lower center", ncols=ncols, fontsize=TEXT - 2, frameon=False)

    def scale(self, column: int, top: float) -> None:
        """What the colours of `scaled` mean, below a column."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        left, _, _, _ = self._extent(0, column)
        left, across = (left + 0.05 * CELL) / self.width, 0.9 * CELL / self.width  # room for the last number
        place = (left, 0.65 * FOOT / self.height, across, 0.25 * FOOT / self.height)
        axes = self.figure.add_axes(place)
        self.figure.colorbar(ScalarMappable(Normalize(0, top), "viridis"), cax=axes, orientation="horizontal")
        axes.tick_params(labelsize=TEXT - 2, length=2, pad=1)

    def _show(self, row: int, column: int, shown: Tensor, **style: object) -> None:
        self.axes.imshow(
            shown, extent=self._extent(row, column), aspect="auto", interpolation="nearest", **style  # type: ignore[arg-type]
        )  # fmt: skip

    def _text(self, x: float, y: float, words: str, **style: Any) -> None:
        self.axes.text(x, y, words, parse_math=False, **style)

    def _extent(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a cell, in inches from the top left corner."""
        left, top = MARGIN + (CELL + GAP) * column, HEAD + (self.tall + GAP) * row
        return left, left + CELL, top + self.tall, top


def legend_foot(keys: int) -> float:
    """Inches for a legend of so many keys below the rows."""
    return FOOT + KEY * max(0, -(-keys // KEYS) - 1)


def new_figure(width: float, height: float) -> "Figure":
    """An empty white figure, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: "Figure", path: Path) -> Path:
    """Write a PNG that this user alone can read; equal pictures have equal bytes.

    Raises:
        ResourceError: the disk is full.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue())
    path.chmod(0o600)
    return path


def picture(look: Tensor, place: int) -> Tensor:
    """What `Slices.image` shows of greys (1, *S) or colours (3, *S)."""
    shown = torch.stack([plane(channel, place) for channel in look], dim=-1)
    return shown if len(look) > 1 else shown[..., 0]


def plane(volume: Tensor, place: int) -> Tensor:
    """(rows, columns) to show of (*S): 2D as it is; of RAS axes the axial slice as radiologists see it, front up."""
    shown: Tensor = volume if volume.ndim == 2 else volume[..., place].T.flip(0, 1)
    return shown


def plane_moves(u: Tensor, place: int) -> Tensor:
    """The displacement within that slice, (2, rows, columns) down and to the right, of (d, *S) along the axes."""
    shown = torch.stack([plane(part, place) for part in u[:2]])
    return shown if u.ndim == 3 else -shown.flip(0)  # rows run against the second axis, columns against the first


def caption(row: int, volume: Tensor, place: int) -> list[str]:
    """Which image of the test split, and which of its slices."""
    return [f"test image {row + 1}", *([f"slice {place + 1} of {volume.shape[-1]}"] if volume.ndim == 3 else [])]
