"""Pictures of a site's own test images, drawn and kept at the site for the people there. They never travel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfl.data.sample import SiteData, Split, labelled, present
from medfl.evaluation.slices import FOOT, Slices, plane, plane_moves
from medfl.evaluation.volumes import mean_of_present, windowed
from medfl.methods.base import Method
from medfl.study import Evaluation

FOLDER = "pictures"  # in a site's state folder
FUSION, SEGMENTATION, FIELD = "fusion.png", "segmentation.png", "field.png"
SUBJECTS = 3
LABELS = {  # in a mask -> (name, colour)
    3: ("ET: enhancing tumour", "#e69f00"),
    1: ("NCR: necrotic or non-enhancing core", "#56b4e9"),
    2: ("ED: oedema", "#009e73"),
}
LEAST = 1.0  # mm at the top of the scale of movements: rounding is no movement


def folder_of(state_dir: Path, site: str, arm: str) -> Path:
    """Where a site keeps its pictures of an arm."""
    return state_dir / FOLDER / site / arm.replace(":", "-")


@torch.no_grad()
def draw(
    method: Method, data: SiteData, state_dir: Path, device: torch.device, *, arm: str, plan: Evaluation
) -> list[Path]:
    """Draw what can be drawn of up to three test images; returns the files, readable for this user alone.

    `FUSION` and `FIELD` need images of two modalities, `SEGMENTATION` takes labelled images first, `FIELD` needs a
    method with `matching`. Every arm is shown on the same images; no patient's id is in a picture.

    Args:
        method: in eval mode; its encoder has `fuse`: (B, M, *S) -> (B, 1, *S), and `segment` -> logits (B, 4, *S).
            With `matching` it has `match`: (B, M, *S) -> a result with `field` u (B, d, *S), in voxels.
        state_dir: of this site.
        plan: as for the scores: images are fused and segmented by the same windows, and matched in the middle one.

    Raises:
        ResourceError: the disk is full.
    """
    paired, segmented = _paired(data.test), _labelled_first(data.test)
    images = {row: data.test.images[row : row + 1] for row in dict.fromkeys([*paired, *segmented])}  # (1, M, *S) each
    network: Any = method.encoder
    fused = {row: windowed(network.fuse, image.to(device), plan)[0, 0].cpu() for row, image in images.items()}
    figures: dict[str, Slices] = {}
    if paired:
        figures[FUSION] = fusion({row: images[row][0] for row in paired}, fused, data.modalities, data.spacing)
    if segmented:
        logits = {row: windowed(network.segment, images[row].to(device), plan)[0] for row in segmented}
        predicted = {row: known.argmax(0).cpu() for row, known in logits.items()}
        figures[SEGMENTATION] = segmentation(fused, _truth(data.test), predicted, data.spacing)
    if paired and hasattr(method, "matching"):
        match: Any = method.match
        parts = {row: _middle(images[row], plan.window).to(device) for row in paired}
        moved = {row: match(part).field[0].float().cpu() for row, part in parts.items()}
        figures[FIELD] = field({row: _middle(fused[row], plan.window) for row in paired}, moved, data.spacing)
    folder = _private(folder_of(state_dir, data.name, arm))
    return [figure.save(folder / name) for name, figure in figures.items()]


def fusion(
    images: Mapping[int, Tensor], fused: Mapping[int, Tensor], modalities: Sequence[str], spacing: Sequence[float]
) -> Slices:
    """Middle slices: a row for each image (M, *S), a column for each modality, the fused one and the sources' mean."""
    has = {row: present(image[None])[0] for row, image in images.items()}
    shown = [m for m in range(len(modalities)) if any(bool(known[m]) for known in has.values())]
    columns = [*(modalities[m] for m in shown), "fused", "mean of sources"]
    sheet = Slices(_first(fused), len(images), columns, spacing=spacing)
    for at, (row, image) in enumerate(images.items()):
        place = image.shape[-1] // 2
        sheet.title(at, *_named(row, fused[row], place))
        for column, m in enumerate(shown):
            sheet.grey(at, column, plane(image[m], place)) if has[row][m] else sheet.words(at, column, "not there")
        sheet.grey(at, len(shown), plane(fused[row], place))
        sheet.grey(at, len(shown) + 1, plane(mean_of_present(image[None])[0, 0], place))
    return sheet


