"""LARS: its step by hand, by plain loops over many steps, and what it leaves to plain SGD."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medfl.checkpoint import load_optimizer, optimizer_tensors
from medfl.files import packed, unpacked, write_bytes
from medfl.optimizers import lars

SWITCHES = {"momentum": 0.9, "weight_decay": 0.1, "trust": 0.01, "eps": 0.5}


def parameter(*values: float | list[float]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(list(values), dtype=torch.float64))


def test_one_step_by_hand() -> None:
    weight, bias = parameter([3.0, 4.0]), parameter(2.0)
    weight.grad, bias.grad = torch.tensor([[0.6, 0.8]]).double(), torch.tensor([3.0]).double()
    lars([weight, bias], lr=0.5, **SWITCHES).step()
    # |w| = 5, |g| = 1: λ = 0.01 · 5 / (1 + 0.1 · 5 + 0.5) = 0.025; v = 0.5 · 0.025 · (g + 0.1 w)
    torch.testing.assert_close(weight.detach(), torch.tensor([[3 - 0.01125, 4 - 0.015]]).double())
    torch.testing.assert_close(bias.detach(), torch.tensor([2 - 0.5 * 3]).double())  # no decay, no λ


def test_many_steps_are_those_of_algorithm_1() -> None:
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    expected, velocity = weight.detach().flatten().tolist(), [0.0] * 6
    optimizer = lars([weight], lr=0.0, **SWITCHES)
    for lr in (0.1, 0.5, 0.2, 0.0, 0.3):  # the rate of a step stays in the velocity
        weight.grad = torch.randn(3, 2, dtype=torch.float64)
        slope = weight.grad.flatten().tolist()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        size, steep = math.hypot(*expected), math.hypot(*slope)
        trust = SWITCHES["trust"] * size / (steep + SWITCHES["weight_decay"] * size + SWITCHES["eps"])
        for i, (w, g) in enumerate(zip(expected, slope, strict=True)):
            velocity[i] = 0.9 * velocity[i] + lr * trust * (g + SWITCHES["weight_decay"] * w)
            expected[i] = w - velocity[i]
        torch.testing.assert_close(weight.detach().flatten(), torch.tensor(expected, dtype=torch.float64))


def test_biases_and_norms_take_plain_sgd_without_decay() -> None:
    ours, theirs = parameter(1.0, -2.0), parameter(1.0, -2.0)
    optimizers = [lars([ours], lr=0.1, **SWITCHES), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)]
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(2, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_the_length_of_a_gradient_does_not_matter_to_a_weight_matrix(scale: float) -> None:
    start, slope = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    moved = []
    for factor in (1.0, scale):
        weight = nn.Parameter(start.clone())
        weight.grad = factor * slope
        lars([weight], lr=0.2, momentum=0.9, weight_decay=0.0, trust=0.1, eps=0.0).step()
        moved.append(weight.detach() - start)
    torch.testing.assert_close(moved[0], moved[1])
    assert float(moved[0].norm()) == pytest.approx(0.2 * 0.1 * float(start.norm()))


def test_a_matrix_of_zeros_can_move_and_one_without_gradient_stays() -> None:
    zeros, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zeros.grad = torch.ones(2, 2)
    lars([zeros, still], lr=0.5, **SWITCHES).step()
    torch.testing.assert_close(zeros.detach(), torch.full((2, 2), -0.5))
    torch.testing.assert_close(still.detach(), torch.ones(2, 2), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_optimizer_goes_on_with_the_state_of_a_file_whatever_the_strides(
    kind: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    """Fused steps go through memory: state that came back contiguous would move the wrong weights."""
    more: dict[str, object] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    draw = torch.Generator().manual_seed(0)
    slopes = torch.randn(4, 4, 3, 3, 3, generator=draw).unbind()
    found = []
    for kept in (False, True):
        weight = nn.Parameter(torch.ones(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
        optimizer = kind([weight], lr=0.1, fused=True, **more)
        for place, slope in enumerate(slopes):
            if kept and place == 2:
                write_bytes(tmp_path / "state", packed(optimizer_tensors(optimizer)))
                optimizer = kind([weight], lr=0.1, fused=True, **more)
                load_optimizer(optimizer, unpacked(tmp_path / "state"))
            weight.grad = torch.empty_like(weight).copy_(slope)
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_its_state_survives_a_file() -> None:
    def steps(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, slopes: list[Tensor]) -> None:
        for slope in slopes:
            for one in parameters:
                one.grad = slope[: one.numel()].view_as(one).clone()
            optimizer.step()

    slopes = list(torch.randn(4, 6))
    whole = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]
    first = lars(whole, lr=0.1, **SWITCHES)
    steps(whole, first, slopes[:2])
    resumed = [nn.Parameter(one.detach().clone()) for one in whole]
    second = lars(resumed, lr=0.1, **SWITCHES)
    load_optimizer(second, optimizer_tensors(first))
    steps(whole, first, slopes[2:])
    steps(resumed, second, slopes[2:])
    for one, other in zip(whole, resumed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
