"""The contact sheet of a curation: what was kept, what was refused and why, on one picture for the people at a site."""

import io
from pathlib import Path

import torch
from torch import Tensor

from medfl.files import write_bytes
from medfl.synthesis.curation import COPIES, KEPT, REASONS, Curation

PER_ROW = 12
CELL = 0.8  # inches
DPI = 120


def contact_sheet(path: Path, images: Tensor, curation: Curation, *, real: Tensor) -> None:
    """Write a PNG: one row of examples for each verdict, copies with the training image that they are like below.

    Args:
        images: the candidates (N, C, *S), in the curation's order; of volumes, the central slices are shown.
        real: the training images (n, C, *S).

    Raises:
        ResourceError: the disk is full.
    """
    from matplotlib.figure import Figure

    rows = _rows(images, curation, real)
    figure = Figure(figsize=(CELL * PER_ROW + 2.2, CELL * max(1, len(rows)) + 0.2), dpi=DPI, facecolor="white")
    grid = figure.subplots(max(1, len(rows)), PER_ROW + 1, squeeze=False, width_ratios=[2.2 / CELL] + [1] * PER_ROW)
    for axes, (title, shown) in zip(grid, rows, strict=False):
        axes[0].text(1, 0.5, title, ha="right", va="center", fontsize=9, linespacing=1.3)
        for axis, image in zip(axes[1:], shown, strict=False):
            axis.imshow(_pixels(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for axis in grid.flat:
        axis.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())


def _rows(images: Tensor, curation: Curation, real: Tensor) -> list[tuple[str, Tensor]]:
    """Title and examples of every verdict that occurs: kept ones the best first, then refused ones."""
    found = []
    for reason in REASONS:
        places = [place for place, given in enumerate(curation.reasons) if given == reason]
        if not places:
            continue
        shown = (curation.kept if reason == KEPT else torch.tensor(places))[:PER_ROW]
        text = f"kept\n{len(places)}" if reason == KEPT else f"refused: {reason}\n{len(places)}"
        found.append((text, images[shown]))
        if reason in COPIES:
            found.append(("the training image\neach is like", real[curation.scores["nearest"][shown]]))
    return found


def _pixels(image: Tensor) -> Tensor:
    """(H, W) or (H, W, 3) in [0, 1] of an image (C, *S); the central slice of a volume, the first of other channels."""
    flat = image if image.ndim == 3 else image[:, image.shape[1] // 2]
    shown = ((torch.nan_to_num(flat.float()) + 1) / 2).clamp(0, 1).cpu()
    return shown.movedim(0, -1) if len(shown) == 3 else shown[0]
