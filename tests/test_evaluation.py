import dataclasses
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from medfl.evaluation.collapse import (
    alignment,
    collapsed,
    embedding_std,
    monitors,
    rankme,
    rankme_from_sums,
    sums,
    uniformity,
)
from medfl.evaluation.knn import knn
from medfl.evaluation.metrics import ECE_BINS, METRICS, Metric, accuracy, auc, point, pr_auc
from medfl.evaluation.probe import Features, Scores, linear_probe
from medfl.evaluation.statistics import (
    Interval,
    bootstrap,
    draws,
    mean_interval,
    measure,
    measure_findings,
    paired_difference,
    recovered_gap,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
UNDEFINED = Interval(None, None, None)
GRID = [0.001, 0.01, 0.1, 1.0]


def sample(rows: int, classes: int, seed: int, levels: int = 20) -> tuple[Floats, Ints]:
    """Informative probabilities (N, K) with many ties, and labels that hold every class."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=rows - classes)])
    scores = rng.integers(1, levels, size=(rows, classes)) + levels // 3 * np.eye(classes, dtype=int)[labels]
    return scores / scores.sum(axis=1, keepdims=True), labels


def known(value: float | None) -> float:
    """The value, which must be there."""
    if value is None:
        raise AssertionError("a value is missing")
    return value


def bounds(found: Interval) -> tuple[float, float]:
    return known(found.low), known(found.high)


def width_of(found: Interval) -> float:
    low, high = bounds(found)
    return high - low


def names(count: int) -> tuple[str, ...]:
    return tuple(f"patient-{i}" for i in range(count))


def features(rows: int, classes: int, seed: int, width: int = 16, signal: float = 0.7) -> Features:
    rng = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (rows,), generator=rng)
    z = signal * centers[labels] + torch.randn(rows, width, generator=rng)
    return Features(z, labels, names(rows))


def splits(classes: int = 3) -> tuple[Features, Features, Features]:
    return features(150, classes, 0), features(60, classes, 1), features(90, classes, 2)


def changed(split: Features, *, z: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> Features:
    return dataclasses.replace(
        split,
        features=split.features if z is None else z,
        labels=split.labels if labels is None else labels,
    )


# metrics


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_areas_are_sklearns_with_any_ties(rows: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([s / 6 for s, _ in rows]), np.array([int(p) for _, p in rows])
    found = [point(metric, np.stack([1 - scores, scores], axis=1), labels) for metric in (auc, pr_auc)]
    if len(set(labels.tolist())) < 2:
        assert found == [None, None]
    else:
        assert found == pytest.approx(
            [roc_auc_score(labels, scores), average_precision_score(labels, scores)], abs=1e-9
        )


def references(p: Floats, y: Ints) -> dict[str, float]:
    """Every metric in scikit-learn's words, or in a loop where it has none."""
    classes, guess, members = p.shape[1], p.argmax(1), np.unique(y).tolist()
    shown = [1] if classes == 2 else members
    macro = {"labels": members, "average": "macro", "zero_division": 0}
    return {
        "auc": np.mean([roc_auc_score(y == k, p[:, k]) for k in shown]),
        "pr_auc": np.mean([average_precision_score(y == k, p[:, k]) for k in shown]),
        "accuracy": accuracy_score(y, guess),
        "balanced_accuracy": recall_score(y, guess, **macro),
        "precision": precision_score(y, guess, **macro),
        "f1": f1_score(y, guess, **macro),
        "brier": sum(
            brier_score_loss(y == k, p[:, k], pos_label=True) for k in ([1] if classes == 2 else range(classes))
        ),
        "ece": calibration_error(p, y),
        "constant_accuracy": max(accuracy_score(y, np.full_like(y, k)) for k in range(classes)),
    }


def calibration_error(p: Floats, y: Ints) -> float:
    bins: dict[int, list[float]] = {}
    for row, label in zip(p, y, strict=True):
        bins.setdefault(math.ceil(max(row) * ECE_BINS), []).append(float(row.argmax() == label) - max(row))
    return sum(abs(sum(excess)) for excess in bins.values()) / len(y)


@pytest.mark.parametrize("classes", [2, 3, 11])
@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("missing", [False, True])
def test_metrics_are_those_of_sklearn(classes: int, levels: int, missing: bool) -> None:
    p, y = sample(200, classes, 0, levels)
    if missing and classes > 2:
        p, y = p[y != 1], y[y != 1]
    expected = references(p, y)
    assert expected.keys() == METRICS.keys()
    assert {name: point(metric, p, y) for name, metric in METRICS.items()} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", sorted(METRICS.keys() - {"constant_accuracy"}))  # its constant is the sample's
def test_counts_are_repeated_rows(name: str, classes: int) -> None:
    p, y = sample(40, classes, 1)
    counts = np.random.default_rng(2).integers(0, 4, size=(40, 8))
    counts[:, 0] = y == 1  # one class alone
    counts[y == 0, 1] = 0
    counts[:, 2] = 0
    at_once = METRICS[name](p, y, counts.astype(float))
    one_by_one = [METRICS[name](p.repeat(c, axis=0), y.repeat(c))[0] for c in counts.T]
    np.testing.assert_allclose(at_once, one_by_one, rtol=0, atol=1e-12)


def test_measure_draws_every_metric_from_the_same_resamples() -> None:
    p, y = sample(60, 3, 0)
    patients = names(20) * 3
    table = measure(p, y, patients, resamples=50, seed=3)
    assert table.keys() == METRICS.keys() | {"n_test"}
    for name, metric in METRICS.items():
        assert table[name] == bootstrap(metric, p, y, patients, resamples=50, seed=3)


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        (np.ones((3, 1)), np.zeros(3, dtype=int), "K >= 2"),
        (np.ones((3, 2)), np.zeros(2, dtype=int), "K >= 2"),
        (np.ones((3, 2)), np.array([0, 1, -1]), "drop unknown labels"),
        (np.ones((3, 2)), np.array([0, 1, 2]), r"got labels 0\.\.2"),
        (np.full((3, 2), np.nan), np.array([0, 1, 1]), "NaN or infinite"),
    ],
)
def test_metrics_refuse_what_is_no_sample(p: Floats, y: Ints, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auc(p, y)


# intervals


def test_bootstrap_is_a_loop_over_resampled_patients() -> None:
    p, y = sample(30, 2, 0)
    patients = names(10) * 3
    values = draws(auc, p, y, patients, resamples=3, seed=5)
    again = draws(auc, p, y, patients, resamples=3, seed=5)
    other = draws(auc, p, y, patients, resamples=3, seed=6)
    np.testing.assert_array_equal(values, again)
    assert not np.isin(other[1:], values[1:]).all()
    by_accuracy = draws(accuracy, p, y, patients, resamples=400, seed=5)
    shares = np.array([(p.argmax(1) == y)[i::10].mean() for i in range(10)])  # of each patient
    rng = np.random.default_rng(0)
    loop = [shares[rng.integers(10, size=10)].mean() for _ in range(4000)]
    assert by_accuracy[1:].std() == pytest.approx(np.std(loop), rel=0.15)


def test_bootstrap_interval_covers_the_truth() -> None:
    rng, shift, hits, runs = np.random.default_rng(0), 1.0, 0, 200
    truth = stats.norm.cdf(shift / math.sqrt(2))
    for run in range(runs):
        y = np.arange(100) % 2
        score = stats.norm.cdf(rng.normal(size=100) + shift * y)
        found = bootstrap(auc, np.stack([1 - score, score], 1), y, names(100), resamples=200, seed=run)
        low, high = bounds(found)
        hits += low <= truth <= high
    assert 0.89 <= hits / runs <= 0.99  # 95 % within 3 standard errors and the percentile method's own loss


def test_rows_of_one_patient_are_no_new_evidence() -> None:
    p, y = sample(60, 2, 4)
    fivefold = {"resamples": 300, "seed": 0}
    once = bootstrap(auc, p, y, names(60), **fivefold)
    copies = bootstrap(auc, np.tile(p, (5, 1)), np.tile(y, 5), names(60) * 5, **fivefold)
    naive = bootstrap(auc, np.tile(p, (5, 1)), np.tile(y, 5), names(300), **fivefold)
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert width_of(once) / width_of(naive) == pytest.approx(math.sqrt(5), rel=0.3)


def test_undefined_values_are_none_and_one_patient_has_no_interval() -> None:
    nothing = measure(np.empty((0, 3)), np.empty(0, dtype=int), (), resamples=10, seed=0)
    assert [nothing[name] for name in METRICS] == [UNDEFINED] * len(METRICS)
    assert nothing["n_test"].value == 0
    one_class = measure(np.full((4, 2), 0.5), np.ones(4, dtype=int), names(4), resamples=10, seed=0)
    assert one_class["auc"] == one_class["balanced_accuracy"] == UNDEFINED
    assert one_class["accuracy"] == Interval(0.0, 0.0, 0.0)
    p, y = sample(20, 2, 0)
    assert bootstrap(auc, p, y, ["same"] * 20, resamples=50, seed=0) == Interval(point(auc, p, y), None, None)
    rare = np.zeros(20, dtype=int)
    rare[0] = 1  # in 64 % of the resamples
    assert bootstrap(auc, p, rare, names(20), resamples=200, seed=0).low is not None
    with pytest.raises(ValueError, match="got 3 patients for 20 labels"):
        draws(auc, p, y, names(3), resamples=1, seed=0)


def test_findings_are_sklearns_means_over_what_is_known_with_one_resample_for_all() -> None:
    rng, findings, patients = np.random.default_rng(0), ("mass", "edema", "hernia", "fibrosis"), names(50) * 3
    y = (rng.random((150, 4)) < (0.4, 0.15, 0.0, 0.5)).astype(np.int64)  # a hernia is nowhere
    p = (rng.integers(10, size=(150, 4)) + 4 * y) / 14
    p[:, 3] = np.nan  # could not be predicted
    y[rng.random((150, 4)) < 0.3] = -1
    y[:5] = -1
    table = measure_findings(p, y, patients, findings, resamples=60, seed=3)

    def mean_of(score: Callable[[Ints, Floats], float]) -> Metric:
        def metric(p: Floats, y: Ints, counts: Floats | None = None) -> Floats:
            found = []
            for times in np.ones((1, len(y)), int) if counts is None else counts.T.astype(int):
                parts = [(y[:, k].repeat(times), p[:, k].repeat(times)) for k in (0, 1)]
                values = [score(truth[truth >= 0], guess[truth >= 0]) for truth, guess in parts if 1 in truth]
                found.append(np.mean(values))
            return np.array(found)

        return metric

    rows = (y >= 0).any(axis=1)
    for name, score in {"auc": roc_auc_score, "pr_auc": average_precision_score}.items():
        for k in (0, 1):
            known = y[:, k] >= 0
            assert table[f"{name}_{findings[k]}"].value == pytest.approx(score(y[known, k], p[known, k]), abs=1e-9)
        tested = [patient for patient, there in zip(patients, rows, strict=True) if there]
        values = draws(mean_of(score), p[rows], y[rows], tested, resamples=60, seed=3)
        assert table[name].value == pytest.approx(values[0], abs=1e-9)
        assert bounds(table[name]) == pytest.approx(np.quantile(values[1:], (0.025, 0.975)), abs=1e-9)
        assert table[f"{name}_hernia"] == table[f"{name}_fibrosis"] == UNDEFINED
    assert table["n_test"] == Interval(float(rows.sum()), None, None)
    empty = measure_findings(p[:5], y[:5], patients[:5], findings, resamples=10, seed=0)
    assert (empty["auc"], empty["auc_mass"], empty["n_test"].value) == (UNDEFINED, UNDEFINED, 0)


def test_paired_difference_is_narrower_than_either_and_zero_against_itself() -> None:
    p, y = sample(100, 2, 0)
    q = np.clip(p + np.random.default_rng(1).normal(scale=0.02, size=p.shape), 0, 1)
    a, b = (draws(auc, each, y, names(100), resamples=300, seed=0) for each in (p, q))
    alone = bootstrap(auc, p, y, names(100), resamples=300, seed=0)
    both = paired_difference(a, b)
    assert width_of(both) < width_of(alone) / 2
    assert paired_difference(a, a) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="need equal shapes"):
        paired_difference(a, b[:5])


