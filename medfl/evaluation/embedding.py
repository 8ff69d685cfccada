"""A site's features as points of a plane: t-SNE (van der Maaten and Hinton 2008), or PCA where images are few."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from medfl.evaluation.slices import MUTED, TEXT, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 300  # images on a map
LEAST = 4  # below, there is no map
FEW = 15  # different features; below, neighbourhoods say nothing and the map is PCA
PERPLEXITY = 30.0  # of t-SNE, or a third of the neighbours where those are fewer
ITERATIONS = 500
SAME = 1e-6  # two coordinates of a feature of length 1 that are one: the rounding of float32
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7a6a00", "#000000")  # Okabe and Ito
SHAPES = ("o", "^", "s", "D", "v", "P", "X", "*", "<")  # with 8 colours, 72 classes look different
SIDE, KEYS, HEAD, FOOT = 3.9, 2.0, 0.3, 0.62  # inches: the map, the legend beside it, above and below
LINE, WORDS, NAME = 0.17, 100, 26  # inches of a line of the legend; characters of the note, of a class


def chosen(count: int) -> list[int]:
    """At most `MOST` of so many images, evenly spread over their order."""
    if count <= MOST:
        return list(range(count))
    return torch.linspace(0, count - 1, MOST).round().long().tolist()


def embedding(features: Tensor, labels: Tensor, classes: Sequence[str]) -> "Figure | None":
    """The map of a site's test images, coloured by class; None where images are too few or a feature is not finite.

    Args:
        features: h (N, F).
        labels: (N,) index into `classes`; -1 = unknown.
    """
    if len(features) < LEAST or not bool(torch.isfinite(features).all()):
        return None
    points, words = flattened(features)
    return _drawn(points, labels.numpy(), classes, words)


def flattened(features: Tensor) -> tuple[NDArray[np.float64], str]:
    """Points (N, 2) for features (N, F) at unit length, and how they were found, in words for the reader."""
    rows = normalize(features.double()).numpy()
    different = len(np.unique(np.round(rows / SAME), axis=0))
    return _pca(rows) if different < FEW else _tsne(rows, different)


def _pca(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """The two directions of most variance; each with the sign that makes its largest weight positive."""
    left, sizes, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    signs = np.sign(np.take_along_axis(right, np.abs(right).argmax(1)[:, None], axis=1))[:, 0]
    points = (left * sizes * signs)[:, :2]
    if (total := (sizes**2).sum()) < len(rows) * SAME**2:
        return np.zeros((len(rows), 2)), "PCA: the encoder gives all these images the same features."
    share = (sizes[:2] ** 2).sum() / total
    words = f"PCA, with {share:.0%} of the variance: too few different images for a map of their neighbourhoods."
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), words


def _tsne(rows: NDArray[np.float64], different: int) -> tuple[NDArray[np.float64], str]:
    """Neighbours stay neighbours. With one thread: more wait for each other, and may round differently."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    perplexity = min(PERPLEXITY, (different - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", max_iter=ITERATIONS, random_state=0)
    with threadpool_limits(1):
        points = tsne.fit_transform(rows)
    words = (
        f"t-SNE, perplexity {perplexity:.0f}. Images with like features lie close together. "
        "How far apart groups lie, and how large they are, means little."
    )
    return points.astype(np.float64), words


def _drawn(points: NDArray[np.float64], labels: NDArray[np.int64], classes: Sequence[str], words: str) -> "Figure":
    names, unknown = [*classes, "not labelled"], len(classes)
    kinds = np.where(labels < 0, unknown, labels)
    counts = {k: int((kinds == k).sum()) for k in range(len(names))}
    keys = {k: textwrap.fill(f"{names[k]} ({n})", NAME) for k, n in counts.items() if n or k < unknown}
    tall = HEAD + FOOT + max(SIDE, LINE * sum(1.3 + key.count("\n") for key in keys.values()))
    figure = new_figure(SIDE + KEYS, tall)
    axes = figure.add_axes((0.02, FOOT / tall, SIDE / (SIDE + KEYS), 1 - (FOOT + HEAD) / tall))
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"Features of {len(points)} test images", fontsize=TEXT)
    for k in keys:
        here = points[kinds == k]
        colour, shape = (MUTED, "h") if k == unknown else (COLOURS[k % len(COLOURS)], SHAPES[k % len(SHAPES)])
        axes.scatter(
            here[:, 0], here[:, 1], 26, colour, marker=shape, alpha=0.85, lw=0.4, edgecolors="white", label=str(k)
        )
    axes.margins(0.06)
    axes.set_aspect("equal", adjustable="datalim")
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=TEXT - 2, frameon=False)
    for text, key in zip(legend.get_texts(), keys.values(), strict=True):  # names as they are, whatever is in them
        text.set(text=key, parse_math=False)
    figure.text(0.02, 0.03, textwrap.fill(words, WORDS), fontsize=TEXT - 2, color=MUTED, va="bottom")
    return figure
