"""The losses of MoCo, SimSiam and DCL: the equations as loops, their known values, and where gradients go."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.methods.byol import spread
from medfl.methods.contrast import crosswise, info_nce, pairwise_cosine, standardized, symmetric_kl

Loss = Callable[..., Tensor]
LOSSES = pytest.mark.parametrize("loss", [info_nce, symmetric_kl])
T = 0.3


def rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def shown(count: int = 5, negatives: int = 7) -> Tensor:
    """Nothing hidden."""
    return torch.zeros(count, negatives, dtype=torch.bool)


def some_hidden(count: int = 5, negatives: int = 7) -> Tensor:
    hidden = torch.rand(count, negatives) < 0.4
    hidden[:, 0] = False
    return hidden


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def visible(row: list[float], negatives: Tensor, hidden: Tensor) -> list[float]:
    """e^{row·n / τ} of the negatives that are not hidden."""
    pairs = zip(negatives.tolist(), hidden.tolist(), strict=True)
    return [math.exp(dot(row, n) / T) for n, away in pairs if not away]


def nce_by_loops(q: Tensor, p: Tensor, negatives: Tensor, hidden: Tensor) -> float:
    total = 0.0
    for b, (one, key) in enumerate(zip(q.tolist(), p.tolist(), strict=True)):
        own = math.exp(dot(one, key) / T)
        total -= math.log(own / (own + sum(visible(one, negatives, hidden[b]))))
    return total / len(q)


def kl_by_loops(q: Tensor, p: Tensor, negatives: Tensor, hidden: Tensor) -> float:
    """½ KL(P‖Q) + ½ KL(Q‖P), mean over the batch."""
    total = 0.0
    for b in range(len(q)):
        one, other = (visible(x[b].tolist(), negatives, hidden[b]) for x in (p, q))
        P, Q = [x / sum(one) for x in one], [x / sum(other) for x in other]
        for x, y in zip(P, Q, strict=True):
            total += (x * math.log(x / y) + y * math.log(y / x)) / 2
    return total / len(q)


@pytest.mark.parametrize(("loss", "plain"), [(info_nce, nce_by_loops), (symmetric_kl, kl_by_loops)])
def test_the_losses_are_the_equations(loss: Loss, plain: Callable[..., float]) -> None:
    q, p, negatives = rows(5, 3), rows(5, 3), rows(7, 3)
    for hidden in (shown(), some_hidden()):
        got = loss(q, p, negatives, hidden, temperature=T)
        assert float(got) == pytest.approx(plain(q, p, negatives, hidden), abs=1e-12)


@LOSSES
def test_one_row_of_hidden_is_for_all_images_and_gradients_are_of_the_loss(loss: Loss) -> None:
    q, p, negatives, hidden = rows(5, 3), rows(5, 3), rows(7, 3), some_hidden(1)
    torch.testing.assert_close(
        loss(q, p, negatives, hidden, temperature=T), loss(q, p, negatives[~hidden[0]], shown(1, 1), temperature=T)
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, p, negatives, hidden, temperature=T), q.requires_grad_())


@LOSSES
@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_without_negatives_adds_nothing(loss: Loss, temperature: float, dtype: torch.dtype) -> None:
    q, p, negatives, hidden = rows(5, 3).to(dtype).requires_grad_(), rows(5, 3).to(dtype), rows(7, 3).to(dtype), shown()
    hidden[0] = True
    got = loss(q, p, negatives, hidden, temperature=temperature)
    torch.testing.assert_close(got * 5, loss(q[1:], p[1:], negatives, hidden[1:], temperature=temperature) * 4)
    got.backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())
    assert not q.grad[0].any()
    assert bool(q.grad[1:].any())
    alone = loss(q, p, negatives, torch.ones(1, 7, dtype=torch.bool), temperature=temperature)
    assert float(alone.detach()) == 0
    assert not torch.autograd.grad(alone, q)[0].any()


def test_nce_knows_chance_and_certainty() -> None:
    axes = torch.eye(9, dtype=torch.float64)
    q, p, negatives = axes[:2], axes[2:4], axes[4:]
    assert float(info_nce(q, p, negatives, shown(1, 5), temperature=0.07)) == pytest.approx(math.log(6), abs=1e-12)
    sure = info_nce(axes[:1], axes[:1], -axes[:1].expand(5, -1), shown(1, 5), temperature=0.05)
    assert float(sure) == pytest.approx(0, abs=1e-12)


def test_the_divergence_is_that_of_torch() -> None:
    q, p, negatives = rows(5, 3), rows(5, 3), rows(7, 3)
    log_p, log_q = ((x @ negatives.T / T).log_softmax(1) for x in (p, q))
    both = [F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((log_q, log_p), (log_p, log_q))]
    torch.testing.assert_close(symmetric_kl(q, p, negatives, shown(), temperature=T), (both[0] + both[1]) / 2)


def test_the_divergence_is_symmetric_and_zero_for_equal_similarities_alone() -> None:
    q, p, negatives = rows(5, 3), rows(5, 3), rows(7, 3)
    there, back = (symmetric_kl(*pair, negatives, shown(), temperature=T) for pair in ((q, p), (p, q)))
    torch.testing.assert_close(there, back)
    assert float(there) > 1e-3
    assert float(symmetric_kl(q, q, negatives, shown(), temperature=T)) == pytest.approx(0, abs=1e-12)
    common = torch.cat([negatives, torch.ones(7, 1)], dim=1)  # the last channel moves all similarities alike
    lifted = (torch.cat([q, torch.full((5, 1), height)], dim=1) for height in (0.2, -0.7))
    assert float(symmetric_kl(*lifted, common, shown(), temperature=T)) == pytest.approx(0, abs=1e-12)


def test_the_divergence_teaches_the_query_and_not_the_key() -> None:
    q, p, negatives = rows(5, 3).requires_grad_(), rows(5, 3).requires_grad_(), rows(7, 3)
    torch.autograd.backward(symmetric_kl(q, p, negatives, shown(), temperature=T))
    assert q.grad is not None
    assert bool((q.grad.abs().sum(1) > 0).all())
    assert p.grad is None
    at_rest = p.detach().clone().requires_grad_()
    torch.autograd.backward(symmetric_kl(at_rest, p, negatives, shown(), temperature=T))
    torch.testing.assert_close(at_rest.grad, torch.zeros_like(at_rest))


def test_crosswise_compares_each_view_with_the_target_of_the_other() -> None:
    q2, q3, t2, t3 = rows(4, 6, 3)
    cosines = [(dot(q2[b].tolist(), t3[b].tolist()) + dot(q3[b].tolist(), t2[b].tolist())) / 2 for b in range(6)]
    assert float(crosswise(q2, q3, t2, t3)) == pytest.approx(-sum(cosines) / 6, abs=1e-12)
    torch.testing.assert_close(crosswise(3 * q2, 0.1 * q3, 7 * t2, t3), crosswise(q2, q3, t2, t3))
    assert float(crosswise(q2, q3, q3, q2)) == pytest.approx(-1, abs=1e-12)
    axes = torch.eye(4)
    assert float(crosswise(axes[:2], axes[:2], axes[2:], axes[2:])) == 0


def test_crosswise_stops_the_gradient_of_the_targets() -> None:
    q2, q3, t2, t3 = (x.requires_grad_() for x in rows(4, 6, 3))
    torch.autograd.backward(crosswise(q2, q3, t2, t3))
    assert t2.grad is None
    assert t3.grad is None
    assert q2.grad is not None
    assert bool(q2.grad.any())
    same = rows(6, 3).requires_grad_()  # predictions and targets at once, as with local_target=projection
    shifted = same.roll(1, 0)
    stopped = torch.autograd.grad(crosswise(same, shifted, same, shifted), same)[0]
    through = torch.autograd.grad(-F.cosine_similarity(same, shifted).mean(), same)[0]
    assert not torch.allclose(stopped, through)


def test_standardizing_is_batch_norm_without_scale_and_shift() -> None:
    x = 5 + 3 * torch.randn(6, 4)
    expected = torch.nn.BatchNorm1d(4, affine=False).train()(x)
    torch.testing.assert_close(standardized(x), expected)
    assert standardized(x[:1]).tolist() == [[0.0] * 4]


def test_the_pairwise_cosine_is_the_mean_over_different_rows() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    units = [[value / math.hypot(*row) for value in row] for row in x.tolist()]
    pairs = [dot(units[i], units[j]) for i in range(6) for j in range(6) if i != j]
    assert float(pairwise_cosine(x)) == pytest.approx(sum(pairs) / 30, abs=1e-12)
    assert float(pairwise_cosine(x[:1])) == pytest.approx(0, abs=1e-12)
    assert float(pairwise_cosine(torch.arange(1.0, 5)[:, None] * torch.ones(1, 3))) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_cosine_and_std_tell_of_the_same_collapse(noise: float) -> None:
    x = torch.ones(1, 64) + noise * torch.randn(2000, 64)
    assert float(spread(x)) == pytest.approx(math.sqrt(1 - float(pairwise_cosine(x))), rel=0.03)


@LOSSES
def test_half_precision_is_computed_in_float32(loss: Loss) -> None:
    q, p, negatives = (x.bfloat16() for x in (rows(5, 8), rows(5, 8), rows(7, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(q, p, negatives.float(), shown(), temperature=0.07)
    expected = loss(q.float(), p.float(), negatives.float(), shown(), temperature=0.07)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