def test_mean_interval_is_students() -> None:
    values = [0.71, None, 0.74, 0.69, float("nan"), 0.80]
    kept = [0.71, 0.74, 0.69, 0.80]
    found = mean_interval(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(kept), scale=stats.sem(kept))
    assert (found.low, found.high) == pytest.approx(expected)
    assert mean_interval([0.5]) == Interval(0.5, None, None)
    assert mean_interval([None]) == UNDEFINED


# recovered gap


def arms(
    federated: float, own: float, cross: float, central: float, noise: float = 0.005
) -> tuple[Floats, Floats, Floats]:
    """Draws of three sites: entry 0 exact, 400 resamples with independent noise."""
    rng = np.random.default_rng(0)

    def spread(values: Floats) -> Floats:
        jitter = rng.normal(scale=noise, size=(*values.shape, 401))
        jitter[..., 0] = 0
        return values[..., None] + jitter

    local = np.where(np.eye(3, dtype=bool), own, cross)
    return spread(np.full(3, federated)), spread(local), spread(np.full(3, central))


def test_recovered_gap_has_both_forms_and_the_benefit_of_each_site() -> None:
    found = recovered_gap(*arms(0.75, 0.7, 0.6, 0.8))
    assert found.own.recovered.value == pytest.approx(0.5)
    assert found.cross.recovered.value == pytest.approx(0.75)
    for form in (found.own, found.cross):
        assert form.reason == ""
        low, high = bounds(form.recovered)
        assert low < known(form.recovered.value) < high
    assert found.own.standard_error == pytest.approx(0.005 * math.sqrt(2 / 3), rel=0.2)
    assert [b.value for b in found.benefits] == pytest.approx([0.05] * 3)
    assert found.smallest_benefit == pytest.approx(0.05)


