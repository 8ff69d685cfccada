"""Metrics of class probabilities; each takes how often a row counts, to serve all resamples in one call."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


class Metric(Protocol):
    """Of probabilities (N, K), labels (N,) in 0..K-1 and counts (N, R): R values, NaN where undefined."""

    def __call__(self, probabilities: Array, labels: Labels, counts: Array | None = None) -> Array: ...


def auc(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Area under the ROC curve, ties counted half: of class 1 for K = 2, else macro one-vs-rest, (R,).

    As MedMNIST's evaluator, but the mean is over the classes that occur (there, a missing one is an error).
    """
    counts = _counts(probabilities, labels, counts)
    present = [k for k in np.unique(labels).tolist() if k == 1 or probabilities.shape[1] > 2]
    each = [_binary_auc(probabilities[:, k], labels == k, counts) for k in present]
    return mean(np.array(each).reshape(len(each), counts.shape[1]), axis=0)


def accuracy(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Share of rows whose most probable class is right, (R,); the first class wins a tie."""
    counts = _counts(probabilities, labels, counts)
    return _share(probabilities.argmax(axis=1) == labels, counts)


def balanced_accuracy(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Mean recall of the classes that occur (macro recall), (R,); NaN if only one class does."""
    counts = _counts(probabilities, labels, counts)
    members = np.equal.outer(np.arange(probabilities.shape[1]), labels).astype(np.float64)  # (K, N)
    totals = members @ counts  # (K, R)
    recall = ratio((members * (probabilities.argmax(axis=1) == labels)) @ counts, totals)
    return np.where((totals > 0).sum(axis=0) > 1, mean(recall, axis=0), np.nan)


def precision(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Mean precision of the classes that occur, (R,); 0 for a class that is never predicted; NaN if only one occurs."""
    counts = _counts(probabilities, labels, counts)
    chosen = np.equal.outer(np.arange(probabilities.shape[1]), probabilities.argmax(axis=1)).astype(np.float64)
    occurs = np.equal.outer(np.arange(probabilities.shape[1]), labels).astype(np.float64) @ counts > 0  # (K, R)
    found = np.nan_to_num(ratio((chosen * (probabilities.argmax(axis=1) == labels)) @ counts, chosen @ counts))
    return np.where(occurs.sum(axis=0) > 1, mean(np.where(occurs, found, np.nan), axis=0), np.nan)


def constant_accuracy(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """Accuracy of the best constant prediction: the most frequent class of the whole sample, (R,)."""
    counts = _counts(probabilities, labels, counts)
    most = np.bincount(labels, minlength=1).argmax()  # a resample's own maximum would be biased upwards
    return _share(labels == most, counts)


METRICS: Mapping[str, Metric] = {
    "auc": auc,
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "precision": precision,
    "constant_accuracy": constant_accuracy,
}


def point(metric: Metric, probabilities: Array, labels: Labels) -> float | None:
    """The metric of the sample, or None where it is undefined (no rows, one class)."""
    return finite(metric(probabilities, labels)[0])


def _binary_auc(scores: Array, positive: NDArray[np.bool_], counts: Array) -> Array:
    """Share of (positive, negative) pairs in the right order, (R,); NaN without a pair."""
    order = np.argsort(scores, kind="stable")
    ranked, counts, hit = scores[order], counts[order], positive[order, None]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # of groups of equal scores
    above = np.add.reduceat(np.where(hit, counts, 0), starts, axis=0)  # (G, R)
    below = np.add.reduceat(np.where(hit, 0, counts), starts, axis=0)
    won = np.einsum("gr,gr->r", above, np.cumsum(below, axis=0) - below / 2)
    return ratio(won, above.sum(axis=0) * below.sum(axis=0))


def _counts(probabilities: Array, labels: Labels, counts: Array | None) -> Array:
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


def _share(which: NDArray[np.bool_], counts: Array) -> Array:
    return ratio(which.astype(np.float64) @ counts, counts.sum(axis=0))


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