def segmentation(
    fused: Mapping[int, Tensor],
    truth: Mapping[int, Tensor],
    predicted: Mapping[int, Tensor],
    spacing: Sequence[float],
) -> Slices:
    """Labels over the fused image, in the slice with most tumour by truth, or by prediction where truth is unknown.

    Args:
        fused, truth, predicted: by the number of the image, (*S); the rows are those of `predicted`.
    """
    sheet = Slices(_first(fused), len(predicted), ["fused", "truth", "prediction"], spacing=spacing, foot=FOOT)
    colours = {label: colour for label, (_, colour) in LABELS.items()}
    for at, (row, labels) in enumerate(predicted.items()):
        place = _fullest(truth.get(row, labels))
        sheet.title(at, *_named(row, fused[row], place))
        sheet.grey(at, 0, plane(fused[row], place))
        for column, known in ((1, truth.get(row)), (2, labels)):
            if known is None:
                sheet.words(at, column, "not labelled")
            else:
                sheet.grey(at, column, plane(fused[row], place))
                sheet.colours(at, column, plane(known, place), colours)
    sheet.legend(dict(LABELS.values()))
    return sheet


def field(fused: Mapping[int, Tensor], moved: Mapping[int, Tensor], spacing: Sequence[float]) -> Slices:
    """Where matching takes the fused image from: a grid of points p + u(p), and the length of u in mm.

    Args:
        fused, moved: by the number of the image, (*S) and (d, *S) in voxels; the rows are those of `moved`.
    """
    sheet = Slices(_first(fused), len(moved), ["fused, moved grid", "movement (mm)"], spacing=spacing, foot=FOOT)
    lengths = {row: _lengths(u, spacing) for row, u in moved.items()}
    top = max(LEAST, *(float(length.max()) for length in lengths.values()))
    for at, (row, u) in enumerate(moved.items()):
        place, length = u.shape[-1] // 2, lengths[row]
        words = f"mean {float(length.mean()):.2f} mm", f"most {float(length.max()):.2f} mm"
        sheet.title(at, *_named(row, fused[row], place), *words)
        sheet.grey(at, 0, plane(fused[row], place))
        sheet.grid(at, 0, plane_moves(u, place))
        sheet.scaled(at, 1, plane(length, place), top)
    sheet.scale(1, top)
    return sheet


def _paired(split: Split) -> list[int]:
    """The first images of two modalities."""
    return present(split.images).sum(1).ge(2).nonzero()[:SUBJECTS, 0].tolist() if len(split) else []


def _labelled_first(split: Split) -> list[int]:
    """The first labelled images; then others, of any modality."""
    known = _truth(split)
    usable = present(split.images).any(1).nonzero()[:, 0].tolist() if len(split) else []
    return sorted(usable, key=lambda row: row not in known)[:SUBJECTS]


def _truth(split: Split) -> dict[int, Tensor]:
    """The masks that are known, by the number of the image."""
    if split.masks is None:
        return {}
    return {row: split.masks[row] for row in torch.nonzero(labelled(split.masks))[:, 0].tolist()}


def _middle(images: Tensor, window: Sequence[int] | None) -> Tensor:
    """The window in the middle of the last axes; all without a window."""
    sides = tuple(window or ())
    for axis, side in enumerate(sides, start=images.ndim - len(sides)):
        length = min(side, images.shape[axis])
        images = images.narrow(axis, (images.shape[axis] - length) // 2, length)
    return images


def _fullest(labels: Tensor) -> int:
    """The place along the last axis with most labelled voxels; the middle where there are none."""
    sums = labels.gt(0).flatten(0, -2).sum(0)
    return int(sums.argmax()) if bool(sums.any()) else len(sums) // 2


def _lengths(u: Tensor, spacing: Sequence[float]) -> Tensor:
    """Lengths (*S) in mm of displacements (d, *S) in voxels."""
    mm = torch.tensor(spacing).view(-1, *[1] * (u.ndim - 1))
    return (u * mm).square().sum(0).sqrt()


def _named(row: int, volume: Tensor, place: int) -> list[str]:
    """Which image, and which of its slices."""
    return [f"test image {row + 1}", *([f"slice {place + 1} of {volume.shape[-1]}"] if volume.ndim == 3 else [])]


def _first(volumes: Mapping[int, Tensor]) -> Tensor:
    return next(iter(volumes.values()))


def _private(folder: Path) -> Path:
    """Make the last three levels of a folder for this user alone."""
    folder.parents[2].mkdir(parents=True, exist_ok=True)
    for level in (folder.parents[1], folder.parents[0], folder):
        level.mkdir(mode=0o700, exist_ok=True)
    return folder