def test_fiellers_interval_is_that_of_the_resampled_ratio() -> None:
    federated, local, central = arms(0.75, 0.7, 0.6, 0.8)
    own = local[np.eye(3, dtype=bool)]
    ratios = (federated - own).mean(0) / (central - own).mean(0)
    found = recovered_gap(federated, local, central).own.recovered
    np.testing.assert_allclose(bounds(found), np.quantile(ratios, [0.025, 0.975]), atol=0.02)


@pytest.mark.parametrize(
    ("values", "noise", "reason"),
    [
        ((0.75, 0.735, 0.7, 0.75), 0.001, r"central - local is 0\.015, needs more than 0\.020"),
        ((0.75, 0.70, 0.6, 0.75), 0.05, r"not resolvable.*2 standard errors"),
        ((0.75, 0.72, 0.6, 0.70), 0.001, "a reference, not a bound"),
    ],
)
def test_no_ratio_without_a_resolvable_gap(
    values: tuple[float, float, float, float], noise: float, reason: str
) -> None:
    own = recovered_gap(*arms(*values, noise=noise)).own
    assert own.recovered == UNDEFINED
    with pytest.raises(LookupError, match=reason):
        raise LookupError(own.reason)
    assert own.federated == pytest.approx(values[0])


def test_recovered_gap_leaves_out_sites_and_forms_without_values() -> None:
    federated, local, central = arms(0.75, 0.7, 0.6, 0.8)
    whole = recovered_gap(federated, local, central)
    local[1, 1] = np.nan
    part = recovered_gap(federated, local, central)
    assert part.own.recovered.value == pytest.approx(whole.own.recovered.value)
    assert part.benefits[1] == UNDEFINED
    local[~np.eye(3, dtype=bool)] = np.nan
    assert "no site has a value" in recovered_gap(federated, local, central).cross.reason
    without = recovered_gap(federated[:, :1], local[:, :, :1], central[:, :1]).own
    assert "no standard error" in without.reason
    with pytest.raises(ValueError, match=r"need \(S, 1 \+ R\)"):
        recovered_gap(federated, federated, central)


