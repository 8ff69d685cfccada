"""BYOL: the loss, the schedule of its target network, and what that network holds."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from medfl.errors import ConfigError
from medfl.methods.base import Role
from medfl.methods.byol import BYOL, follow, momentum_at, regression, spread
from medfl.training import Plan
from tests.test_encoders import encoder
from tests.test_methods import Unreadable


def byol(**changes: Any) -> BYOL:
    """BYOL on a thin encoder, unless changed."""
    arguments = {"encoder": encoder(), "hidden": 16, "width": 8, "norm": "batch", "momentum": 0.996}
    return BYOL(**(arguments | changes)).train()


def pair(images: int = 6) -> list[Tensor]:
    return [torch.randn(images, 1, 16, 16) for _ in range(2)]


def loss_of(a: list[float], b: list[float]) -> float:
    """l(a, b) = 2 - 2 <a / |a|, b / |b|>, DiSSECT eq. (7)."""
    return 2 - 2 * sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_the_momentum_goes_from_its_start_to_exactly_one() -> None:
    assert momentum_at(0.0, start=0.996) == pytest.approx(0.996, abs=1e-15)
    assert momentum_at(0.5, start=0.996) == pytest.approx(0.998, abs=1e-15)
    assert momentum_at(1.0, start=0.996) == 1.0
    assert [momentum_at(p, start=0.0) for p in (0.0, 0.5, 1.0)] == [0.0, 0.0, 0.0]


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_the_momentum_never_falls_and_stays_in_its_range(a: float, b: float, start: float) -> None:
    low, high = (momentum_at(p, start=start) for p in sorted((a, b)))
    assert start - 1e-12 <= low <= high <= 1


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_every_site_ends_at_momentum_one_whatever_its_steps(steps: int) -> None:
    last = Plan(seed=0, site="A", round=7, rounds=7, steps=steps, batch_size=4, warmup=0.1)
    assert momentum_at(last.progress(steps), start=0.9) == 1.0


def test_the_regression_is_the_papers() -> None:
    p, z = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = sum(loss_of(a, b) for a, b in zip(p.tolist(), z.tolist(), strict=True)) / 5
    assert float(regression(p, z)) == pytest.approx(expected, abs=1e-12)
    assert float(regression(p, p)) == pytest.approx(0, abs=1e-12)
    assert float(regression(p, -p)) == pytest.approx(4, abs=1e-12)
    assert float(regression(3 * p, 0.2 * z)) == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(regression, (p.requires_grad_(), z.requires_grad_()))


def test_each_view_predicts_the_target_of_the_other_and_no_label_is_read() -> None:
    method, views = byol(), pair()
    got = method(views, 0.0, Unreadable())
    p, z = method.predictions(torch.cat(views)).tolist(), method.target_branch(torch.cat(views))[0].tolist()
    crossed = [loss_of(p[i], z[(i + 6) % 12]) for i in range(12)]
    assert float(got["continuous"]) == pytest.approx(sum(crossed) / 12, rel=1e-5)
    assert got.keys() == {"total", "continuous", "std"}
    assert [name for name, value in got.items() if value.requires_grad] == ["total"]


def test_the_order_of_the_views_does_not_matter() -> None:
    method, views = byol(), pair()
    torch.testing.assert_close(method(views, 0.0), method(views[::-1], 0.0))


def test_gradients_reach_all_of_the_online_network_and_none_of_the_target() -> None:
    method = byol()
    torch.autograd.backward(method(pair(), 0.0)["total"])
    for name, own in method.named_parameters():
        if name.startswith("target_"):
            assert own.grad is None, name
            assert not own.requires_grad, name
        else:
            assert own.grad is not None, name
            assert own.dim() == 1 or bool(own.grad.any()), name


def test_the_target_is_a_copy_under_parallel_names_without_norm_statistics() -> None:
    method = byol()
    state = method.state_dict()
    for target, online in method.targets.items():
        names = [name for name in state if name.startswith(f"{target}.")]
        own = [name for name, _ in method.get_submodule(online).named_parameters(prefix=online)]
        assert [name.replace(target, online, 1) for name in names] == own
        for name in names:
            assert torch.equal(state[name], state[name.replace(target, online, 1)])
            assert method.claim_of(name).role is Role.TARGET
    counted = {name for name, claim in method.roles().items() if claim.role in (Role.NORM_MOMENTS, Role.LOCAL)}
    assert {name.split(".")[0] for name in counted} == {"encoder", "projector", "predictor"}
    assert set(method.tensors(Role.PARAMETER)) == {name for name, p in method.named_parameters() if p.requires_grad}


def test_the_target_normalises_by_the_batch_in_evaluation_too() -> None:
    method, images = byol(), torch.randn(8, 1, 16, 16)
    norms = [m for m in method.target_encoder.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert all(m.running_mean is None and not m.track_running_stats for m in norms)
    training = method.target_branch(images)[0]
    torch.testing.assert_close(method.eval().target_branch(images)[0], training, rtol=0, atol=0)


@pytest.mark.parametrize(("progress", "start"), [(0.0, 0.996), (0.3, 0.9), (0.7, 0.0)])
def test_a_step_moves_the_target_by_the_formula(progress: float, start: float) -> None:
    method = byol(momentum=start).double()
    with torch.no_grad():
        for parameter in method.trainable():
            parameter.add_(torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method.after_step(progress)
    m = 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2 if start else 0.0
    for name, tensor in method.state_dict().items():
        expected = before[name]
        if name.startswith("target_"):
            expected = m * expected + (1 - m) * before[name.removeprefix("target_")]
        torch.testing.assert_close(tensor, expected, msg=name)


def test_the_target_rests_at_the_end_of_the_schedule() -> None:
    method = byol()
    with torch.no_grad():
        for parameter in method.trainable():
            parameter.add_(1.0)
    before = {name: tensor.clone() for name, tensor in method.tensors(Role.TARGET).items()}
    method.after_step(1.0)
    torch.testing.assert_close(method.tensors(Role.TARGET), before, rtol=0, atol=0)


def test_the_average_of_two_sites_targets_is_the_target_of_their_average() -> None:
    def line() -> torch.nn.Linear:
        return torch.nn.Linear(3, 2, dtype=torch.float64)

    def load(module: torch.nn.Linear, a: torch.nn.Linear, b: torch.nn.Linear) -> None:
        module.load_state_dict({name: (t + b.state_dict()[name]) / 2 for name, t in a.state_dict().items()})

    targets, average = (line(), line()), line()
    load(average, *targets)
    for step in range(4):
        sites, middle = (line(), line()), line()
        load(middle, *sites)
        for target, online in zip((*targets, average), (*sites, middle), strict=True):
            follow(target, online, momentum=momentum_at(step / 4, start=0.8))
    expected = line()
    load(expected, *targets)
    torch.testing.assert_close(average.state_dict(), expected.state_dict())


def test_spread_is_one_for_isotropic_rows_and_zero_for_one_point() -> None:
    assert float(spread(torch.randn(4000, 16))) == pytest.approx(1, abs=0.02)
    assert float(spread(torch.arange(1.0, 6)[:, None] * torch.randn(1, 16))) == pytest.approx(0, abs=1e-5)
    rows = [[3.0, 4.0], [0.0, -2.0]]  # at unit length (0.6, 0.8) and (0, -1): deviations 0.3 and 0.9
    assert float(spread(torch.tensor(rows))) == pytest.approx(math.sqrt(2) * 0.6)


@pytest.mark.parametrize(("std", "remarked", "alarmed"), [(0.3, False, False), (0.19, True, False), (0.03, True, True)])
def test_collapse_is_told(std: float, remarked: bool, alarmed: bool) -> None:
    method = byol()
    told = method.remarks({"std": std})
    assert len(told) == remarked
    assert not remarked or f"std {std:.2f}, where 1 is isotropic" in told[0]
    assert ("one point" in method.alarm({"std": std})) == alarmed


def test_half_precision_training_gives_finite_float32_losses() -> None:
    method = byol()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method(pair(), 0.0)
    torch.autograd.backward(got["total"])
    assert all(value.isfinite() and value.dtype == torch.float32 for value in got.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.trainable())


@pytest.mark.parametrize("start", [-0.1, 1.5])
def test_a_momentum_outside_of_its_range_is_refused(start: float) -> None:
    with pytest.raises(ConfigError, match=rf"method.momentum: got {start}, need a number in \[0, 1\]"):
        byol(momentum=start)
