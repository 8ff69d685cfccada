"""MedCSS: what each switch does, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from medfl.errors import ConfigError
from medfl.methods.base import Method, Role
from medfl.methods.medcss import Alignment, CodingRate, MedCSS
from medfl.methods.medcss_losses import coding_rate_bound
from medfl.methods.simclr import SimCLR
from tests import references
from tests.test_encoders import encoder
from tests.test_methods import Unreadable


def medcss(align: dict[str, Any] | None = None, crr: dict[str, Any] | None = None, **changes: Any) -> MedCSS:
    """The self-supervised form on a thin encoder, unless changed."""
    aligned: dict[str, Any] = {
        "weight": 1.0, "estimator": "sample", "temperature": 1.0, "heads": "trainable", "stopgrad": "none",
        "cross_view": False, "hidden": 16, "width": 8,
    }  # fmt: skip
    rates: dict[str, Any] = {
        "weight": 0.1, "direction": "text", "features": "pooled", "normalize": True, "scale": "none",
        "detach": "none", "alpha": None,
    }  # fmt: skip
    arguments: dict[str, Any] = {
        "encoder": encoder(), "hidden": None, "width": 8, "norm": "batch", "temperature": 0.2,
        "objective": "contrastive", "classes": None, "freeze": "none", "force": False,
        "align": Alignment(**(aligned | (align or {}))), "crr": CodingRate(**(rates | (crr or {}))),
    }  # fmt: skip
    return MedCSS(**(arguments | changes))


def pair(images: int = 16) -> list[Tensor]:
    return [torch.randn(images, 1, 16, 16) for _ in range(2)]


def train(method: Method, steps: int) -> list[float]:
    """Losses of a few optimizer steps on fixed views."""
    views = torch.randn(steps, 2, 16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(method.trainable(), lr=1e-3), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = method(list(views[step]), 0.0)["total"]
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def reached(method: MedCSS, total: Tensor) -> set[str]:
    """Children of the method and of its encoder where `total` has a gradient that is not zero."""
    method.zero_grad()
    torch.autograd.backward(total)
    names = {n for n, p in method.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    return {name.split(".")[1] if name.startswith("encoder.") else name.split(".")[0] for name in names}


def test_without_its_terms_it_is_simclr_bit_for_bit() -> None:
    def simclr() -> SimCLR:
        return SimCLR(encoder=encoder(), hidden=None, width=8, norm="batch", temperature=0.2)

    runs = []
    for build in (simclr, lambda: medcss({"weight": 0.0}, {"weight": 0.0})):
        torch.manual_seed(3)
        method = build()
        runs.append((train(method, 3), method.state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_its_heads_leave_the_contrastive_part_as_drawn() -> None:
    torch.manual_seed(3)
    plain = medcss({"weight": 0.0}, {"weight": 0.0}).state_dict()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    full = medcss().state_dict()
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close({name: full[name] for name in plain}, plain, rtol=0, atol=0)
    assert {name.split(".")[0] for name in full.keys() - plain.keys()} == {"align3", "align4"}


def test_the_total_is_the_weighted_sum_of_its_terms() -> None:
    got = medcss({"weight": 0.7}, {"weight": 0.3})(pair(), 0.0, Unreadable())
    torch.testing.assert_close(got["total"], got["nt_xent"] + 0.7 * got["align"] + 0.3 * got["crr"])
    assert got.keys() == {
        "total", "nt_xent", "align", "crr", "js", "entropy_marginal", "entropy_mean", "rate3", "rate4", "crr_active",
        "crr_off",
    }  # fmt: skip
    assert [name for name, value in got.items() if value.requires_grad] == ["total"]
    assert all(value.dim() == 0 for value in got.values())


@pytest.mark.parametrize(
    ("weight", "direction", "active"), [(0.1, "text", 1.0), (0.1, "equation", 0.0), (0.0, "text", 1.0)]
)
def test_whether_the_hinge_is_active_is_told(weight: float, direction: str, active: float) -> None:
    method = medcss({"weight": 0.0}, {"weight": weight, "direction": direction})
    got = method(pair(), 0.0)
    assert got["rate4"] > got["rate3"]  # from initialisation on: the printed equation has nothing to do
    assert float(got["crr_active"]) == active


@pytest.mark.parametrize("detach", ["none", "f3"])
def test_the_hinge_pulls_both_stages_unless_one_is_detached(detach: str) -> None:
    method = medcss({"weight": 0.0}, {"weight": 1.0, "detach": detach, "alpha": 16.0})
    f4 = torch.randn(32, 64, requires_grad=True)
    f3 = (torch.randn(32, 1) + 0.1 * torch.randn(32, 32)).requires_grad_()
    torch.autograd.backward(method._crr(f3, f4)[0])
    assert f4.grad is not None
    assert bool(f4.grad.abs().sum() > 0)
    assert (f3.grad is not None) == (detach == "none")
    whole = medcss({"weight": 0.0}, {"weight": 1.0, "detach": detach}, objective="supervised", classes=2)
    got = whole(pair(32), 0.0, torch.arange(32) % 2)
    assert reached(whole, got["total"] - got["supervised"]) >= {"layer3", "layer4"}


@pytest.mark.parametrize(
    ("align", "heads"),
    [
        ({}, {"align3", "align4"}),
        ({"stopgrad": "h3"}, {"align4"}),
        ({"heads": "frozen_random"}, set()),
        ({"estimator": "marginal", "cross_view": True}, {"align3", "align4"}),
        ({"estimator": "histogram"}, {"align3", "align4"}),
        ({"weight": 0.0}, set()),
    ],
)
def test_gradients_reach_the_alignment_heads_as_switched(align: dict[str, Any], heads: set[str]) -> None:
    method = medcss(align, {"weight": 0.0})
    total = method(pair(32), 0.0)["total"]
    assert reached(method, total) == heads | {"stem", "layer1", "layer2", "layer3", "layer4", "projector"}


def test_frozen_random_heads_push_the_encoder_and_are_never_sent() -> None:
    method = medcss({"heads": "frozen_random"}, {"weight": 0.0, "direction": "equation"}, objective="none", force=True)
    before = {name: tensor.clone() for name, tensor in method.tensors(Role.FIXED).items()}
    assert {name.split(".")[0] for name in before} == {"align3", "align4"}
    train(method, 2)
    torch.testing.assert_close(method.tensors(Role.FIXED), before, rtol=0, atol=0)


def test_cross_view_compares_stages_of_different_views() -> None:
    method = medcss({"cross_view": True})
    h3, h4 = torch.randn(2, 4, 8)
    expected = (h3, torch.cat([h4[2:], h4[:2]]))
    crossed = references.alignment(*expected, estimator="sample", temperature=1.0)
    assert float(method._align(h3, h4)[0]) == pytest.approx(crossed, rel=1e-5)


def test_projected_rates_are_those_of_the_heads_and_scaled_ones_lie_below_one() -> None:
    method = medcss({"weight": 0.0}, {"features": "projected", "scale": "max"}).eval()
    views = pair()
    got = method(views, 0.0)
    z3 = method.encoder.maps(torch.cat(views))[2].mean((2, 3))
    rows = torch.nn.functional.normalize(method.align3(z3), dim=1).detach()
    alpha = 8 / 0.5  # width of the shared space
    expected = references.coding_rate(rows, alpha=alpha) / coding_rate_bound(32, 8, alpha=alpha)
    assert float(got["rate3"]) == pytest.approx(expected, rel=1e-4)
    assert 0 < float(got["rate4"]) <= 1


@pytest.mark.parametrize("normalize", [True, False])
def test_rates_use_the_pooled_features_and_the_default_alpha(normalize: bool) -> None:
    method, views = medcss(crr={"normalize": normalize}).eval(), pair()
    features = method.encoder(torch.cat(views)).detach()
    rows = torch.nn.functional.normalize(features, dim=1) if normalize else features
    expected = references.coding_rate(rows, alpha=32 / 0.5)  # min(d3, d4) of the thin encoder is 32
    assert float(method(views, 0.0)["rate4"]) == pytest.approx(expected, rel=1e-4)


def test_a_frozen_prefix_does_not_move() -> None:
    method = medcss(freeze="stem+layer1+layer2").train()
    fixed = {name: tensor.clone() for name, tensor in method.tensors(Role.FIXED).items()}
    free = {name: tensor.clone() for name, tensor in method.state_dict().items() if name not in fixed}
    assert {name.split(".")[1] for name in fixed} == {"stem", "layer1", "layer2"}
    assert any("running_var" in name for name in fixed)
    train(method, 3)
    torch.testing.assert_close(method.tensors(Role.FIXED), fixed, rtol=0, atol=0)
    stepped = {id(parameter) for parameter in method.trainable()}
    assert not any(id(p) in stepped for n, p in method.named_parameters() if n in fixed)
    assert not any(torch.equal(method.state_dict()[name], tensor) for name, tensor in free.items())


def test_the_supervised_form_uses_the_first_view_and_labels_and_classifies() -> None:
    method = medcss(objective="supervised", classes=3).eval()
    images, labels = torch.randn(32, 1, 16, 16), torch.arange(32) % 3
    got = method([images, Unreadable()], 0.0, labels)
    logits = method.classify(images)
    assert logits.shape == (32, 3)
    torch.testing.assert_close(got["supervised"], torch.nn.functional.cross_entropy(logits, labels).detach())
    assert "projector" not in dict(method.named_children())
    with pytest.raises(ValueError, match="objective=supervised got no labels"):
        method([images], 0.0)


def test_the_self_supervised_form_has_no_classifier() -> None:
    assert not hasattr(medcss(), "classifier")
    with pytest.raises(ValueError, match="objective=contrastive has no classifier"):
        medcss().classify(torch.zeros(2, 1, 16, 16))


def test_half_precision_training_gives_finite_float32_losses() -> None:
    method = medcss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method(pair(), 0.0)
    torch.autograd.backward(got["total"])
    assert got["total"].dtype == torch.float32
    assert all(value.isfinite() for value in got.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.trainable())


def test_the_histogram_estimator_refuses_small_batches() -> None:
    with pytest.raises(ConfigError, match="histogram: got 62 feature rows in a batch, need at least 64"):
        medcss({"estimator": "histogram"}, {"weight": 0.0})(pair(31), 0.0)


@pytest.mark.parametrize("images", [15, 16])
def test_the_coding_rate_is_off_in_small_batches_and_says_so(images: int) -> None:
    method = medcss({"weight": 0.0}, {"weight": 5.0, "direction": "text"})
    losses = method(pair(images), 0.0)
    small = 2 * images < 32
    assert float(losses["crr_off"]) == float(small)
    assert (losses["total"] == losses["nt_xent"]).item() == small  # else the hinge adds to it
    told = method.remarks({name: float(value.detach()) for name, value in losses.items()})
    assert bool(told) == small
    assert not small or "off for 100% of the weight: it needs 32 feature rows" in told[0]


@pytest.mark.parametrize(
    ("align", "crr", "changes", "message"),
    [
        ({}, {"direction": "equation"}, {"objective": "none"}, "alone are no pretraining method"),
        ({}, {}, {"objective": "none", "force": True}, "direction=text with objective=none: nothing spreads"),
        ({"weight": 0.0}, {"weight": 0.0}, {"objective": "none", "force": True}, "and a weight above 0"),
        ({}, {}, {"objective": "labels"}, "method.objective: got 'labels', need one of contrastive, supervised"),
        ({}, {}, {"objective": "supervised"}, "method.classes: got None, need at least 2"),
        ({"cross_view": True}, {}, {"objective": "supervised", "classes": 2}, "cross_view=true needs two views"),
        ({}, {}, {"freeze": "stem"}, "method.freeze: got 'stem', need one of none, stem\\+layer1\\+layer2"),
        ({}, {}, {"temperature": -1.0}, "method.temperature: got -1.0"),
        ({"estimator": "exact"}, {}, {}, "method.align.estimator: got 'exact'"),
        ({"heads": "none"}, {}, {}, "method.align.heads: got 'none'"),
        ({"stopgrad": "h4"}, {}, {}, "method.align.stopgrad: got 'h4'"),
        ({"weight": -1.0}, {}, {}, "method.align.weight: got -1.0, need 0 or more"),
        ({}, {"direction": "both"}, {}, "method.crr.direction: got 'both'"),
        ({}, {"features": "maps"}, {}, "method.crr.features: got 'maps'"),
        ({}, {"alpha": 0.0}, {}, "method.crr.alpha: got 0.0, need a number above 0"),
        ({}, {"scale": "max", "normalize": False}, {}, "method.crr.scale=max: got normalize=false"),
    ],
)
def test_switches_that_cannot_work_are_refused(
    align: dict[str, Any], crr: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        medcss(align, crr, **changes)