# probe and neighbours


def probe(train: Features, val: Features, test: Features, classes: int = 3) -> Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return linear_probe(train, val, test, classes=classes, grid=GRID, seed=0)


def neighbors(train: Features, test: Features, classes: int = 3) -> Scores:
    return knn(train, test, classes=classes, neighbors=20, temperature=0.07)


@pytest.mark.parametrize("classes", [2, 3])
def test_probe_and_neighbors_learn_what_is_there(classes: int) -> None:
    train, val, test = splits(classes)
    for scores in (probe(train, val, test, classes), neighbors(train, test, classes)):
        assert scores.note == ""
        assert scores.probabilities.shape == (90, classes)
        np.testing.assert_allclose(scores.probabilities.sum(1), 1)
        assert known(point(auc, scores.probabilities, scores.labels)) > 0.8
        assert scores.patients == test.patients


def test_probe_takes_the_strength_that_is_best_on_val() -> None:
    train, val, test = splits()
    alone = {c: linear_probe(train, val, val, classes=3, grid=[c], seed=0).probabilities for c in GRID}
    reached = {c: known(point(auc, p, val.labels.numpy())) for c, p in alone.items()}
    assert reached[known(probe(train, val, test).strength)] == pytest.approx(max(reached.values()), abs=2e-3)


def test_probe_ignores_scale_offset_and_constant_features() -> None:
    train, val, test = splits()
    scale, offset = torch.logspace(-3, 3, 16), torch.linspace(-2, 2, 16)

    def moved(split: Features) -> Features:
        constant = torch.full((len(split.labels), 1), 0.1)
        return changed(split, z=torch.cat([(split.features + offset) * scale, constant], dim=1))

    plain, affine = probe(train, val, test), probe(moved(train), moved(val), moved(test))
    assert affine.strength == plain.strength
    np.testing.assert_allclose(affine.probabilities, plain.probabilities, atol=1e-3)


