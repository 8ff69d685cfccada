"""Aggregation rules against plain references, and their invariants."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.errors import ConfigError, NetworkError
from medfl.rules import (
    Before,
    clipped_mean,
    krum,
    krum_places,
    layer_divergence_aware,
    median,
    site_weights,
    trimmed_mean,
    uniform_mean,
    weighted_mean,
)
from medfl.whole import Whole

NOTHING = Before(np.zeros(0, np.float32), [])  # what a rule that does not look back gets
VOLUMES = st.lists(st.integers(1, 10**6), min_size=1, max_size=12)


def arrays(count: int, size: int = 70_000) -> list[np.ndarray]:
    return [np.random.default_rng(i).normal(size=size).astype(np.float32) for i in range(count)]


def test_weighted_mean_is_the_float64_sum_rounded_once() -> None:
    values, weights = arrays(5), [3.0, 1.0, 10.0, 0.5, 7.0]
    exact = sum(w * v.astype(np.float64) for w, v in zip(weights, values, strict=True)) / sum(weights)
    np.testing.assert_allclose(weighted_mean(values, weights, NOTHING), exact, rtol=1e-7, atol=1e-12)


@given(st.integers(2, 8), st.integers(1, 10**6))
def test_equal_values_stay_bit_equal_whatever_the_weights(count: int, seed: int) -> None:
    value = np.random.default_rng(seed).normal(size=50).astype(np.float32)
    weights = np.random.default_rng(seed + 1).integers(1, 10**6, count).astype(float).tolist()
    np.testing.assert_array_equal(weighted_mean([value] * count, weights, NOTHING), value)


def test_one_site_keeps_its_bits_and_gets_its_own_copy() -> None:
    value = arrays(1)[0]
    mean = weighted_mean([value], [17.0], NOTHING)
    np.testing.assert_array_equal(mean, value)
    assert not np.shares_memory(mean, value)


def test_uniform_mean_ignores_volumes() -> None:
    values = arrays(3, 10)
    np.testing.assert_array_equal(
        uniform_mean(values, [1, 100, 10**6], NOTHING), uniform_mean(values, [1, 1, 1], NOTHING)
    )


@given(st.permutations([1.0, 2.0, 3.0, 1e9, -1e9]))
def test_trimmed_mean_ignores_outliers_in_any_order(values: list[float]) -> None:
    votes = [np.full(4, value, np.float32) for value in values]
    np.testing.assert_array_equal(trimmed_mean(votes, [1.0] * 5, NOTHING, trim=1), np.full(4, 2.0))


def test_trimmed_mean_needs_enough_sites() -> None:
    with pytest.raises(ConfigError, match="got 2 sites, need 3"):
        trimmed_mean(arrays(2, 4), [1.0, 1.0], NOTHING, trim=1)


def test_layer_divergence_aware_weighs_each_layer_by_its_cosine() -> None:
    """Against the equation: a layer along the broadcast, one across it, one against it, and a bias."""
    before = Before(np.array([1, 0, 0, 2, 5, 5], np.float32), [(0, 2), (2, 2)])
    values = [np.array([1, 1, 0, 4, 1, 2], np.float32), np.array([2, 0, 0, -4, 3, 4], np.float32)]
    mean = layer_divergence_aware(values, [1.0, 3.0], before)
    first, second = 1 * 2**-0.5, 3 * 1.0
    np.testing.assert_allclose(mean[:2], (first * values[0][:2] + second * values[1][:2]) / (first + second), rtol=1e-6)
    np.testing.assert_allclose(mean[2:4], [0, 4])  # the opposite one counts as 0
    np.testing.assert_allclose(mean[4:], [2.5, 3.5])  # vectors: the weighted mean


def test_layer_divergence_aware_without_direction_is_the_weighted_mean() -> None:
    values, weights = arrays(3, 10), [1.0, 2.0, 3.0]
    fresh = Before(np.zeros(10, np.float32), [(0, 10)])
    expected = weighted_mean(values, weights, NOTHING)
    np.testing.assert_array_equal(layer_divergence_aware(values, weights, fresh), expected)
    same = layer_divergence_aware([values[0]] * 3, weights, Before(values[0], [(0, 10)]))
    np.testing.assert_allclose(same, values[0], rtol=1e-6)  # equal sites: nothing shrinks


def updates_of(values: list[np.ndarray], accepted: tuple[float, ...] = ()) -> Before:
    """What a rule knows of updates of one group from a broadcast of ones."""
    old = np.ones_like(values[0])
    return Before(old, [], Whole.of([{"g": v} for v in values], {"g": old}, accepted), range(len(values)))


def reference_krum(values: list[np.ndarray], bad: int) -> list[float]:
    """Scores by the definition (Blanchard et al. 2017, section 4): each to its n - f - 2 closest others."""
    scores = []
    for i, one in enumerate(values):
        squares = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(values) if j != i)
        scores.append(sum(squares[: len(values) - bad - 2]))
    return scores


@pytest.mark.parametrize(("sites", "bad"), [(3, 0), (5, 1), (8, 2), (9, 3)])
def test_krum_is_the_papers(sites: int, bad: int) -> None:
    values = [value.astype(np.float64) for value in arrays(sites, 70_000)]
    before, scores = updates_of(values), reference_krum(values, bad)
    order = sorted(range(sites), key=scores.__getitem__)
    assert krum_places(before.whole, bad=bad, keep=None) == order[: sites - bad]
    np.testing.assert_array_equal(krum(values, [1.0] * sites, before, bad=bad, keep=1), values[order[0]])
    best = np.mean([values[place] for place in sorted(order[:2])], axis=0)
    np.testing.assert_allclose(krum(values, [1.0] * sites, before, bad=bad, keep=2), best, rtol=1e-12)


@pytest.mark.parametrize("sites", [1, 2, 5, 8])
def test_median_is_numpys(sites: int) -> None:
    values = arrays(sites, 1000)
    exact = np.median(np.stack(values).astype(np.float64), axis=0)
    np.testing.assert_allclose(median(values, [1.0] * sites, NOTHING), exact, rtol=1e-6)


ROBUST = {
    "median": median,
    "trimmed_mean": lambda *given: trimmed_mean(*given, trim=2),
    "krum": lambda *given: krum(*given, bad=2, keep=1),
    "multi_krum": lambda *given: krum(*given, bad=2, keep=None),
}


@pytest.mark.parametrize("name", ROBUST)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1.0, 1e3, 1e6]), alike=st.booleans())
def test_two_of_eight_cannot_leave_the_honest_hull_in_any_order(
    name: str, seed: int, scale: float, alike: bool
) -> None:
    draw = np.random.default_rng(seed)
    honest = [draw.normal(size=20).astype(np.float32) for _ in range(6)]
    wild = [(scale * draw.normal(size=20) + 50).astype(np.float32) for _ in range(2)]
    values = [*honest, wild[0], wild[0] if alike else wild[1]]
    order = draw.permutation(8).tolist()
    results = []
    for given_order in (range(8), order):
        found = [values[place] for place in given_order]
        results.append(ROBUST[name](found, [1.0] * 8, updates_of(found)))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert (results[0] >= np.min(honest, axis=0) - 1e-5).all()
    assert (results[0] <= np.max(honest, axis=0) + 1e-5).all()


@pytest.mark.parametrize(
    ("sites", "given", "text"),
    [
        (4, {"bad": 1, "keep": 1}, "got 4 sites, need 5"),
        (6, {"bad": 2, "keep": None}, "got 6 sites, need 7"),
        (5, {"bad": -1, "keep": 1}, "rule.bad=-1"),
        (5, {"bad": 1, "keep": 5}, "got rule.keep=5, need 1 to 4"),
        (5, {"bad": 1, "keep": 0}, "got rule.keep=0, need 1 to 4"),
    ],
)
def test_krum_refuses_what_it_cannot_promise(sites: int, given: dict[str, int | None], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        krum(arrays(sites, 4), [1.0] * sites, updates_of(arrays(sites, 4)), **given)


def test_sites_that_are_missing_count_among_the_bad_ones() -> None:
    """Else a site that a rule is to withstand could end the study by an answer that is refused."""
    values = arrays(4, 40)  # of 5 that were asked
    before = replace(updates_of(values), missing=1)
    assert krum_places(before.whole, bad=1, keep=None, missing=1) == krum_places(before.whole, bad=0, keep=None)
    np.testing.assert_array_equal(
        trimmed_mean(values[:2], [1.0] * 2, before, trim=1), trimmed_mean(values[:2], [1.0] * 2, before, trim=0)
    )
    np.testing.assert_array_equal(median(values, [1.0] * 4, before), median(values, [1.0] * 4, NOTHING))
    with pytest.raises(NetworkError, match=r"krum: got 2 sites, need 3 to withstand rule.bad=1, 3 of which are"):
        krum(values[:2], [1.0] * 2, replace(updates_of(values[:2]), missing=3), bad=1, keep=1)
    with pytest.raises(ConfigError, match="krum: got 4 sites, need 5 to withstand"):
        krum(values, [1.0] * 4, before, bad=2, keep=1)


def test_clipped_mean_shortens_what_is_longer_than_the_median() -> None:
    old = np.ones(4, np.float32)
    moves = [np.array(row, np.float32) for row in ([1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 100, 0], [0, 0, 0, 0])]
    values = [old + move for move in moves]
    first = clipped_mean(values, [1.0] * 4, updates_of(values), most=1.0)  # median of 0, 1, 2, 100
    np.testing.assert_allclose(first - old, [0.25, 1.5 / 4, 1.5 / 4, 0], rtol=1e-6)
    later = clipped_mean(values, [1.0] * 4, updates_of(values, (4.0, 4.0, 1e9)), most=0.5)
    np.testing.assert_allclose(later - old, [0.25, 0.5, 0.5, 0], rtol=1e-6)
    still = clipped_mean([old] * 3, [1.0] * 3, updates_of([old] * 3), most=1.0)  # nobody moved
    np.testing.assert_array_equal(still, old)
    with pytest.raises(ConfigError, match=r"got rule\.most=0"):
        clipped_mean(values, [1.0] * 4, updates_of(values), most=0)


def test_whole_updates_are_compared_over_all_groups_and_a_silent_one_counts_as_unmoved() -> None:
    before = {"a": np.zeros(3, np.float32), "b": np.zeros(2, np.float32)}
    flats = [{"a": np.array([3, 0, 0], "f4"), "b": np.array([0, 4], "f4")}, {"a": np.array([0, 1, 0], "f4")}]
    whole = Whole.of(flats, before)
    np.testing.assert_allclose(whole.norms, [5, 1])
    np.testing.assert_allclose(whole.distances, [[0, 26], [26, 0]])
    np.testing.assert_allclose(whole.without(0).products, [[1]])


@given(VOLUMES, st.floats(0.05, 1.0))
def test_shares_sum_to_one_and_respect_the_cap(volumes: list[int], cap: float) -> None:
    shares = site_weights(volumes, cap)
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) <= max(cap, 1 / len(volumes)) + 1e-9
    order = np.argsort(volumes, kind="stable")
    assert (np.diff(np.asarray(shares)[order]) >= -1e-9).all()  # more volumes never weigh less


def test_uncapped_shares_are_proportional() -> None:
    assert site_weights([100, 300, 400], 1.0) == pytest.approx([0.125, 0.375, 0.5])
