"""The losses of MedCSS against plain loops, and their invariants."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from medfl.errors import ConfigError
from medfl.methods.medcss_losses import (
    alignment,
    check_labels,
    coding_rate,
    coding_rate_bound,
    coding_rate_hinge,
    entropies,
    jensen_shannon,
    supervised_loss,
)
from tests import references

DOUBLE = torch.float64


@pytest.mark.parametrize(("rows", "width"), [(16, 64), (64, 16), (32, 2048)])
def test_coding_rate_is_the_logdet_of_the_covariance(rows: int, width: int) -> None:
    features = torch.nn.functional.normalize(torch.randn(rows, width, dtype=DOUBLE), dim=1)
    expected, alpha = references.coding_rate(features, alpha=width / 0.5), width / 0.5
    assert float(coding_rate(features, alpha=alpha)) == pytest.approx(expected, rel=1e-10)
    assert float(coding_rate(features.float(), alpha=alpha)) == pytest.approx(expected, rel=1e-4)
    assert expected <= coding_rate_bound(rows, width, alpha=alpha)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_coding_rate_keeps_its_invariances(rows: int, width: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, dtype=DOUBLE, generator=draw)
    turn = torch.linalg.qr(torch.randn(width, width, dtype=DOUBLE, generator=draw))[0]
    rate = coding_rate(features, alpha=3.0)
    same = (features[torch.randperm(rows, generator=draw)], features + 5.0, features @ turn)
    for other in same:
        torch.testing.assert_close(coding_rate(other, alpha=3.0), rate, rtol=1e-9, atol=1e-9)
    assert coding_rate(features, alpha=4.0) > rate > 0
    assert coding_rate(2 * features, alpha=3.0) > rate > coding_rate(features / 2, alpha=3.0)


def test_coding_rate_of_equal_rows_is_zero_and_of_one_direction_finite_in_half_precision() -> None:
    assert float(coding_rate(torch.ones(8, 3, dtype=DOUBLE), alpha=10.0)) == pytest.approx(0, abs=1e-12)
    line = (torch.randn(40, 1) * torch.ones(1, 64)).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rate = coding_rate(line, alpha=128.0)
    torch.autograd.backward(rate)
    assert rate.isfinite()
    assert line.grad is not None
    assert line.grad.isfinite().all()


def test_coding_rate_of_broken_features_is_nan_and_no_number() -> None:
    assert coding_rate(torch.full((4, 3), float("nan")), alpha=1.0).isnan()


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_coding_rate_has_the_gradient_of_finite_differences(shape: tuple[int, ...]) -> None:
    features = torch.randn(*shape, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: coding_rate(f, alpha=2.0), features)


@pytest.mark.parametrize("estimator", ["sample", "marginal", "histogram"])
def test_alignment_is_the_papers_in_each_reading(estimator: str) -> None:
    h3, h4 = torch.randn(2, 9, 5, dtype=DOUBLE)
    expected = references.alignment(h3, h4, estimator=estimator, temperature=0.7)
    got = alignment(h3, h4, estimator=estimator, temperature=0.7)
    assert float(got) == pytest.approx(expected, rel=1e-9)
    assert float(alignment(h4, h3, estimator=estimator, temperature=0.7)) == pytest.approx(expected, rel=1e-9)


def test_jensen_shannon_is_that_of_scipy_and_ends_at_ln_2() -> None:
    log_p, log_q = torch.randn(2, 6, 11, dtype=DOUBLE).log_softmax(-1)
    expected = jensenshannon(log_p.exp().numpy(), log_q.exp().numpy(), axis=1) ** 2
    torch.testing.assert_close(jensen_shannon(log_p, log_q), torch.from_numpy(expected))
    apart = torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]])
    for estimator in ("sample", "marginal"):
        assert float(alignment(*apart, estimator=estimator, temperature=1.0)) == pytest.approx(math.log(2), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(2, 6), st.floats(0.1, 3.0), st.integers(0, 10**6))
def test_the_marginal_never_exceeds_the_sample_divergence(rows: int, width: int, temperature: float, seed: int) -> None:
    h3, h4 = 4 * torch.randn(2, rows, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    sample, marginal = (
        float(alignment(h3, h4, estimator=name, temperature=temperature)) for name in ("sample", "marginal")
    )
    assert -1e-12 <= marginal <= sample + 1e-12 <= math.log(2) + 1e-9
    moved = alignment(h3, h3 + torch.arange(rows)[:, None], estimator="sample", temperature=temperature)
    assert float(moved) == pytest.approx(0, abs=1e-12)  # a softmax does not see a constant per row


def test_the_sample_divergence_is_a_mean_over_independent_rows() -> None:
    h3, h4 = torch.randn(2, 6, 5, dtype=DOUBLE)
    other = h4.clone()
    other[1:] = torch.randn(5, 5)

    def gradient(h4: Tensor) -> Tensor:
        leaf = h3.clone().requires_grad_()
        (found,) = torch.autograd.grad(alignment(leaf, h4, estimator="sample", temperature=1.0), leaf)
        assert isinstance(found, Tensor)
        return found

    torch.testing.assert_close(gradient(h4)[0], gradient(other)[0])
    assert not torch.allclose(gradient(h4)[1], gradient(other)[1])


def test_histograms_do_not_see_the_order_of_rows_and_survive_a_constant() -> None:
    h3, h4 = torch.randn(2, 20, 4, dtype=DOUBLE)
    shuffled = alignment(h3, h4[torch.randperm(20)], estimator="histogram", temperature=1.0)
    torch.testing.assert_close(shuffled, alignment(h3, h4, estimator="histogram", temperature=1.0))
    constant = torch.ones(20, 4, requires_grad=True)
    loss = alignment(constant, constant, estimator="histogram", temperature=1.0)
    torch.autograd.backward(loss)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ["sample", "marginal"])
def test_alignment_has_the_gradient_of_finite_differences(estimator: str) -> None:
    h3, h4 = torch.randn(2, 3, 4, dtype=DOUBLE)
    h3.requires_grad_()
    h4.requires_grad_()
    loss: Callable[[Tensor, Tensor], Tensor] = lambda a, b: alignment(a, b, estimator=estimator, temperature=0.5)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (h3, h4))


def test_entropies_agree_exactly_where_the_rows_do() -> None:
    rows = torch.randn(5, 7, dtype=DOUBLE)
    marginal, mean = entropies(rows, temperature=1.0)
    assert 0 < mean < marginal < math.log(7)
    torch.testing.assert_close(*entropies(rows[:1].expand(5, 7), temperature=1.0))


def test_the_two_directions_of_the_hinge_exclude_each_other() -> None:
    spread = torch.nn.functional.normalize(torch.randn(32, 8, dtype=DOUBLE), dim=1)
    line = torch.randn(32, 1, dtype=DOUBLE).sign() * torch.nn.functional.normalize(torch.ones(1, 8, dtype=DOUBLE))
    mid, deep = (coding_rate(f, alpha=16.0) for f in (spread, line))
    assert coding_rate_hinge(mid, deep) == mid - deep > 0  # the printed equation is the default
    assert coding_rate_hinge(mid, deep, direction="text") == 0
    assert coding_rate_hinge(deep, mid, direction="equation") == 0
    assert coding_rate_hinge(deep, mid, direction="text") > 0


def test_supervised_loss_is_binary_for_two_classes() -> None:
    logits, labels = torch.randn(6, 1, dtype=DOUBLE), torch.tensor([0, 1, 1, 0, 1, 0])
    both = torch.cat([torch.zeros(6, 1, dtype=DOUBLE), logits], dim=1)  # sigmoid(x) = softmax([0, x])
    expected = torch.nn.functional.cross_entropy(both, labels)
    torch.testing.assert_close(supervised_loss(logits, labels, classes=2), expected)
    with pytest.raises(ConfigError, match=r"method.classes=2: got labels from 0 to 2, need 0 to 1"):
        check_labels(torch.tensor([0, 1, 2, 0, 1, 0]), 2)