@pytest.mark.parametrize("labels", [-torch.ones(60, dtype=torch.int64), torch.ones(60, dtype=torch.int64)])
def test_probe_without_a_usable_val_takes_the_middle_and_says_so(labels: torch.Tensor) -> None:
    train, val, test = splits()
    scores = probe(train, changed(val, labels=labels), test)
    assert scores.strength == 0.1
    assert "middle of the grid" in scores.note
    assert len(scores.probabilities) == 90


def test_unknown_labels_are_dropped_and_absent_classes_get_nothing() -> None:
    train, val, test = splits()
    hidden = changed(train, labels=torch.where(train.labels == 1, -1, train.labels))
    some = changed(test, labels=torch.where(torch.arange(90) % 3 == 0, -1, test.labels))
    for scores in (probe(hidden, val, some), neighbors(hidden, some)):
        assert len(scores.probabilities) == len(scores.labels) == len(scores.patients) == 60
        assert scores.probabilities[:, 1].max() == 0
        assert scores.patients[0] == "patient-1"
    assert "no training images of class 1" in probe(hidden, val, some).note


@pytest.mark.parametrize(
    ("part", "labels", "value", "note"),
    [
        ("train", -1, 0.0, "no labelled training images"),
        ("train", 2, 0.0, "all 150 labelled training images are of class 2"),
        ("test", -1, 0.0, "no labelled test images"),
        ("test", None, math.nan, "NaN or infinity"),
    ],
)
def test_degenerate_splits_give_a_note_and_no_probabilities(
    part: str, labels: int | None, value: float, note: str
) -> None:
    train, val, test = splits()
    split = {"train": train, "test": test}[part]
    spoiled = changed(
        split,
        z=split.features + value,
        labels=split.labels if labels is None else torch.full_like(split.labels, labels),
    )
    train, test = (spoiled, test) if part == "train" else (train, spoiled)
    for scores in (probe(train, val, test), neighbors(train, test)):
        assert note in scores.note
        assert scores.probabilities.shape == (0, 3)
        table = measure(scores.probabilities, scores.labels, scores.patients, resamples=5, seed=0)
        assert table["auc"] == UNDEFINED


def test_an_easy_split_and_an_empty_one_do_not_trouble_the_probe() -> None:
    train = features(40, 2, 0, signal=100)
    scores = probe(train, Features(torch.empty(0, 16), torch.empty(0, dtype=torch.int64), ()), train, 2)
    assert point(auc, scores.probabilities, scores.labels) == pytest.approx(1)


def test_neighbors_vote_as_in_a_loop_whatever_the_scale() -> None:
    train, test = features(50, 3, 0), features(12, 3, 1)
    found = neighbors(train, test)
    for row, votes in zip(test.features.double(), found.probabilities, strict=True):
        pairs = zip(train.features.double(), train.labels.tolist(), strict=True)
        cosines = [(float(row @ other / row.norm() / other.norm()), label) for other, label in pairs]
        nearest = sorted(cosines, reverse=True)[:20]
        weights = [math.exp(c / 0.07) for c, _ in nearest]
        for k in range(3):
            share = sum(w for w, (_, label) in zip(weights, nearest, strict=True) if label == k) / sum(weights)
            assert votes[k] == pytest.approx(share, abs=1e-9)
    lengths = torch.rand(50, 1) + 0.1
    scaled = neighbors(changed(train, z=train.features * lengths * 1e3), changed(test, z=test.features * 7))
    np.testing.assert_allclose(scaled.probabilities, found.probabilities, atol=1e-5)


def test_neighbors_are_limited_to_the_training_rows() -> None:
    train = Features(torch.eye(3), torch.tensor([0, 0, 1]), names(3))
    scores = knn(train, train, classes=2, neighbors=20, temperature=1e6)
    np.testing.assert_allclose(scores.probabilities, [[2 / 3, 1 / 3]] * 3, atol=1e-5)


def test_probes_refuse_the_callers_mistakes() -> None:
    train, val, test = splits()
    with pytest.raises(ValueError, match="need at least one C"):
        linear_probe(train, val, test, classes=3, grid=[], seed=0)
    with pytest.raises(ValueError, match="got label 2 with 2 classes"):
        probe(train, val, test, classes=2)
    with pytest.raises(ValueError, match="neighbors=0"):
        knn(train, test, classes=3, neighbors=0, temperature=0.07)
    with pytest.raises(ValueError, match=r"need \(N, F\), N and N"):
        Features(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), names(2))


