"""Aggregation rules against plain references, and their invariants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfl.errors import ConfigError
from medfl.rules import Before, layer_divergence_aware, site_weights, trimmed_mean, uniform_mean, weighted_mean

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


@given(VOLUMES, st.floats(0.05, 1.0))
def test_shares_sum_to_one_and_respect_the_cap(volumes: list[int], cap: float) -> None:
    shares = site_weights(volumes, cap)
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) <= max(cap, 1 / len(volumes)) + 1e-9
    order = np.argsort(volumes, kind="stable")
    assert (np.diff(np.asarray(shares)[order]) >= -1e-9).all()  # more volumes never weigh less


def test_uncapped_shares_are_proportional() -> None:
    assert site_weights([100, 300, 400], 1.0) == pytest.approx([0.125, 0.375, 0.5])
