"""Means that are made as arrays come: the float64 sum in order, bit for bit, and lowered weights at the end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.adding import Mean, mean
from medfl.rules import site_weights

VOLUMES = st.lists(st.integers(1, 10**6), min_size=1, max_size=13)


def arrays(count: int, dtype: str = "float32") -> list[np.ndarray]:
    return [np.random.default_rng(seed).standard_normal(257).astype(dtype) for seed in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(deadline=None)
@given(volumes=VOLUMES)
def test_a_mean_is_the_plain_loop_in_float64_to_the_last_bit(dtype: str, volumes: list[int]) -> None:
    values, total = arrays(len(volumes), dtype), np.zeros(257)
    for volume, value in zip(volumes, values, strict=True):
        total = total + volume * value.astype(np.float64)
    np.testing.assert_array_equal(mean(values, volumes), (total / sum(volumes)).astype(dtype))


@settings(deadline=None)
@given(VOLUMES, st.sampled_from([0.2, 0.35, 0.5, 0.9]))
def test_the_largest_weights_can_be_lowered_when_all_are_known(volumes: list[int], max_share: float) -> None:
    values, shares = arrays(len(volumes)), site_weights(volumes, max_share)
    found = Mean(apart=int(1 / max_share))
    for volume, value in zip(volumes, values, strict=True):
        found.add(value, volume)
    exact = sum(share * value.astype(np.float64) for share, value in zip(shares, values, strict=True))
    np.testing.assert_allclose(found.mean(shares), exact / sum(shares), rtol=1e-6, atol=1e-7)


def test_only_a_few_arrays_are_held() -> None:
    import weakref

    found, seen = Mean(apart=2), []
    for place, value in enumerate(arrays(40)):
        found.add(value, 1.0 + place % 7)
        seen.append(weakref.ref(value))
        del value
    assert sum(ref() is not None for ref in seen) <= 6
