"""NSLF's losses against plain references, closed forms and their own minimisers."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.methods.nslf_losses import (
    correlation_loss,
    distances,
    fusion_terms,
    over_modalities,
    reconstruction_distances,
    segmentation_terms,
    smoothness,
)
from medfl.models.matching import Matching
from medfl.models.similarity import local_correlation, ssim, ssim_by_channel
from medfl.models.warp import warp

both = pytest.mark.parametrize("dims", [2, 3])
CLASS_WEIGHTS = (0.2, 0.3, 0.25, 0.25)


def images(dims: int, *, seed: int = 0, batch: int = 2, side: int = 12) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, *[side] * dims, generator=draw, dtype=torch.float64)


def contrastive(made: Tensor, sources: Tensor, held: Tensor, weight: float) -> Tensor:
    near, far = reconstruction_distances(made, sources, held, place=0, others=weight > 0, norm="rmse")
    return near - weight * far


def smooth(dims: int, side: int, *, seed: int = 0) -> Tensor:
    """A random image (1, 1, *S) in [0, 1] without fine detail."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, *[side // 4] * dims, generator=draw)
    return F.interpolate(coarse, size=[side] * dims, mode="bilinear" if dims == 2 else "trilinear")


@both
def test_distances_are_lengths_over_the_number_of_voxels(dims: int) -> None:
    sources, made = images(dims), images(dims, seed=1)[:, :1]
    for norm, voxels in (("rmse", math.sqrt(12**dims)), ("code", 12**dims)):
        got = distances(made, sources, norm=norm)
        for row, place in itertools.product(range(2), range(3)):
            squares = [(a - b) ** 2 for a, b in zip(made[row, 0].flatten(), sources[row, place].flatten(), strict=True)]
            assert float(got[row, place]) == pytest.approx(math.sqrt(float(sum(squares))) / voxels)


@both
def test_other_modalities_count_equally_and_missing_ones_not(dims: int) -> None:
    sources, made = images(dims, batch=3), images(dims, seed=1, batch=3)[:, :1]
    held = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
    near, far = reconstruction_distances(made, sources, held, place=0, others=True, norm="rmse")
    every = distances(made, sources, norm="rmse")
    torch.testing.assert_close(near, every[:, 0])
    torch.testing.assert_close(far, torch.stack([(every[0, 1] + every[0, 2]) / 2, every[1, 2], 0 * every[2, 0]]))
    own, none = reconstruction_distances(made, sources, held, place=0, others=False, norm="rmse")
    torch.testing.assert_close(own, near)
    assert not bool(none.any())


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_exact_reconstruction_minimises_the_contrast(weight: float) -> None:
    sources, held = images(2, batch=1), torch.ones(1, 3, dtype=torch.bool)
    best = contrastive(sources[:, :1], sources, held, weight)
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        size = 10.0 ** float(torch.randint(-3, 1, (), generator=draw))
        step = torch.randn(1, 1, 12, 12, generator=draw, dtype=torch.float64) * size
        assert float(contrastive(sources[:, :1] + step, sources, held, weight)) >= float(best) - 1e-12
    away = sources[:, :1] + 0.5 * (sources[:, :1] - sources[:, 1:2])  # with squares this would pay
    assert float(contrastive(away, sources, held, weight)) >= float(best) - 1e-12


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9])
def test_a_free_reconstruction_ends_at_its_source(weight: float) -> None:
    sources = images(2, batch=1) * 0.8 + 0.1
    free = torch.zeros(1, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.1)
    for step in range(700):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.99**step
        optimizer.zero_grad()
        torch.autograd.backward(contrastive(free.sigmoid(), sources, torch.ones(1, 3, dtype=torch.bool), weight).sum())
        optimizer.step()
    assert float((free.detach().sigmoid() - sources[:, :1]).abs().mean()) < 1e-3


@both
def test_fusion_terms_are_means_over_what_each_image_has(dims: int) -> None:
    sources, fused = images(dims), images(dims, seed=1)[:, :1]
    held = torch.tensor([[True, True, True], [True, False, True]])
    sources[1, 1] = 0
    got = fusion_terms(fused, sources, held, norm="rmse")
    lengths, likeness = distances(fused, sources, norm="rmse"), torch.zeros(2, 3)
    for row, place in itertools.product(range(2), range(3)):
        likeness[row, place] = ssim(fused[row : row + 1], sources[row : row + 1, place : place + 1], span=1.0)
    for name, table in (("fidelity", lengths), ("ssim", 1 - likeness.double())):
        expected = (table[0].mean() + (table[1, 0] + table[1, 2]) / 2) / 2
        torch.testing.assert_close(got[name], expected, atol=1e-6, rtol=1e-6)
    brightest = sources.amax(1, keepdim=True)
    torch.testing.assert_close(got["intensity"], ((fused - brightest) ** 2).flatten(1).mean(1).sqrt().mean())
    assert float(fusion_terms(brightest, sources, held, norm="rmse")["intensity"]) == 0


