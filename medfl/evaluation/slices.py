"""Rows of image slices on one PNG, with colours, lines and words on them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from medfl.files import write_bytes

CELL, MARGIN, HEAD, FOOT, GAP = 1.65, 1.1, 0.25, 0.4, 0.04  # inches
DPI, TEXT = 110, 9
MUTED, YELLOW = "#5b6875", "#ffd54a"
LINES = 16  # of a grid, across the longer side


class Slices:
    """Cells of one size: `columns` have titles, and each row shows one slice of a volume."""

    def __init__(
        self, like: Tensor, rows: int, columns: Sequence[str], *, spacing: Sequence[float], foot: float = 0.0
    ) -> None:
        """Empty cells.

        Args:
            like: a volume (*S), of the shape and with the `spacing` in mm of all that will be shown.
            foot: inches below the rows; `legend` and `scale` need `FOOT`.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        across, along = (spacing[1], spacing[0]) if like.ndim == 2 else (spacing[0], spacing[1])
        self.shape = plane(like, 0).shape
        self.tall = CELL * min(2.0, max(0.5, self.shape[0] * along / (self.shape[1] * across)))
        self.width = MARGIN + (CELL + GAP) * len(columns)
        self.height = HEAD + (self.tall + GAP) * rows + foot
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))  # in inches from the top left corner
        self.axes.set_axis_off()
        for column, title in enumerate(columns):
            left, right, _, top = self._extent(0, column)
            self.axes.text((left + right) / 2, top - 0.07, title, ha="center", fontsize=TEXT)

    def grey(self, row: int, column: int, shown: Tensor) -> None:
        """A slice (rows, columns) in [0, 1]."""
        self._show(row, column, shown, cmap="gray", vmin=0, vmax=1)

    def scaled(self, row: int, column: int, shown: Tensor, top: float) -> None:
        """A slice of amounts from 0 to `top`."""
        self._show(row, column, shown, cmap="viridis", vmin=0, vmax=top)

    def colours(self, row: int, column: int, shown: Tensor, colours: Mapping[int, str]) -> None:
        """Labels over what is there, half transparent."""
        from matplotlib.colors import to_rgb

        paint = torch.zeros(*shown.shape, 4)
        for label, colour in colours.items():
            paint[shown == label] = torch.tensor([*to_rgb(colour), 0.6])
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
        """Words at the left of a row."""
        left, _, bottom, top = self._extent(row, 0)
        words = "\n".join(lines)
        self.axes.text(left - 0.08, (bottom + top) / 2, words, ha="right", va="center", fontsize=TEXT - 1)

    def words(self, row: int, column: int, text: str) -> None:
        """Words where there is nothing to show."""
        left, right, bottom, top = self._extent(row, column)
        middle = (left + right) / 2, (bottom + top) / 2
        self.axes.text(*middle, text, ha="center", va="center", fontsize=TEXT - 1, color=MUTED)

    def legend(self, colours: Mapping[str, str]) -> None:
        """Name -> colour, at the bottom."""
        from matplotlib.patches import Patch

        keys = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
        self.figure.legend(handles=keys, loc="lower center", ncols=len(keys), fontsize=TEXT - 2, frameon=False)

    def scale(self, column: int, top: float) -> None:
        """What the colours of `scaled` mean, below a column."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        left, _, _, _ = self._extent(0, column)
        place = (left / self.width, 0.65 * FOOT / self.height, CELL / self.width, 0.25 * FOOT / self.height)
        axes = self.figure.add_axes(place)
        self.figure.colorbar(ScalarMappable(Normalize(0, top), "viridis"), cax=axes, orientation="horizontal")
        axes.tick_params(labelsize=TEXT - 2, length=2, pad=1)

    def save(self, path: Path) -> Path:
        """Write a PNG that this user alone can read; equal pictures have equal bytes.

        Raises:
            ResourceError: the disk is full.
        """
        self.axes.set_xlim(0, self.width)
        self.axes.set_ylim(self.height, 0)
        content = io.BytesIO()
        self.figure.savefig(content, format="png", metadata={"Software": None})
        write_bytes(path, content.getvalue())
        path.chmod(0o600)
        return path

    def _show(self, row: int, column: int, shown: Tensor, **style: object) -> None:
        self.axes.imshow(
            shown, extent=self._extent(row, column), aspect="auto", interpolation="nearest", **style  # type: ignore[arg-type]
        )  # fmt: skip

    def _extent(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, right, bottom and top of a cell, in inches from the top left corner."""
        left, top = MARGIN + (CELL + GAP) * column, HEAD + (self.tall + GAP) * row
        return left, left + CELL, top + self.tall, top


def plane(volume: Tensor, place: int) -> Tensor:
    """(rows, columns) to show of (*S): 2D as it is; of RAS axes the axial slice as radiologists see it, front up."""
    shown: Tensor = volume if volume.ndim == 2 else volume[..., place].T.flip(0, 1)
    return shown


def plane_moves(u: Tensor, place: int) -> Tensor:
    """The displacement within that slice, (2, rows, columns) down and to the right, of (d, *S) along the axes."""
    shown = torch.stack([plane(part, place) for part in u[:2]])
    return shown if u.ndim == 3 else -shown.flip(0)  # rows run against the second axis, columns against the first
