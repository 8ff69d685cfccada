"""Metrics of class probabilities; each takes how often a row counts, to serve all resamples in one call."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
ECE_BINS = 15  # of equal width, as Guo et al. 2017


class Metric(Protocol):
    """Of probabilities (N, K), labels (N,) in 0..K-1 and counts (N, R): R values, NaN where undefined."""

    def __call__(self, probabilities: Array, labels: Labels, counts: Array | None = None) -> Array: ...


def auc(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Area under the ROC curve, ties counted half: of class 1 for K = 2, else macro one-vs-rest, (R,).

    As MedMNIST's evaluator, but the mean is over the classes that occur (there, a missing one is an error).
    """
    return _one_vs_rest(_roc_area, probabilities, labels, counts)


def pr_auc(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Average precision: of class 1 for K = 2, else macro one-vs-rest over the classes that occur, (R,).

    As scikit-learn's average_precision_score, without interpolation: Σ (recall_g - recall_g-1) precision_g over
    the distinct scores g. NaN where only one class occurs, as `auc`.
    """
    return _one_vs_rest(_average_precision, probabilities, labels, counts)


def accuracy(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Share of rows whose most probable class is right, (R,); the first class wins a tie."""
    counts = checked(probabilities, labels, counts)
    return _share((probabilities.argmax(axis=1) == labels).astype(np.float64), counts)


def balanced_accuracy(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Mean recall of the classes that occur (macro recall), (R,); NaN if only one class does."""
    hits, _, occurring = _confusion(probabilities, labels, counts)
    return _macro(ratio(hits, occurring), occurring)


def precision(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Mean precision of the classes that occur, (R,); 0 for a class that is never predicted; NaN if only one occurs."""
    hits, predicted, occurring = _confusion(probabilities, labels, counts)
    return _macro(np.nan_to_num(ratio(hits, predicted)), occurring)


def f1(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN) (macro F1), (R,); NaN if only one does."""
    hits, predicted, occurring = _confusion(probabilities, labels, counts)
    return _macro(ratio(2 * hits, predicted + occurring), occurring)


def brier(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Mean over rows of Σ_k (p_k - [label is k])² (Brier 1950), from 0 to 2, (R,); for K = 2 half of it.

    The half is (p_1 - label)², from 0 to 1, where p_0 + p_1 = 1: what scikit-learn's brier_score_loss gives for two
    classes, as does this for each K (its scale_by_half="auto").
    """
    counts = checked(probabilities, labels, counts)
    squares = (probabilities - np.eye(probabilities.shape[1])[labels]) ** 2  # (N, K)
    return _share(squares.sum(axis=1) / (2 if probabilities.shape[1] == 2 else 1), counts)


def ece(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Expected calibration error of the most probable class, (R,) (Guo et al. 2017, eq. 5), with `ECE_BINS` bins.

    Σ_b (n_b / n) |accuracy_b - mean confidence_b| over the bins (low, high] of the confidence max_k p_k.
    """
    counts = checked(probabilities, labels, counts)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.ceil(confidence * ECE_BINS).astype(np.int64).clip(1, ECE_BINS) - 1
    excess = np.equal.outer(np.arange(ECE_BINS), bins) * (right - confidence)  # (B, N)
    return ratio(np.abs(excess @ counts).sum(axis=0), counts.sum(axis=0))


def constant_accuracy(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Accuracy of the best constant prediction: the most frequent class of the whole sample, (R,)."""
    counts = checked(probabilities, labels, counts)
    most = np.bincount(labels, minlength=1).argmax()  # a resample's own maximum would be biased upwards
    return _share((labels == most).astype(np.float64), counts)


METRICS: Mapping[str, Metric] = {
    "auc": auc,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "precision": precision,
    "f1": f1,
    "pr_auc": pr_auc,
    "brier": brier,
    "ece": ece,
    "constant_accuracy": constant_accuracy,
}


def point(metric: Metric, probabilities: Array, labels: Labels) -> float | None:
    """The metric of the sample, or None where it is undefined (no rows, one class)."""
    return finite(metric(probabilities, labels)[0])


Curve = Callable[[Array, Array, Array, Array], Array]  # of `_ranked`


def _one_vs_rest(area: Curve, probabilities: Array, labels: Labels, counts: Array | None) -> Array:
    """The area of class 1 for K = 2, else its mean over the classes that occur, (R,)."""
    counts = checked(probabilities, labels, counts)
    present = [k for k in np.unique(labels).tolist() if k == 1 or probabilities.shape[1] > 2]
    total = counts.sum(axis=0)
    each = [area(*_ranked(probabilities[:, k], labels == k, counts), total) for k in present]
    return mean(np.array(each).reshape(len(each), counts.shape[1]), axis=0)


def _ranked(scores: Array, positive: NDArray[np.bool_], counts: Array) -> tuple[Array, Array, Array]:
    """Of each score that positives have, best first, (G, R): those positives, and negatives above it and tied.

    One sparse product sums the counts between the positives' scores, so that no temporary is as large as `counts`
    unless every row is a positive.
    """
    values = np.unique(scores[positive])
    groups, above = len(values), len(values) - np.searchsorted(values, scores, side="right")  # values above the score
    tied = np.searchsorted(values, scores) + above < groups
    which = np.flatnonzero(above < groups)  # the others are negatives below all positives
    kind = np.where(positive, 0, np.where(tied, 1, 2))
    cells = (kind * groups + above)[which], which
    sums = coo_array((np.ones(len(which)), cells), shape=(3 * groups, len(scores))).tocsr() @ counts
    hits, level, between = sums.reshape(3, groups, -1)
    return hits, np.cumsum(between + level, axis=0) - level, level


def _roc_area(hits: Array, above: Array, tied: Array, total: Array) -> Array:
    """Share of (positive, negative) pairs in the right order, (R,); NaN without a pair."""
    positives = hits.sum(axis=0)
    lost = np.einsum("gr,gr->r", hits, above + tied / 2)
    pairs = positives * (total - positives)
    return ratio(pairs - lost, pairs)


def _average_precision(hits: Array, above: Array, tied: Array, total: Array) -> Array:
    """Mean over the positives of the precision at their score, (R,); NaN without a pair."""
    found = np.cumsum(hits, axis=0)
    positives = found[-1]
    precise = np.nan_to_num(ratio(found, found + above + tied))
    return ratio(np.einsum("gr,gr->r", hits, precise), np.where(positives < total, positives, 0))


def _confusion(probabilities: Array, labels: Labels, counts: Array | None) -> tuple[Array, Array, Array]:
    """Of each class, (K, R): rows rightly predicted, predicted, and there are."""
    counts = checked(probabilities, labels, counts)
    guess, names = probabilities.argmax(axis=1), np.arange(probabilities.shape[1])
    occurring, predicted = (np.equal.outer(names, each).astype(np.float64) for each in (labels, guess))  # (K, N)
    return (occurring * predicted) @ counts, predicted @ counts, occurring @ counts


def _macro(each: Array, occurring: Array) -> Array:
    """Mean (R,) of values (K, R) over the classes that occur; NaN if fewer than two do."""
    occurs = occurring > 0
    return np.where(occurs.sum(axis=0) > 1, mean(np.where(occurs, each, np.nan), axis=0), np.nan)


def checked(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Checked counts (N, R); each row once if none are given."""
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"got probabilities {probabilities.shape}, labels {labels.shape}; need (N, K), K >= 2, and (N,)."
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("got NaN or infinite probabilities; need finite ones.")
    low, high = (labels.min(), labels.max()) if len(labels) else (0, 0)
    if low < 0 or high >= probabilities.shape[1]:
        raise ValueError(f"got labels {low}..{high}; need 0..{probabilities.shape[1] - 1}: drop unknown labels.")
    return np.ones((len(labels), 1)) if counts is None else counts


def _share(values: Array, counts: Array) -> Array:
    """Mean (R,) of one value a row, (N,)."""
    return ratio(values @ counts, counts.sum(axis=0))


def ratio(top: Array, bottom: Array) -> Array:
    """top / bottom, NaN where bottom is 0."""
    result: Array = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
    return result


def mean(values: Array, *, axis: int) -> Array:
    """Mean of the entries that are not NaN; NaN where there is none."""
    present = np.isfinite(values)
    return ratio(np.where(present, values, 0.0).sum(axis=axis), present.sum(axis=axis).astype(np.float64))


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None