@both
def test_ssim_is_one_for_equal_images_and_symmetric(dims: int) -> None:
    x, y = images(dims), images(dims, seed=1)
    torch.testing.assert_close(ssim(x, x, span=1.0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(ssim(x, y, span=1.0), ssim(y, x, span=1.0))
    torch.testing.assert_close(
        ssim_by_channel(x[:, :1], y, span=1.0), ssim_by_channel(x[:, :1].expand_as(y), y, span=1.0)
    )


@both
def test_local_correlation_is_the_plain_loops(dims: int) -> None:
    side = 6
    x, y = images(dims, side=side)[:1, :1], images(dims, seed=1, side=side)[:1, :2]
    got = local_correlation(x, y, window=3)
    for place in itertools.product(range(side), repeat=dims):
        box: tuple[Any, ...] = (..., *[slice(max(k - 1, 0), k + 2) for k in place])
        for channel in range(2):
            a, b = x[0, 0][box].flatten(), y[0, channel][box].flatten()
            covariance = ((a - a.mean()) * (b - b.mean())).mean()
            expected = covariance**2 / ((a.var(correction=0) + 1e-5) * (b.var(correction=0) + 1e-5))
            assert float(got[(0, channel, *place)]) == pytest.approx(float(expected), rel=1e-6)


@both
def test_local_correlation_is_one_for_linear_functions_and_zero_for_constants(dims: int) -> None:
    x = images(dims)
    for other in (x, 0.5 * x + 0.2, 1 - x):
        torch.testing.assert_close(local_correlation(x, other), torch.ones_like(x), atol=2e-3, rtol=0)
    assert not bool(local_correlation(x, torch.full_like(x, 0.3)).gt(1e-12).any())


@both
def test_correlation_counts_inside_of_the_head_only(dims: int) -> None:
    inner = images(dims, side=16)
    sources = F.pad(inner, [8] * 2 * dims)
    held = torch.ones(2, 3, dtype=torch.bool)
    same = correlation_loss(sources[:, :1], sources[:, :1].expand_as(sources), held)
    assert float(same) == pytest.approx(0, abs=5e-3)
    head: tuple[Any, ...] = (..., *[slice(8, -8)] * dims)
    found = local_correlation(sources[:, :1], sources)[head].flatten(2).mean(2)
    torch.testing.assert_close(correlation_loss(sources[:, :1], sources, held), 1 - found.mean())


@both
def test_smoothness_of_constant_linear_and_random_fields(dims: int) -> None:
    steady = torch.full((2, dims, *[6] * dims), 3.0)
    assert float(smoothness(steady)) == 0
    slope = torch.arange(6.0).view(1, 1, 6, *[1] * (dims - 1)) * 0.5
    linear = torch.zeros(2, dims, *[6] * dims)
    linear[:, 0] += slope[:, 0]
    assert float(smoothness(linear)) == pytest.approx(0.25 / dims)
    assert float(smoothness(torch.randn_like(steady))) > 0.1


@both
def test_segmentation_terms_are_the_plain_sums(dims: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, *[4] * dims, generator=draw, dtype=torch.float64)
    masks = torch.randint(0, 4, (2, *[4] * dims), generator=draw, dtype=torch.uint8)
    got = segmentation_terms(logits, masks, class_weights=CLASS_WEIGHTS)
    shares = logits.softmax(1).movedim(1, -1).flatten(0, -2).tolist()
    truth = masks.flatten().tolist()
    weight = [CLASS_WEIGHTS[label] for label in truth]
    entropy = -sum(w * math.log(row[label]) for w, row, label in zip(weight, shares, truth, strict=True)) / sum(weight)
    assert float(got["cross_entropy"]) == pytest.approx(entropy)
    hit = sum(row[label] for row, label in zip(shares, truth, strict=True) if label)
    size = sum(sum(row[1:]) for row in shares) + sum(label > 0 for label in truth)
    assert float(got["dice"]) == pytest.approx(1 - 2 * hit / (size + 0.01))


@both
def test_a_perfect_segmentation_costs_nothing(dims: int) -> None:
    masks = torch.randint(0, 4, (2, *[6] * dims))
    perfect = F.one_hot(masks, 4).movedim(-1, 1) * 100.0
    terms = segmentation_terms(perfect, masks, class_weights=CLASS_WEIGHTS)
    assert max(float(term) for term in terms.values()) < 1e-3


def test_a_mean_over_modalities_is_of_the_mean_of_each_image() -> None:
    values, held = torch.tensor([[1.0, 3.0], [5.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    assert float(over_modalities(values, held)) == pytest.approx((2 + 5) / 2)


def test_matching_finds_a_shift_of_three_voxels() -> None:
    side, shift = 48, 3.0
    image = smooth(2, side)
    field = torch.zeros(1, 2, side, side)
    field[:, 0] = shift
    source = warp(image, field)
    torch.manual_seed(0)
    matching = Matching(["t1"], 4, spatial_dims=2)
    rows, deep, local = torch.arange(1), torch.rand(1, 32, 6, 6), torch.cat([source, image, source, image], dim=1)
    optimizer, losses = torch.optim.Adam(matching.parameters(), lr=0.01), []
    for _ in range(150):
        match = matching({"t1": (rows, deep)}, {"t1": (rows, local)}, image=image, fused=(deep, local.flip(1)))
        loss = correlation_loss(match.warped, source, torch.ones(1, 1, dtype=torch.bool)) + smoothness(match.local)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    inner = match.field.detach()[:, :, 8:-8, 8:-8]
    assert float((inner - field[:, :, 8:-8, 8:-8]).abs().mean()) < 0.5


def test_matching_leaves_what_lies_right() -> None:
    image = smooth(3, 16)
    torch.manual_seed(0)
    matching = Matching(["t1"], 2, spatial_dims=3)
    rows, deep, local = torch.arange(1), torch.rand(1, 16, 2, 2, 2), torch.cat([image, image], dim=1)
    optimizer = torch.optim.Adam(matching.parameters(), lr=0.005)
    for _ in range(25):
        match = matching({"t1": (rows, deep)}, {"t1": (rows, local)}, image=image, fused=(deep, local))
        loss = correlation_loss(match.warped, 1 - 0.5 * image, torch.ones(1, 1, dtype=torch.bool))
        optimizer.zero_grad()
        torch.autograd.backward(loss + smoothness(match.local))
        optimizer.step()
    assert float(torch.linalg.vector_norm(match.field.detach(), dim=1).mean()) < 1
