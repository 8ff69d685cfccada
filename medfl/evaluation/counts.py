"""What a site may tell of its predictions: counts of images from which curves are drawn, never a prediction.

The tables of one evaluation with K classes, and what is done with them where they arrive:

- histogram (K, 2, BINS): [k, 1] the test images of class k and [k, 0] those of the other classes, by the probability
  that was predicted for class k, in the bins of `edges`. 0 throughout for a class that is withheld.
- confusion (K, K): images by class and predicted class, `WITHHELD` where the number does not leave.

What is withheld, and what the tables tell nevertheless, says medfl/evaluation/disclosure.py.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from medfl.evaluation.disclosure import WITHHELD, Ints, merged, rare_classes, withheld
from medfl.evaluation.metrics import Array, Labels, checked, ratio

BINS = 1000  # even: 1/2 is an edge, and the bins of p are those of 1 - p mirrored
LEAST = 5  # patients behind each number that leaves
REACH = 16.0  # logit at the ends of the axis: about where float32 no longer tells a probability from 1
MOST = 1e9  # images in any number
INTERVALS = 10  # of a calibration curve


def edges() -> Array:
    """The bins of a probability, the same at all sites: (BINS + 1,) from 0 to 1; bin b holds edge b < p <= edge b+1.

    Equal steps of arcsinh(logit p): nowhere wider than 1/500, as a strongly regularised probe gives all its images
    much the same probability, and ever finer towards 0 and 1, where those of rare classes and confident models are.
    """
    half = BINS // 2
    inner = expit(np.sinh(np.arange(1 - half, half) / half * np.arcsinh(REACH)))
    return np.concatenate([[0.0], inner, [1.0]])


def count(probabilities: Array, labels: Labels, patients: Sequence[str], *, least: int = LEAST) -> tuple[Ints, Ints]:
    """The histogram (K, 2, BINS) and the confusion matrix (K, K) of a test split, as they may leave the site.

    Args:
        probabilities, labels: (N, K), and (N,) in 0..K-1.
        patients: of each row; each number that leaves stands for `least` of them or more.

    Raises:
        ValueError: rows disagree, a label is outside 0..K-1, or `least` is below 1.
    """
    checked(probabilities, labels)
    if len(patients) != len(labels) or least < 1:
        raise ValueError(f"count: got {len(patients)} patients for {len(labels)} labels and least={least}; need >= 1.")
    classes, guess = probabilities.shape[1], probabilities.argmax(axis=1)
    people = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)[1]  # (N,) numbers
    rare = rare_classes(labels, people, classes=classes, least=least)
    confusion = withheld(labels, guess, people, rare=rare, least=least)
    bins = np.searchsorted(edges()[1:-1], probabilities, side="left")  # (N, K)
    histogram = np.zeros((classes, 2, BINS), dtype=np.int64)
    told = classes == 2 and not (confusion == WITHHELD).any()
    side = guess if told else np.zeros_like(guess)  # of 1/2, where the confusion matrix tells it
    first = 1 if classes == 2 else 0  # of two, class 0 is the mirror image
    for k in [k for k in range(first, classes) if not rare[k] and 0 < (labels == k).sum() < len(labels)]:
        for row, part in {(int(label == k), part) for label, part in zip(labels, side, strict=True)}:
            which = ((labels == k) == row) & (side == part)
            histogram[k, row] += merged(bins[which, k], people[which], size=BINS, least=least)
    if classes == 2:
        histogram[0] = histogram[1, ::-1, ::-1]
    return histogram, confusion


def check(histogram: Array, confusion: Array, *, least: int = LEAST) -> None:
    """Refuse tables that `count` cannot have made, whoever sent them.

    Raises:
        ValueError: the shapes disagree; a number is no whole one, or of fewer than `least` images; totals contradict
            each other; or a withheld cell follows from the others.
    """
    classes = len(histogram)
    if classes < 2 or histogram.shape != (classes, 2, BINS) or confusion.shape != (classes, classes):
        raise ValueError(
            f"counts: got a histogram {histogram.shape} and a confusion matrix {confusion.shape}; "
            f"need (K, 2, {BINS}) and (K, K), K >= 2."
        )
    _check_numbers("histogram", histogram, least)
    _check_numbers("confusion matrix", np.where(confusion == WITHHELD, 0, confusion), least)
    _check_histogram(histogram, least)
    _check_confusion(confusion, histogram, least)


def _check_numbers(name: str, table: Array, least: int) -> None:
    fine = (table == 0) | ((table >= least) & (table <= MOST) & (table == np.floor(table)))
    if not fine.all():
        raise ValueError(f"counts: the {name} has {table[~fine][0]:g}; need whole numbers, 0 or at least {least}.")


def _check_histogram(histogram: Array, least: int) -> None:
    images = histogram.sum(axis=2)  # (K, 2)
    shown, total = images.any(axis=1), images.sum(axis=1).max()
    rest = total - images[:, 1].sum()
    mixed = (images[shown] == 0).any() or (images[shown].sum(axis=1) != total).any()
    if mixed or rest < 0 or 0 < rest < least or (rest and shown.all()):
        raise ValueError(
            f"counts: the histogram has {images.astype(int).tolist()} images of [other classes, each class]; "
            f"need the same sum for each that is not withheld, and none or {least} images in the rest."
        )
    if len(histogram) == 2 and (histogram[0] != histogram[1, ::-1, ::-1]).any():
        raise ValueError("counts: the histograms of two classes differ; need each to be the other's mirror image.")


def _check_confusion(confusion: Array, histogram: Array, least: int) -> None:
    hidden, sizes = confusion == WITHHELD, histogram[:, 1].sum(axis=1)
    if ((hidden.sum(axis=0) == 1) | (hidden.sum(axis=1) == 1)).any():
        raise ValueError("counts: a row or column of the confusion matrix has one withheld cell; need none or two.")
    told = np.where(hidden, 0, confusion).sum(axis=1)  # (K,)
    fine = np.where(hidden.any(axis=1) & (sizes > 0), sizes - told >= least, sizes == told)
    if sizes.any() and not fine.all():
        raise ValueError(
            f"counts: the rows of the confusion matrix have {told.astype(int).tolist()} images, the histogram has "
            f"{sizes.astype(int).tolist()}; need the same, or {least} less where cells are withheld."
        )


def spread(histogram: Array, *, least: int = LEAST) -> Array:
    """One site's histogram (..., BINS) with each group spread evenly about its bin, half way to the next group.

    Halves the error of curves. What may be a bin of its own, with 2 least - 1 images or more, stays where it is. To add
    sites, spread their histograms first: in a sum, groups are no longer to be seen.
    """
    rows = [_spread(row, least) for row in np.reshape(histogram, (-1, BINS)).astype(np.float64)]
    return np.reshape(np.array(rows), np.shape(histogram))


def _spread(row: Array, least: int) -> Array:
    used = np.flatnonzero(row)
    middle, images, gaps = used + 0.5, row[used], np.diff(used) / 2
    if len(used) < 2:
        return row
    reach = np.minimum(np.append(np.inf, gaps), np.append(gaps, np.inf))
    reach = np.minimum(reach, np.minimum(middle, BINS - middle))
    reach = np.where(images >= 2 * least - 1, 0.5, reach)[:, None]
    left = np.arange(BINS)
    overlap = np.minimum(left + 1, middle[:, None] + reach) - np.maximum(left, middle[:, None] - reach)
    result: Array = (images[:, None] * overlap.clip(0) / (2 * reach)).sum(axis=0)
    return result


def roc(histogram: Array) -> tuple[Array, Array]:
    """False and true positive rate of one class's histogram (2, BINS), (BINS + 1,) each from 0 to 1.

    Here and below the histogram may be spread, and a sum over sites.

    Raises:
        ValueError: the class is withheld.
    """
    others, mine = _from_above(histogram)
    return others / others[-1], mine / mine[-1]


def binned_auc(histogram: Array) -> float:
    """Area under `roc`, ties in a bin counted half."""
    false_positive, true_positive = roc(histogram)
    return float(np.trapezoid(true_positive, false_positive))


def precision_recall(histogram: Array) -> tuple[Array, Array]:
    """Recall, rising to 1, and precision of one class's histogram (2, BINS), from the first bin that is not empty.

    Raises:
        ValueError: the class is withheld.
    """
    others, mine = _from_above(histogram)
    held = others + mine > 0
    return mine[held] / mine[-1], mine[held] / (others + mine)[held]


def calibration(histogram: Array) -> tuple[Array, Array, Array]:
    """Mean predicted probability, observed share of the class, and images, of one class's histogram (2, BINS).

    In `INTERVALS` equal intervals of [0, 1], those without images left out; an image counts as in the middle of its
    bin.
    """
    middle = (edges()[1:] + edges()[:-1]) / 2
    member = np.equal.outer(np.arange(INTERVALS), (middle * INTERVALS).astype(np.int64)).astype(np.float64)
    images = member @ histogram.sum(axis=0)
    used = images > 0
    predicted, observed = ratio(member @ (middle * histogram.sum(axis=0)), images), ratio(member @ histogram[1], images)
    return predicted[used], observed[used], images[used]


def _from_above(histogram: Array) -> tuple[Array, Array]:
    """Images of other classes and of the class in the highest 0, 1, ... bins, (BINS + 1,) each."""
    if histogram.shape != (2, BINS) or not histogram.any(axis=1).all():
        raise ValueError(f"counts: got a histogram {histogram.shape}; need (2, {BINS}) with images in both rows.")
    others, mine = (np.append(0.0, np.cumsum(row[::-1])) for row in histogram)
    return others, mine
