"""The base of all methods, batch-norm moments, and SimCLR."""

import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medfl.errors import ConfigError
from medfl.methods.base import Claim, Method, Role, balanced_probabilities
from medfl.methods.moments import Moments, pool, sums_of
from medfl.methods.simclr import SimCLR, nt_xent
from tests import references
from tests.test_encoders import encoder


class Sketch(Method):
    """Two towers, one of them owned by a few sites, a target and a queue."""

    encoder: nn.Sequential
    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.encoder2 = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.target = nn.BatchNorm1d(3)
        self.register_buffer("queue", torch.zeros(3))
        self.claims = {
            "encoder": Claim(Role.PARAMETER),
            "encoder.1": Claim(Role.PARAMETER, "modality:flair"),
            "encoder2": Claim(Role.LOCAL),
            "target": Claim(Role.TARGET),
            "queue": Claim(Role.QUEUE),
        }

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"total": sum(self.target(self.encoder2(self.encoder(view))).sum() for view in views)}


def test_the_longest_whole_component_claims_a_tensor() -> None:
    roles = Sketch().roles()
    assert roles["encoder.0.weight"] == Claim(Role.PARAMETER)
    assert roles["encoder.1.weight"] == Claim(Role.PARAMETER, "modality:flair")
    assert roles["encoder2.0.weight"] == Claim(Role.LOCAL)  # not claimed by "encoder"
    assert roles["queue"] == Claim(Role.QUEUE)


def test_batch_norm_buffers_get_their_roles_by_themselves() -> None:
    roles = Sketch().roles()
    assert roles["encoder.1.running_var"] == Claim(Role.NORM_MOMENTS, "modality:flair")
    assert roles["encoder.1.num_batches_tracked"].role is Role.LOCAL
    assert roles["encoder2.1.running_mean"].role is Role.LOCAL  # a private tower keeps its moments
    assert roles["target.running_mean"].role is Role.TARGET
    assert roles["target.num_batches_tracked"].role is Role.LOCAL


def test_an_unclaimed_tensor_is_named() -> None:
    method = Sketch()
    method.encoder3 = nn.Linear(2, 2)  # no component of it is "encoder"
    with pytest.raises(ValueError, match=r"Sketch: tensor 'encoder3\.weight' is claimed by no prefix"):
        method.roles()


def test_tensors_of_a_role_share_memory_with_the_method() -> None:
    method = Sketch()
    method.tensors(Role.QUEUE)["queue"].fill_(7.0)
    assert method.queue.tolist() == [7.0, 7.0, 7.0]


def test_a_frozen_module_stays_as_it_is() -> None:
    method = Sketch()
    method.freeze("encoder.1")
    method.train()
    assert {name for name, claim in method.roles().items() if claim.role is Role.FIXED} == {
        f"encoder.1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert method.encoder.training
    assert not method.encoder[1].training
    assert not any(method.encoder[1].weight is parameter for parameter in method.trainable())


def test_the_default_observation_reaches_every_norm_and_changes_nothing() -> None:
    method, images = Sketch().train(), torch.randn(5, 3)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with Moments(method) as moments:
        features = method.observe(images, 0.5)
    assert features.shape == (5, 3)
    assert not features.requires_grad
    assert moments.sums.keys() == {"encoder.1", "encoder2.1", "target"}
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_moments_are_of_the_layers_inputs_and_leave_the_layers_as_before() -> None:
    layer = nn.BatchNorm2d(3).train()
    first, second = torch.randn(4, 3, 5, 6), 3 + torch.randn(2, 3, 7, 2)
    normal = nn.BatchNorm2d(3).train()(first)
    with Moments(layer) as moments:
        torch.testing.assert_close(layer(first), normal, rtol=0, atol=0)  # still normalised by its batch
        layer(second)
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in (first, second)], dim=1).double()
    n, total, square = moments.sums[""]
    assert n == values.shape[1]
    torch.testing.assert_close(total, values.sum(1))
    torch.testing.assert_close(square, values.square().sum(1))
    layer(first)  # tracks again
    assert layer.num_batches_tracked is not None
    assert int(layer.num_batches_tracked) == 1
    assert moments.sums[""].n == n


def test_moments_end_with_an_error_inside() -> None:
    layer = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="expected 2D or 3D input"), Moments(layer):
        layer(torch.zeros(1, 2, 3, 4))
    assert layer.track_running_stats
    assert not layer._forward_pre_hooks


def test_two_constant_sites_pool_to_the_variance_between_them() -> None:
    sites = [torch.full((8, 2, 3, 3), value) for value in (-1.0, 3.0)]
    mean, variance = pool([sums_of(site) for site in sites])
    torch.testing.assert_close(mean, torch.full((2,), 1.0, dtype=torch.float64))
    torch.testing.assert_close(variance, torch.full((2,), 4.0, dtype=torch.float64))  # an average would give 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.randoms(use_true_random=False))
