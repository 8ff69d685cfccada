import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from medfl.evaluation.counts import (
    BINS,
    LEAST,
    binned_auc,
    calibration,
    check,
    count,
    edges,
    precision_recall,
    roc,
    spread,
)
from medfl.evaluation.disclosure import WITHHELD, merged
from medfl.evaluation.probe import Features, Scores, linear_probe
from tests.shared_data import shared

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def names(number: int) -> tuple[str, ...]:
    return tuple(f"patient-{i}" for i in range(number))


def sample(rows: int, classes: int, seed: int, sharpness: float = 2.0) -> tuple[Floats, Ints]:
    """Probabilities (N, K) that tell something, and labels of unequal classes, perhaps not of all."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, size=rows, p=rng.dirichlet(np.ones(classes)))
    logits = sharpness * (rng.normal(size=(rows, classes)) + np.eye(classes)[labels])
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True), labels


def good(rows: int = 200, classes: int = 3, seed: int = 0) -> tuple[Floats, Floats]:
    """Tables of which nothing is withheld, as they arrive."""
    p, y = sample(rows, classes, seed, 0.8)
    y = np.arange(rows) % classes
    histogram, confusion = count(p, y, names(rows))
    return histogram.astype(np.float64), confusion.astype(np.float64)


# the tables


def test_edges_are_mirrored_and_fine_everywhere() -> None:
    e = edges()
    assert e.shape == (BINS + 1,)
    assert (e[0], e[BINS // 2], e[-1]) == (0.0, 0.5, 1.0)
    np.testing.assert_allclose(e + e[::-1], 1, rtol=0, atol=1e-12)
    assert np.diff(e).min() > 0
    assert np.diff(e).max() < 1 / 500
    inner = e[(e > 1e-6) & (e < 0.1)]
    assert (inner[1:] / inner[:-1]).max() < 1.11  # fine in proportion, for rare classes


@pytest.mark.parametrize("classes", [2, 3])
def test_tables_without_a_least_are_plain_counts_and_those_of_sites_add_up(classes: int) -> None:
    p, y = sample(90, classes, 1)
    histogram, confusion = count(p, y, names(90), least=1)
    expected = np.zeros_like(histogram)
    for row, label in zip(p, y, strict=True):
        for k in range(classes):
            expected[k, int(label == k), sum(edge < row[k] for edge in edges()[1:-1])] += 1
    np.testing.assert_array_equal(histogram, expected)
    np.testing.assert_array_equal(confusion, confusion_matrix(y, p.argmax(1), labels=range(classes)))
    parts = [count(p[site], y[site], names(45), least=1) for site in (np.s_[:45], np.s_[45:])]
    np.testing.assert_array_equal(histogram, parts[0][0] + parts[1][0])
    np.testing.assert_array_equal(confusion, parts[0][1] + parts[1][1])


@given(
    st.integers(0, 120), st.integers(2, 6), st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 3), st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_nothing_that_leaves_is_of_fewer_than_least_patients(
    rows: int, classes: int, seed: int, least: int, copies: int, blunt: bool
) -> None:
    p, y = sample(rows, classes, seed)
    p = p.round(1) if blunt and classes == 2 else p  # many ties, at 1/2 too
    p, y, patients = np.tile(p, (copies, 1)), np.tile(y, copies), names(rows) * copies
    histogram, confusion = count(p, y, patients, least=least)
    check(histogram.astype(float), confusion.astype(float), least=least)
    assert ((histogram == 0) | (histogram >= least * copies)).all()
    assert ((confusion <= 0) | (confusion >= least * copies)).all()
    assert not ((confusion == WITHHELD).sum(0) == 1).any()
    assert not ((confusion == WITHHELD).sum(1) == 1).any()
    sizes, shown = np.bincount(y, minlength=classes), histogram.any(axis=(1, 2))
    np.testing.assert_array_equal(histogram[shown].sum(2), np.stack([len(y) - sizes, sizes], 1)[shown])
    assert ((sizes >= least * copies) & (len(y) - sizes >= least * copies))[shown].all()
    if shown.any():
        rest = len(y) - sizes[shown].sum()  # what n_test and the shown classes tell of the others
        assert rest == 0 or rest >= least * copies
        told = np.where(confusion == WITHHELD, 0, confusion).sum(1)
        gaps = (sizes - told)[shown & (confusion == WITHHELD).any(1)]
        assert (gaps >= least * copies).all()  # what the histogram tells of the withheld cells together
    exact = confusion_matrix(y, p.argmax(1), labels=range(classes)) if len(y) else np.zeros_like(confusion)
    np.testing.assert_array_equal(confusion[confusion != WITHHELD], exact[confusion != WITHHELD])
    if classes == 2 and shown.any() and (confusion != WITHHELD).all():
        sides = histogram[1].reshape(2, 2, -1).sum(2)  # the same numbers, not a second grouping
        np.testing.assert_array_equal(sides, confusion)


@pytest.mark.parametrize("seed", range(8))
def test_merged_bins_are_the_best_of_all_groupings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bins, patients = rng.choice(60, size=9)[rng.integers(9, size=26)], rng.integers(14, size=26)
    found = merged(bins, patients, size=60, least=4)
    best = min(groupings(bins, patients, least=4), key=lambda groups: sum(((g - g.mean()) ** 2).sum() for g in groups))
    expected = np.zeros(60, dtype=int)
    for group in best:
        expected[int(np.floor(group.mean() + 0.5))] += len(group)
    np.testing.assert_array_equal(found, expected)


def groupings(bins: Ints, patients: Ints, least: int) -> Iterator[list[Ints]]:
    """The bins of the images in each group, for every way to cut that leaves `least` patients in each."""
    used = np.unique(bins)
    for cuts in itertools.chain.from_iterable(itertools.combinations(used[1:], n) for n in range(len(used))):
        group = np.searchsorted(np.array(cuts), bins, side="right")
        if all(len(set(patients[group == g])) >= least for g in range(len(cuts) + 1)):
            yield [bins[group == g] for g in range(len(cuts) + 1)]


def test_a_rare_class_takes_the_next_smallest_with_it() -> None:
    p, _ = sample(100, 4, 0)
    y = np.array([0] * 50 + [1] * 40 + [2] * 7 + [3] * 3)
    histogram, confusion = count(p, y, names(100))
    assert histogram.any(axis=(1, 2)).tolist() == [True, True, False, False]
    assert (confusion[2:] == WITHHELD).all()
    nothing, empty = count(np.empty((0, 3)), np.empty(0, dtype=int), ())
    assert not nothing.any()
    assert not empty.any()
    few, hidden = count(p[:4, :2], y[:4], names(4))
    assert not few.any()
    assert (hidden[0] == WITHHELD).all()


def test_count_refuses_the_callers_mistakes() -> None:
    p, y = sample(20, 2, 0)
    with pytest.raises(ValueError, match="got 3 patients for 20 labels"):
        count(p, y, names(3))
    with pytest.raises(ValueError, match="least=0"):
        count(p, y, names(20), least=0)
    with pytest.raises(ValueError, match="drop unknown labels"):
        count(p, y - 1, names(20))


# the check


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("histogram", 0, 1, 0), -1, "histogram has -1; need whole numbers"),
        (("histogram", 0, 1, 0), 4, "histogram has 4; need whole numbers, 0 or at least 5"),
        (("histogram", 0, 1, 0), 6.5, "histogram has 6.5"),
        (("histogram", 0, 1, 0), np.nan, "histogram has nan"),
        (("histogram", 0, 1, 0), np.inf, "histogram has inf"),
        (("histogram", 0, 1, 0), 50, "the same sum for each"),
        (("histogram", 0, 1), 0, "the same sum for each"),
        (("histogram", 0), 0, "the same|none or 5"),
        (("confusion", 0, 0), -2, "matrix has -2"),
        (("confusion", 0, 0), 3, "matrix has 3"),
        (("confusion", 0, 0), 1e12, "matrix has 1e"),
        (("confusion", 0, 0), -1, "one withheld cell"),
        (("confusion", 0, 0), 900, "the rows of the confusion matrix have"),
        (("confusion", 0), 0, "the rows of the confusion matrix have"),
        (("confusion", np.s_[:2], np.s_[:2]), -1, None),
    ],
)
def test_check_refuses_what_no_site_can_have_counted(
    where: tuple[str | int | slice, ...], value: float, message: str | None
) -> None:
    histogram, confusion = good()
    check(histogram, confusion)
    table = {"histogram": histogram, "confusion": confusion}[str(where[0])]
    table[where[1:]] = value
    if message is None:
        check(histogram, confusion)
    else:
        with pytest.raises(ValueError, match=message):
            check(histogram, confusion)


def test_check_refuses_tables_that_disagree() -> None:
    histogram, confusion = good()
    for tables in ((histogram[:, :, 1:], confusion), (histogram, confusion[:2]), (histogram[:1], confusion[:1, :1])):
        with pytest.raises(ValueError, match=r"need \(K, 2, 1000\) and \(K, K\)"):
            check(*tables)
    moved = histogram.copy()
    moved[0, :, 0] += [-moved[0, 0, 0], 0]
    moved[0, 0, np.flatnonzero(moved[0, 0])[0]] += histogram[0, 0, 0]
    check(moved, confusion)  # elsewhere in its row is another prediction, nothing impossible
    pair, matrix = good(classes=2)
    check(pair, matrix)
    pair[0] = pair[0, :, ::-1]
    with pytest.raises(ValueError, match="mirror image"):
        check(pair, matrix)
    few = np.where(confusion == confusion[1, 1], WITHHELD, confusion)
    few[1] = [WITHHELD, WITHHELD, confusion[1].sum()]
    few[0, 0] = WITHHELD
    few[0, 1] = WITHHELD
    with pytest.raises(ValueError, match="or 5 less where cells are withheld"):
        check(histogram, few)


# the curves


def centred(rows: int, seed: int) -> tuple[Floats, Ints]:
    """Probabilities of class 1 in the middle of bins, many tied, and labels."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=rows)
    bins = np.clip(rng.normal(BINS // 2 + 100 * y, 150).astype(int), 0, BINS - 1) // 20 * 20
    return ((edges()[1:] + edges()[:-1]) / 2)[bins], y


def test_curves_of_plain_counts_are_sklearns() -> None:
    score, y = centred(300, 0)
    histogram = count(np.stack([1 - score, score], 1), y, names(300), least=1)[0][1].astype(float)
    x, up = roc(histogram)
    assert (x[0], up[0], x[-1], up[-1]) == (0, 0, 1, 1)
    assert binned_auc(histogram) == pytest.approx(roc_auc_score(y, score), abs=1e-9)
    recall, precision = precision_recall(histogram)
    area = (np.diff(np.append(0, recall)) * precision).sum()
    assert area == pytest.approx(average_precision_score(y, score), abs=1e-9)
    predicted, observed, images = calibration(histogram)
    inside = [np.ceil(score * 10) == i + 1 for i in range(10)]
    np.testing.assert_allclose(images, [part.sum() for part in inside if part.any()])
    np.testing.assert_allclose(predicted, [score[part].mean() for part in inside if part.any()])
    np.testing.assert_allclose(observed, [y[part].mean() for part in inside if part.any()])
    for curve in (roc, precision_recall):
        with pytest.raises(ValueError, match="images in both rows"):
            curve(np.zeros((2, BINS)))


def test_spreading_keeps_sums_and_means_and_leaves_plain_counts_alone() -> None:
    histogram = good()[0]
    even = spread(histogram)
    np.testing.assert_allclose(even.sum(2), histogram.sum(2))
    np.testing.assert_allclose(even @ np.arange(BINS), histogram @ np.arange(BINS))
    assert ((even > 0).sum(2) > 5 * (histogram > 0).sum(2)).all()
    np.testing.assert_array_equal(spread(histogram, least=1), histogram)
    alone = np.zeros((2, BINS))
    alone[:, 7] = 6, 60
    np.testing.assert_array_equal(spread(alone), alone)


def probed(classes: int, rows: int, seed: int) -> Scores:
    """A linear probe of features that tell little to much; its strength decides how narrow the probabilities are."""
    centers = torch.randn(classes, 16, generator=torch.Generator().manual_seed(99))

    def split(number: int, stream: int) -> Features:
        rng = torch.Generator().manual_seed(3 * seed + stream)
        labels = torch.randint(classes, (number,), generator=rng)
        z = (0.25, 0.4, 0.7)[seed % 3] * centers[labels] + torch.randn(number, 16, generator=rng)
        return Features(z, labels, names(number))

    grid = [0.001, 0.01, 0.1, 1.0]
    return linear_probe(split(300, 0), split(100, 1), split(rows, 2), classes=classes, grid=grid, seed=0)


def errors(scores: Scores, least: int) -> list[float]:
    """Binned less exact area under the ROC curve, of each class that is shown."""
    histogram, _ = count(scores.probabilities, scores.labels, scores.patients, least=least)
    even, classes = spread(histogram, least=least), scores.probabilities.shape[1]
    return [
        binned_auc(even[k]) - roc_auc_score(scores.labels == k, scores.probabilities[:, k])
        for k in range(classes)
        if histogram[k].any()
    ]


@pytest.mark.parametrize(("classes", "rows"), [(2, 200), (2, 500), (4, 200), (4, 500)])
def test_the_binned_area_is_near_the_exact_one(classes: int, rows: int) -> None:
    samples = [probed(classes, rows, seed) for seed in range(10)]
    plain, grouped = (np.array([errors(scores, least) for scores in samples]) for least in (1, LEAST))  # (seeds, K)
    assert np.abs(plain).max() < 0.003
    reported = np.abs(grouped.mean(axis=1))  # of the area that is reported
    assert np.quantile(reported, 0.9) < 0.005
    assert reported.max() < 0.008


def test_the_binned_area_is_near_the_exact_one_on_real_images() -> None:
    data = np.load(shared("medmnist_rebuilt/pneumoniamnist.npz"))

    def split(name: str, number: int) -> Features:
        images = torch.from_numpy(data[f"{name}_images"][:number]).float()[:, None] / 255
        labels = torch.from_numpy(data[f"{name}_labels"][:number, 0].astype(np.int64))
        return Features(torch.nn.functional.avg_pool2d(images, 4).flatten(1), labels, names(len(labels)))

    train, val, test = split("train", 300), split("val", 200), split("test", 624)
    scores = linear_probe(train, val, test, classes=2, grid=[0.001, 0.1], seed=0)
    assert np.abs(errors(scores, LEAST)).max() < 0.005
