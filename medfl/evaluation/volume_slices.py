"""Pictures of fused and segmented images: sources, labels, and where matching moves them."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from medfl.data.sample import present
from medfl.evaluation.slices import FOOT, Slices, caption, legend_foot, picture, plane, plane_moves
from medfl.evaluation.volumes import mean_of_present

TUMOUR = {  # of masks with these regions: what of each one is in no smaller one
    "et": "ET: enhancing tumour",
    "tc": "NCR: necrotic or non-enhancing core",
    "wt": "ED: oedema",
}
COLOURS = ("#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#0072b2", "#d55e00", "#f0e442")  # of the names, in turns
LEAST = 1.0  # mm at the top of the scale of movements: rounding is no movement


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
        sheet.title(at, *caption(row, fused[row], place))
        for column, m in enumerate(shown):
            sheet.image(at, column, plane(image[m], place)) if has[row][m] else sheet.words(at, column, "not there")
        sheet.image(at, len(shown), plane(fused[row], place))
        sheet.image(at, len(shown) + 1, plane(mean_of_present(image[None])[0, 0], place))
    return sheet


def segmentation(
    looks: Mapping[int, Tensor],
    truth: Mapping[int, Tensor],
    predicted: Mapping[int, Tensor],
    *,
    names: Mapping[int, str],
    base: str,
    spacing: Sequence[float],
) -> Slices:
    """Labels over an image, in the slice with most of them by truth, or by prediction where truth is unknown.

    Args:
        looks: by the number of the image, greys (1, *S) or colours (3, *S) in [0, 1].
        truth, predicted: by the same numbers, labels (*S), 0 = background; the rows are those of `predicted`.
        names: of the labels; equal names have one colour.
        base: what the looks are, such as "image".
    """
    paints = dict(zip(dict.fromkeys(names.values()), itertools.cycle(COLOURS), strict=False))
    colours = {label: paints[name] for label, name in names.items()}
    sheet = Slices(
        _first(looks)[0], len(predicted), [base, "truth", "prediction"], spacing=spacing, foot=legend_foot(len(paints))
    )
    for at, (row, labels) in enumerate(predicted.items()):
        place = _fullest(truth.get(row, labels))
        sheet.title(at, *caption(row, looks[row][0], place))
        sheet.image(at, 0, picture(looks[row], place))
        for column, known in ((1, truth.get(row)), (2, labels)):
            if known is None:
                sheet.words(at, column, "not labelled")
            else:
                sheet.image(at, column, picture(looks[row], place))
                sheet.colours(at, column, plane(known, place), colours)
    sheet.legend(paints)
    return sheet


def label_names(regions: Mapping[str, Sequence[int]]) -> dict[int, str]:
    """Label -> the name of the smallest region that has it, and "rest of" where a smaller region lies inside."""
    own = {label: min((len(of), name) for name, of in regions.items() if label in of) for label in _labels(regions)}
    if regions.keys() == TUMOUR.keys():
        return {label: TUMOUR[name] for label, (_, name) in own.items()}
    shared = Counter(name for _, name in own.values())
    return {label: name if shared[name] == size else f"rest of {name}" for label, (size, name) in own.items()}


def _labels(regions: Mapping[str, Sequence[int]]) -> list[int]:
    return sorted({label for of in regions.values() for label in of})


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
        sheet.title(at, *caption(row, fused[row], place), *words)
        sheet.image(at, 0, plane(fused[row], place))
        sheet.grid(at, 0, plane_moves(u, place))
        sheet.scaled(at, 1, plane(length, place), top)
    sheet.scale(1, top)
    return sheet


def _fullest(labels: Tensor) -> int:
    """The place along the last axis with most labelled voxels; the middle where there are none."""
    sums = labels.gt(0).flatten(0, -2).sum(0)
    return int(sums.argmax()) if bool(sums.any()) else len(sums) // 2


def _lengths(u: Tensor, spacing: Sequence[float]) -> Tensor:
    """Lengths (*S) in mm of displacements (d, *S) in voxels."""
    mm = torch.tensor(spacing).view(-1, *[1] * (u.ndim - 1))
    return (u * mm).square().sum(0).sqrt()


def _first(volumes: Mapping[int, Tensor]) -> Tensor:
    return next(iter(volumes.values()))
