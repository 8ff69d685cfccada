"""What every method and task keeps: new files in configs/method/ and configs/task/ are tested without a new test."""

import copy

import pytest
import torch
from torch import Tensor

from medfl.methods.base import Method, Role
from medfl.methods.moments import Moments
from tests.contract.conftest import Build

pytestmark = pytest.mark.parametrize("dims", [2, 3])
IMAGES = 32


def batch(method: Method, dims: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Views, and what the method reads besides them; modalities are in [0, 1]."""
    draw = torch.Generator().manual_seed(1)
    channels = len(getattr(method.encoder, "modalities", "1"))
    count = 6 if method.segments else IMAGES
    views = [torch.randn(count, channels, *[16] * dims, generator=draw) for _ in range(method.views)]
    read = {"labels": torch.arange(count) % 2} if method.labelled else {}
    if method.findings:
        read["labels"] = torch.arange(3 * count).view(count, 3) % 3 - 1
    if channels > 1:
        views = [view.sigmoid() for view in views]
    if method.segments:
        read["masks"] = torch.randint(0, 4, (count, *[16] * dims), generator=draw, dtype=torch.uint8)
    return views, read


def losses(method: Method, dims: int, progress: float = 0.0) -> dict[str, Tensor]:
    views, read = batch(method, dims)
    got: dict[str, Tensor] = method(views, progress, **read)
    return got


def state(method: Method) -> dict[str, Tensor]:
    return copy.deepcopy(method.state_dict())


def test_every_tensor_has_one_valid_claim(build: Build, dims: int) -> None:
    method = build(dims)
    roles = method.roles()
    assert roles.keys() == method.state_dict().keys()
    assert all(isinstance(claim.role, Role) for claim in roles.values())
    by_role = [name for role in Role for name in method.tensors(role)]
    assert sorted(by_role) == sorted(roles)
    places = [tensor.data_ptr() for tensor in method.state_dict().values() if tensor.numel()]
    assert len(places) == len(set(places))  # a tensor under two names would be sent, and stepped, twice
    integers = [name for name, tensor in method.state_dict().items() if not tensor.is_floating_point()]
    shared = {Role.PARAMETER, Role.NORM_MOMENTS, Role.CODEBOOK, Role.TARGET}
    assert not [name for name in integers if roles[name].role in shared]


def test_what_the_optimizer_steps_is_what_is_averaged_or_stays(build: Build, dims: int) -> None:
    method = build(dims)
    roles = method.roles()
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert {roles[name].role for name in trained} <= {Role.PARAMETER, Role.LOCAL}
    stepped: set[int] = set()
    for phase in method.phases:
        method.enter(phase)
        stepped |= {id(parameter) for parameter in method.trainable()}
        assert all(method.rate(name) > 0 for name in trained)
    assert len(stepped) == len(trained)
    assert trained >= {name for name in method.tensors(Role.PARAMETER) if name in dict(method.named_parameters())}


def test_losses_are_finite_scalars_and_reach_the_whole_encoder(build: Build, dims: int) -> None:
    method = build(dims)
    for phase in [phase for phase in method.phases for _ in range(2)]:
        method.enter(phase)
        got = losses(method, dims)
        torch.autograd.backward(got["total"])
        torch.optim.SGD(method.trainable(), lr=1e-3).step()  # heads that start from zero let nothing through
        assert all(value.dim() == 0 and value.isfinite() for value in got.values())
        assert [name for name, value in got.items() if value.requires_grad] == ["total"]
    for name, parameter in method.encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    weights = {n: p for n, p in method.encoder.named_parameters() if p.requires_grad and p.dim() > 1}
    assert not [name for name, p in weights.items() if p.grad is not None and not bool(p.grad.abs().sum() > 0)]


def test_steps_keep_the_state_finite_and_what_is_fixed(build: Build, dims: int) -> None:
    method = build(dims)
    fixed = copy.deepcopy(method.tensors(Role.FIXED))
    optimizer = torch.optim.AdamW(method.trainable(), lr=1e-3)
    for progress in (0.0, 0.5):
        optimizer.zero_grad()
        torch.autograd.backward(losses(method, dims, progress)["total"])
        optimizer.step()
        method.after_step(progress + 0.5)
    assert all(tensor.isfinite().all() for tensor in method.state_dict().values())
    torch.testing.assert_close(method.tensors(Role.FIXED), fixed, rtol=0, atol=0)


def test_state_survives_a_round_trip(build: Build, dims: int) -> None:
    first, second = build(dims, seed=1), build(dims, seed=2)
    losses(first, dims)
    second.load_state_dict(state(first))
    torch.testing.assert_close(losses(second, dims), losses(first, dims), rtol=0, atol=0)
    torch.testing.assert_close(state(second), state(first), rtol=0, atol=0)


def test_a_seed_fixes_everything(build: Build, dims: int) -> None:
    first, second = build(dims, seed=5), build(dims, seed=5)
    torch.testing.assert_close(state(first), state(second), rtol=0, atol=0)
    torch.testing.assert_close(losses(first, dims), losses(second, dims), rtol=0, atol=0)


def test_the_refresh_pass_sees_every_norm_and_changes_nothing(build: Build, dims: int) -> None:
    method = build(dims)
    before, images = state(method), batch(method, dims)[0][0][:5]
    with Moments(method) as moments:
        features = method.observe(images, 0.0)
    torch.testing.assert_close(state(method), before, rtol=0, atol=0)
    assert not features.requires_grad
    assert features.shape == method.encoder(images).shape
    needed = {name.rpartition(".")[0] for name in method.tensors(Role.NORM_MOMENTS)}
    assert needed <= moments.sums.keys()