# collapse


def gaussian(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_rankme_of_known_spectra() -> None:
    assert rankme(gaussian(4000, 32)) == pytest.approx(32, rel=0.01)
    assert rankme(torch.full((50, 8), 3.3)) == pytest.approx(1)
    line = gaussian(500, 1) @ gaussian(1, 64, seed=1) + 5.0
    assert rankme(line) == pytest.approx(1, abs=1e-3)
    plane = gaussian(4000, 4).double() @ torch.linalg.qr(gaussian(64, 4, seed=1).double()).Q.T
    assert rankme(plane) == pytest.approx(4, rel=0.01)
    assert math.isnan(rankme(torch.full((5, 2), math.nan)))
    with pytest.raises(ValueError, match=r"need .* N >= 1"):
        rankme(torch.empty(0, 4))


def test_rankme_is_the_papers_formula() -> None:
    z = gaussian(100, 12) * torch.logspace(0, -2, 12)
    sigma = torch.linalg.svdvals(z.double() - z.double().mean(0))
    shares = [float(s / sigma.sum()) + 1e-7 for s in sigma]
    assert rankme(z) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6)


@given(st.integers(2, 60), st.integers(1, 40), st.integers(0, 1000), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_rankme_is_bounded_and_blind_to_rotation_scale_and_offset(
    rows: int, width: int, seed: int, scale: float
) -> None:
    z = gaussian(rows, width, seed).double()
    rotation = torch.linalg.qr(gaussian(width, width, seed + 1).double()).Q
    value = rankme(z)
    assert 1 <= value <= min(rows, width)
    assert rankme(scale * z @ rotation) == pytest.approx(value, rel=1e-6)
    assert rankme(z + 3) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(("rows", "width", "offset"), [(300, 20, 0.0), (300, 20, 4.0), (30, 64, 1.0)])
def test_rankme_from_summed_sites_is_that_of_the_pool(rows: int, width: int, offset: float) -> None:
    z = gaussian(rows, width) * torch.logspace(0, -2, width) + offset
    counts, totals, seconds = zip(*(sums(part) for part in (z[: rows // 5], z[rows // 5 :])), strict=True)
    assert rankme_from_sums(sum(counts), sum(totals), sum(seconds)) == pytest.approx(rankme(z), rel=1e-4)
    assert rankme_from_sums(*sums(torch.full((40, 6), 3.3))) == pytest.approx(1)
    with pytest.raises(ValueError, match="need n >= 1"):
        rankme_from_sums(0, totals[0], seconds[0])


def test_embedding_std_alignment_and_uniformity_of_known_cases() -> None:
    z = gaussian(600, 64)
    assert embedding_std(z) == pytest.approx(1, abs=0.02)
    assert embedding_std(torch.ones(10, 4)) == pytest.approx(0, abs=1e-9)
    assert alignment(z, 3 * z) == pytest.approx(0, abs=1e-9)
    assert alignment(z, -z) == pytest.approx(4)
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    loop = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert uniformity(z) == pytest.approx(float(loop), abs=1e-9)
    assert uniformity(torch.ones(300, 4)) == pytest.approx(0, abs=1e-9)
    assert uniformity(5 * z) == pytest.approx(uniformity(z), abs=1e-6)
    with pytest.raises(ValueError, match="got 1 rows"):
        uniformity(z[:1])
    with pytest.raises(ValueError, match="equal shapes"):
        alignment(z, z[:5])


def test_collapse_is_told_from_health_with_its_thresholds() -> None:
    z = gaussian(500, 64)
    noise = 0.1 * gaussian(500, 64, seed=1)
    assert collapsed(monitors(z, z + noise), rank=64) is None
    point_like = monitors(10 + 0.1 * z, 10 + 0.1 * z + 0.01 * noise)
    assert "embedding std is 0.0" in str(collapsed(point_like, rank=64))
    line = gaussian(500, 1) @ gaussian(1, 64, seed=2)
    assert "RankMe is 1.0 of 64" in str(collapsed(monitors(line, line), rank=64))
    assert "rankme is not finite" in str(collapsed({"rankme": math.nan}, rank=64))
    assert monitors(z[:1], z[:1]) == {}
    assert collapsed({}, rank=64) is None
