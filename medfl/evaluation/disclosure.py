"""Disclosure control of counts: nothing that leaves a site stands for fewer than `least` patients.

What is protected, in the tables of medfl/evaluation/counts.py:

- Neighbouring bins are merged into groups of `least` patients or more, each told in the bin of its mean (univariate
  microaggregation, Hansen and Mukherjee 2003). The two rows of a class are grouped apart: they share no image.
- With two classes the histogram of class 0 is that of class 1 mirrored, so that no two groupings of the same images
  can be subtracted; and no group reaches over 1/2 where the confusion matrix tells the two sides apart.
- A class of fewer patients, or with fewer in the others, has no histogram and no row in the matrix. As its size would
  follow from n_test and the other classes, the next smallest go with it until they are `least` together.
- Small cells of the matrix are withheld. As the histogram tells the sum of a row, the withheld cells of a row are two
  or more, of `least` patients together; no column has exactly one.

What is not:

- Exact metrics leave beside these tables: n_test, accuracy, balanced accuracy, precision, F1, the share of the largest
  class. With two classes they are equations enough for every withheld cell and for the size of a rare class; with more
  they give two withheld cells of the diagonal, and bounds.
- A group's mean is told to the width of a bin: who knows all of its images but one knows that one.
- That a number is withheld says that one nearby is small.
- Tables of one test split before and after a patient was added differ by that patient.
- Nothing is noised: this is not differential privacy.
"""

import numpy as np
from numpy.typing import NDArray

from medfl.evaluation.metrics import Labels

WITHHELD = -1

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


def rare_classes(labels: Labels, patients: Ints, *, classes: int, least: int) -> Flags:
    """The classes (K,) of which nothing may leave; `labels` and `patients` (N,) count from 0."""
    members = np.zeros((classes, patients.max(initial=-1) + 1), dtype=bool)  # (K, patients)
    members[labels, patients] = True
    sizes = members.sum(axis=1)
    others = np.array([len(np.unique(patients[labels != k])) for k in range(classes)])
    rare: Flags = (sizes > 0) & ((sizes < least) | ((others > 0) & (others < least)))
    for k in np.argsort(sizes, kind="stable"):
        if rare.any() and members[rare].any(axis=0).sum() < least:
            rare[k] = sizes[k] > 0
    return rare


def withheld(labels: Labels, guess: Ints, patients: Ints, *, rare: Flags, least: int) -> Ints:
    """Images by class and predicted class, (K, K), where they may leave, else `WITHHELD`; all else is (N,)."""
    classes = len(rare)
    images = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(images, (labels, guess), 1)
    present = np.zeros((classes, classes, patients.max(initial=-1) + 1), dtype=bool)
    present[labels, guess, patients] = True
    number = present.sum(axis=2)
    hidden = ((number > 0) & (number < least)) | rare[:, None]
    before = -1
    while hidden.sum() != before:  # what a column needs may open a row
        before = hidden.sum()
        for row in range(classes):
            _cover_row(hidden[row], images[row], present[row], least)
        _cover_columns(hidden, images)
    return np.where(hidden, WITHHELD, images)


def _cover_row(hidden: Flags, images: Ints, present: Flags, least: int) -> None:
    """If a cell of a row is hidden, hide more, the smallest first, until they are two and of `least` patients."""
    for cell in np.lexsort((images, images == 0)):  # an empty cell covers nothing: last
        covered = hidden.sum() > 1 and present[hidden].any(axis=0).sum() >= least
        if hidden.any() and not covered:
            hidden[cell] = True


def _cover_columns(hidden: Flags, images: Ints) -> None:
    """Hide a second cell of each column that has one hidden, rather in a row that has gaps already."""
    for column in np.flatnonzero(hidden.sum(axis=0) == 1):
        rows = np.flatnonzero(~hidden[:, column])
        best = np.lexsort((images[rows, column], ~hidden[rows].any(axis=1)))[0]
        hidden[rows[best], column] = True


def merged(bins: Ints, patients: Ints, *, size: int, least: int) -> Ints:
    """Images in each of `size` bins, in groups of at least `least` patients, each in the bin of its mean.

    Of all groupings of neighbouring bins the one with the smallest squared distance, in bins, of images from the mean
    of their group; with `least` 1 the plain histogram.

    Args:
        bins, patients: (N,) of each image, from 0; at least `least` different patients.
    """
    used, place = np.unique(bins, return_inverse=True)
    images = np.bincount(place)
    enough = _patients_between(place, patients, len(used)) >= least
    n, x, xx = (np.append(0, np.cumsum(images * used**power)) for power in range(3))  # sums over the first bins
    cost, start = np.zeros(len(used) + 1), np.zeros(len(used) + 1, dtype=np.int64)
    for end in range(1, len(used) + 1):
        within = xx[end] - xx[:end] - (x[end] - x[:end]) ** 2 / (n[end] - n[:end])
        costs = np.where(enough[:end, end - 1], cost[:end] + within, np.inf)
        start[end], cost[end] = costs.argmin(), costs.min()
    groups, end = np.zeros(size, dtype=np.int64), len(used)
    while end:
        total, of = x[end] - x[start[end]], n[end] - n[start[end]]
        groups[(2 * total + of) // (2 * of)] = of  # the mean, rounded
        end = start[end]
    return groups


def _patients_between(bins: Ints, patients: Ints, size: int) -> Ints:
    """Different patients with an image in the bins i..j, (size, size): each counts where it is first met from i on."""
    pairs = np.unique(np.stack([patients, bins], axis=1), axis=0)
    same = pairs[1:, 0] == pairs[:-1, 0]
    previous = np.append(0, np.where(same, pairs[:-1, 1] + 1, 0))  # the patient's last bin before this one, from 1
    first = np.zeros((size + 1, size), dtype=np.int64)
    np.add.at(first, (previous, pairs[:, 1]), 1)
    between: Ints = np.cumsum(np.triu(np.cumsum(first, axis=0)[:size]), axis=1)
    return between
