"""Momentum encoders and blended weights at a site, against their equations."""

import math

import pytest
import torch

from medfl import config
from medfl.methods.base import Method, Role
from medfl.site_weights import DRIFT, LAMBDA, Blend, keep_targets, place_targets, target_pairs


def byol(seed: int) -> Method:
    study = config.compose(["method=byol", "data.size=16", "encoder=tiny", "encoder.base_width=4", "run.dir=x"])
    torch.manual_seed(seed)
    method: Method = config.build(study.method)
    with torch.no_grad():  # a target that lags behind
        for name, tensor in method.state_dict().items():
            if name in target_pairs(method):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return method


def targets(method: Method) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in method.tensors(Role.TARGET).items()}


def online(method: Method) -> dict[str, torch.Tensor]:
    return {name: method.state_dict()[pair].clone() for name, pair in target_pairs(method).items()}


def receive(method: Method, broadcast: dict[str, torch.Tensor]) -> None:
    for name, pair in target_pairs(method).items():
        method.state_dict()[pair].copy_(broadcast[name])
        method.state_dict()[name].zero_()  # a broadcast without targets leaves nothing usable


def test_every_target_tensor_has_its_online_counterpart() -> None:
    method = byol(0)
    pairs = target_pairs(method)
    assert len(pairs) > 20
    shapes = method.state_dict()
    assert all(shapes[a].shape == shapes[b].shape for a, b in pairs.items())
    assert {a.removeprefix("target_") for a in pairs} == set(pairs.values())


def test_shift_keeps_every_lag_and_the_mean_of_the_targets() -> None:
    """Σ w θt stays as it is although no target is sent (federated-averaging weights, five decimals of float32)."""
    weights, sites = [0.5, 0.3, 0.2], [byol(seed) for seed in range(3)]
    before = [targets(site) for site in sites]
    mean = {n: sum(w * online(s)[n] for w, s in zip(weights, sites, strict=True)) for n in before[0]}
    for site in sites:
        kept = keep_targets(site, "shift")
        receive(site, mean)
        place_targets(site, "shift", kept)
    for name in mean:
        old = sum(w * b[name] for w, b in zip(weights, before, strict=True))
        new = sum(w * targets(s)[name] for w, s in zip(weights, sites, strict=True))
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)
        lag = targets(sites[1])[name] - online(sites[1])[name]
        assert lag.abs().sum() > 0


@pytest.mark.parametrize("mode", ["reset", "local", "shift"])
def test_modes_place_the_target_as_named(mode: str) -> None:
    method, other = byol(0), byol(1)
    own, kept, mean = targets(method), keep_targets(method, mode), online(other)
    assert bool(kept) == (mode != "reset")
    receive(method, mean)
    place_targets(method, mode, kept)
    wanted = own if mode == "local" else mean
    if mode == "shift":
        wanted = {name: mean[name] + kept[name] for name in mean}
    torch.testing.assert_close(targets(method), wanted, rtol=0, atol=0)
    receive(method, mean)
    place_targets(method, mode, {})  # a site that lost its state
    torch.testing.assert_close(targets(method), mean, rtol=0, atol=0)


def flat(method: Method, names: list[str]) -> torch.Tensor:
    return torch.cat([method.state_dict()[name].flatten() for name in names]).double()


@pytest.mark.parametrize("form", ["paper", "code"])
def test_blend_follows_fedema(form: str) -> None:
    """μ = τ in the first round with own weights; then min(1, λ d) with the λ of that round; θ = μ own + (1-μ) mean."""
    names = list(byol(0).tensors(Role.PARAMETER))
    blend, site = Blend(form, 0.7, names), byol(0)
    assert blend.apply(site, {}) == (0.0, {})  # nothing of its own yet
    start = blend.start(site)
    with torch.no_grad():
        for name in names:
            site.state_dict()[name].add_(0.01)
    kept = blend.keep(site, start)
    weights = [n for n in names if start[n].ndim > 1]
    moved = sum(math.sqrt(start[n].numel()) * 0.01 for n in weights) / len(weights)
    assert float(kept[DRIFT]) == pytest.approx(moved, rel=1e-3)
    own, mean = flat(site, names), flat(byol(1), names)

    site.load_state_dict(byol(1).state_dict())
    share, fixed = blend.apply(site, kept)
    distance = float((mean - own).norm()) if form == "paper" else moved
    assert share == pytest.approx(0.7)
    assert float(fixed[LAMBDA]) == pytest.approx(0.7 / distance, rel=1e-3)
    torch.testing.assert_close(flat(site, names), 0.7 * own + 0.3 * mean, rtol=1e-4, atol=1e-6)

    far = {**kept, **fixed, DRIFT: kept[DRIFT] / 2}
    site.load_state_dict(byol(1).state_dict())
    with torch.no_grad():
        for name in names:
            site.state_dict()[name].lerp_(kept[f"blend/own/{name}"], 0.5)  # half as far as before
    assert blend.apply(site, far)[0] == pytest.approx(0.35, rel=1e-3)