def test_pooled_moments_are_those_of_all_values_in_any_split_and_order(sizes: list[int], random: Random) -> None:
    values = 5 + torch.randn(sum(sizes), 3, 4)
    parts = [sums_of(part) if len(part) else (0, torch.zeros(3), torch.zeros(3)) for part in torch.split(values, sizes)]
    random.shuffle(parts)
    mean, variance = pool(parts)
    flat = values.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, flat.mean(1))
    torch.testing.assert_close(variance, flat.var(1, correction=0), rtol=1e-6, atol=1e-9)


def test_half_precision_activations_are_summed_in_double() -> None:
    values = torch.full((100, 1, 50), 100.0) + torch.randn(100, 1, 50)
    _, variance = pool([sums_of(values.bfloat16())])
    torch.testing.assert_close(variance[0], values.bfloat16().double().var(correction=0))


def test_pooling_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="pool: got 0 parts without a value"):
        pool([])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_balanced_probabilities_are_the_papers(labels: list[int]) -> None:
    got = balanced_probabilities(torch.tensor(labels))
    torch.testing.assert_close(got, torch.tensor(references.balanced_probabilities(labels), dtype=torch.float64))
    for label in set(labels):  # every class present has the same mass; absent ones divide nothing by zero
        assert float(got[torch.tensor(labels) == label].sum()) == pytest.approx(1 / len(set(labels)), abs=1e-12)


def test_unknown_labels_are_never_drawn() -> None:
    got = balanced_probabilities(torch.tensor([-1, 2, 2, 0]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.25, 0.25, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="none of 2 labels is known"):
        balanced_probabilities(torch.tensor([-1, -1]))


@pytest.mark.parametrize(("images", "width"), [(2, 1), (2, 5), (7, 16)])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_nt_xent_is_the_papers(images: int, width: int, temperature: float) -> None:
    z = torch.randn(2 * images, width, dtype=torch.float64)
    expected = references.nt_xent(z, temperature=temperature)
    torch.testing.assert_close(nt_xent(z, temperature=temperature), torch.tensor(expected, dtype=torch.float64))


def test_nt_xent_of_constant_embeddings_is_that_of_a_guess() -> None:
    assert float(nt_xent(torch.ones(10, 4), temperature=0.2)) == pytest.approx(math.log(9))


def test_nt_xent_ignores_the_length_of_each_embedding() -> None:
    z = torch.randn(8, 4, dtype=torch.float64)
    scaled = z * torch.rand(8, 1, dtype=torch.float64).add(0.1)
    torch.testing.assert_close(nt_xent(scaled, temperature=0.1), nt_xent(z, temperature=0.1))


def test_nt_xent_has_the_gradient_of_finite_differences() -> None:
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, temperature=0.3), z)


def test_nt_xent_is_finite_in_half_precision_and_at_low_temperature() -> None:
    z = torch.randn(16, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z, temperature=1e-3)
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    torch.testing.assert_close(loss.detach(), nt_xent(z.detach().float(), temperature=1e-3), rtol=0, atol=0)
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("rows", [2, 5])
def test_nt_xent_needs_pairs_of_two_images(rows: int) -> None:
    with pytest.raises(ValueError, match=f"nt_xent: got {rows} embeddings"):
        nt_xent(torch.randn(rows, 3), temperature=0.2)


class Unreadable:
    """Labels that must not be looked at."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"labels were read: {name}")


def test_simclr_is_nt_xent_of_one_joint_forward_and_reads_no_label() -> None:
    method = SimCLR(encoder=encoder(), hidden=None, width=4, norm="batch", temperature=0.5).eval()
    views = [torch.randn(3, 1, 16, 16) for _ in range(2)]
    losses = method(views, 0.0, Unreadable())
    z = torch.cat([method.projector(method.encoder(view)) for view in views]).detach()
    assert float(losses["nt_xent"]) == pytest.approx(references.nt_xent(z, temperature=0.5), rel=1e-5)
    assert losses["total"].requires_grad
    assert not losses["nt_xent"].requires_grad


def test_simclr_refuses_unequal_views_and_temperatures_without_meaning() -> None:
    method = SimCLR(encoder=encoder(), hidden=5, width=4, norm="layer", temperature=0.5)
    with pytest.raises(ValueError, match="need two of equal shape"):
        method([torch.zeros(2, 1, 16, 16), torch.zeros(3, 1, 16, 16)], 0.0)
    with pytest.raises(ConfigError, match=r"method.temperature: got 0\.0, need a number above 0"):
        SimCLR(encoder=encoder(), hidden=None, width=4, norm="batch", temperature=0.0)
