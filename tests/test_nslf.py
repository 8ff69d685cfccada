"""NSLF as a method: its phases, who owns what, and that each phase learns. 2D and 3D."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from medfl import config
from medfl.errors import ConfigError
from medfl.methods.base import Role
from medfl.methods.moments import Moments
from medfl.methods.nslf import NSLF
from medfl.models.similarity import ssim
from medfl.models.warp import jacobian
from medfl.optimizers import adamw, scale_rates

NAMES = ("flair", "t1ce", "t1", "t2")
SIDES = {2: 16, 3: 8}
both = pytest.mark.parametrize("dims", [2, 3])
phases = pytest.mark.parametrize("phase", ["features", "fusion", "segmentation"])


def method(dims: int = 2, *, seed: int = 0, **changes: Any) -> NSLF:
    node = yaml.safe_load((config.CONFIGS / "method" / "nslf.yaml").read_text())
    del node["defaults"]
    small = {"modalities": list(NAMES), "spatial_dims": dims, "base_width": 4, "levels": 2}
    torch.manual_seed(seed)
    made = config.build(node | small | changes)
    assert isinstance(made, NSLF)
    made.train()
    return made


def batch(dims: int, count: int = 3, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (B, 4, *S) and masks (B, *S)."""
    draw, grid = torch.Generator().manual_seed(seed), [SIDES[dims]] * dims
    images = torch.rand(count, 4, *grid, generator=draw) * (torch.rand(count, 1, *grid, generator=draw) > 0.2)
    return images, torch.randint(0, 4, (count, *grid), generator=draw, dtype=torch.uint8)


def without(images: Tensor, row: int, *names: str) -> Tensor:
    images = images.clone()
    for name in names:
        images[row, NAMES.index(name)] = 0
    return images


def step(made: NSLF, images: Tensor, masks: Tensor | None, *, lr: float = 1e-3) -> dict[str, Tensor]:
    """One step as a site makes it, with decay."""
    optimizer = adamw(made.trainable(), lr=lr, weight_decay=0.1)
    rates = {id(parameter): made.rate(name) for name, parameter in made.named_parameters()}
    scale_rates(optimizer, lambda parameter: rates[id(parameter)])
    losses: dict[str, Tensor] = made([images], 0.0, masks=masks)
    made.zero_grad()
    if losses["total"].requires_grad:
        torch.autograd.backward(losses["total"])
        optimizer.step()
    return losses


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


@both
@phases
def test_each_phase_moves_its_parameters_and_no_others(dims: int, phase: str) -> None:
    made = method(dims)
    made.enter(phase)
    before = copy.deepcopy(made.state_dict())
    losses = step(made, *batch(dims))
    assert all(value.dim() == 0 and bool(value.isfinite()) for value in losses.values())
    assert [name for name, value in losses.items() if value.requires_grad] == ["total"]
    assert float(losses["learned"]) == 1
    expected = {
        "features": {"encoder.nets"},
        "fusion": {"encoder.nets", "encoder.fusion", "matching.affine", "matching.deformation"},
        "segmentation": {"encoder.nets", "encoder.fusion", "encoder.segmenter"},
    }[phase]
    changed = moved(before, made.state_dict())
    assert {".".join(name.split(".")[:2]) for name in changed} == expected
    assert any(name.startswith("encoder.nets.fused") for name in changed) == (phase == "fusion")
    trained = {id(parameter) for parameter in made.trainable()}
    assert changed <= {name for name, parameter in made.named_parameters() if id(parameter) in trained}


@both
def test_every_weight_of_a_phase_gets_a_gradient(dims: int) -> None:
    made, (images, masks) = method(dims), batch(dims)
    with torch.no_grad():
        for parameter in made.matching.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    for phase in made.phases:
        made.enter(phase)
        made.zero_grad()
        torch.autograd.backward(made([images], 0.0, masks=masks)["total"])
        trained = {id(parameter) for parameter in made.trainable()}
        for name, parameter in made.named_parameters():
            unused = phase != "features" and ".out." in name and ".nets." in name  # reconstructions are not asked for
            if id(parameter) in trained and not unused:
                assert parameter.grad is not None, (phase, name)
                assert bool(parameter.grad.isfinite().all()), (phase, name)
                assert parameter.dim() == 1 or bool(parameter.grad.any()), (phase, name)


@both
def test_what_an_earlier_phase_has_trained_is_only_tuned(dims: int) -> None:
    made = method(dims)

    def rates(phase: str) -> dict[str, float]:
        made.enter(phase)
        found: dict[str, float] = {}
        for name, _ in made.named_parameters():
            part = ".".join(name.split(".")[: 3 if ".fused." in name and ".nets." in name else 2])
            assert found.setdefault(part, made.rate(name)) == made.rate(name)
        return found

    assert rates("features")["encoder.nets"] == 1
    fusion = rates("fusion")
    assert (fusion["encoder.nets"], fusion["encoder.nets.fused"], fusion["encoder.fusion"]) == (0.1, 0.1, 1)
    assert fusion["matching.affine"] == fusion["matching.deformation"] == 1
    last = rates("segmentation")
    assert (last["encoder.nets"], last["encoder.fusion"], last["encoder.segmenter"]) == (0.1, 0.1, 1)
    made.enter("fusion")
    before = copy.deepcopy(made.state_dict())
    step(made, *batch(dims))
    change = {name: float((tensor - before[name]).abs().max()) for name, tensor in made.state_dict().items()}
    assert change["encoder.nets.t1.enter.0.convolution.weight"] < 0.3 * change["encoder.fusion.out.weight"]


def test_without_an_earlier_phase_the_rate_is_full() -> None:
    made = method(shares=[0.0, 1.0, 0.0])
    assert list(made.phases) == ["fusion"]
    assert {made.rate(name) for name, _ in made.named_parameters() if name.startswith(("encoder.nets", "enc.f"))} == {1}


@both
@pytest.mark.parametrize("sharing", ["per_modality", "shared"])
def test_every_tensor_has_its_owner(dims: int, sharing: str) -> None:
    claims = method(dims, sharing=sharing).roles()
    assert {claim.role for claim in claims.values()} == {Role.PARAMETER}
    owners = {name: claim.owner for name, claim in claims.items()}
    assert owners["encoder.fusion.out.weight"] == "paired"
    assert owners["encoder.segmenter.out.weight"] == owners["encoder.segmenter.slots.bias"] == "labelled"
    assert owners["encoder.segmenter.slots.t1ce.weight"] == "labelled:t1ce"
    assert owners["matching.affine.heads.shear.weight"] == owners["matching.affine.slots.fused.weight"] == "paired"
    assert owners["matching.affine.slots.t1.weight"] == owners["matching.deformation.slots.t1.weight"] == "paired:t1"
    nets = {name: owner for name, owner in owners.items() if name.startswith("encoder.nets.")}
    if sharing == "shared":
        assert set(nets.values()) == {"shared"}
    else:
        assert {name.split(".")[2]: owner for name, owner in nets.items()} == {
            **{name: f"modality:{name}" for name in NAMES},
            "fused": "paired",
        }


def test_holdings_count_images_that_can_teach() -> None:
    images, masks = batch(2, 4)
    images = without(images, 0, "t1ce", "t1", "t2")
    images = without(without(images, 1, "t1ce", "t1"), 3, *NAMES)
    masks[1:2] = 255
    assert method().holdings(images, masks) == {
        "paired": 2, "labelled": 2,
        "modality:flair": 3, "paired:flair": 2, "labelled:flair": 2,
        "modality:t1ce": 1, "paired:t1ce": 1, "labelled:t1ce": 1,
        "modality:t1": 1, "paired:t1": 1, "labelled:t1": 1,
        "modality:t2": 2, "paired:t2": 2, "labelled:t2": 1,
    }  # fmt: skip
    assert method(sharing="shared").holdings(images, None)["shared"] == 7
    assert not [group for group in method().holdings(images, None) if group.startswith("labelled")]
    owners = {claim.owner for claim in method().roles().values()}
    assert owners <= set(method().holdings(*batch(2)))


@both
@phases
def test_a_site_without_a_modality_leaves_its_weights_alone(dims: int, phase: str) -> None:
    made, (images, masks) = method(dims), batch(dims)
    images[:, NAMES.index("t1ce")] = 0
    made.enter(phase)
    before = copy.deepcopy(made.state_dict())
    for _ in range(2):
        step(made, images, masks)
    changed = moved(before, made.state_dict())
    assert changed
    assert not [name for name in changed if "t1ce" in name]
    assert any("t2" in name for name in changed)


@both
@phases
def test_a_batch_that_teaches_nothing_has_no_gradient(dims: int, phase: str) -> None:
    made, (images, masks) = method(dims), batch(dims)
    made.enter(phase)
    if phase == "features":
        images = torch.zeros_like(images)
    elif phase == "fusion":
        images[:, 1:] = 0
    else:
        masks[:] = 255
    before = copy.deepcopy(made.state_dict())
    losses = step(made, images, masks)
    assert not losses["total"].requires_grad
    assert {name: float(value) for name, value in losses.items()} == {"total": 0, "learned": 0}
    assert not moved(before, made.state_dict())
    assert "no effect" in made.remarks({"learned": 0.0})[0]
    assert not made.remarks({"learned": 0.2})
    if phase == "segmentation":
        assert not made([images], 0.0)["total"].requires_grad


@both
@phases
def test_images_that_teach_nothing_count_nothing(dims: int, phase: str) -> None:
    made, (images, masks) = method(dims), batch(dims)
    made.enter(phase)
    expected = made([images[:2]], 0.0, masks=masks[:2])
    images[2] = 0
    masks[2] = 255
    got = made([images], 0.0, masks=masks)
    assert float(got.pop("learned")) == pytest.approx(2 / 3)
    expected.pop("learned")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@both
def test_the_mean_of_a_modality_is_over_the_images_that_have_it(dims: int) -> None:
    made, (images, _) = method(dims, contrast=0.0), batch(dims)
    images = without(images, 0, "t1")
    total = made([images], 0.0)["total"]
    expected = torch.zeros(())
    for name, maps in made.encoder.features(images).items():
        own = images[maps.rows, NAMES.index(name)]
        expected = expected + (maps.reconstruction[:, 0] - own).square().flatten(1).mean(1).sqrt().mean()
    torch.testing.assert_close(total, expected)


def test_missing_modalities_change_no_term_of_the_others() -> None:
    """An image of two modalities gives the terms of a study that knows only these two."""
    images, _ = batch(2)
    images[:, [0, 2]] = 0
    made, small = method(), method(modalities=["t1ce", "t2"], seed=1)
    own = small.state_dict()
    small.load_state_dict({name: tensor for name, tensor in made.state_dict().items() if name in own})
    for phase in ("features", "fusion"):
        made.enter(phase)
        small.enter(phase)
        got, expected = made([images], 0.0), small([images[:, [1, 3]]], 0.0)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_fused_images_net_starts_as_the_first_modalitys() -> None:
    made = method()

    def nets() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        fused, first = (made.encoder.nets[name].state_dict() for name in ("fused", "flair"))
        return fused, {name: first[name] for name in fused}

    made.start_phase("features")
    assert moved(*nets())
    made.start_phase("fusion")
    torch.testing.assert_close(*nets(), rtol=0, atol=0)
    step(made, *batch(2))
    fused = copy.deepcopy(nets()[0])
    made.start_phase("segmentation")
    torch.testing.assert_close(nets()[0], fused, rtol=0, atol=0)
    made = method(shares=[1, 0, 1], segment_from="fused")
    made.start_phase("segmentation")
    torch.testing.assert_close(*nets(), rtol=0, atol=0)
    for other in (method(sharing="shared"), method(use_matching=False)):
        before = copy.deepcopy(other.state_dict())
        other.start_phase("fusion")
        assert not moved(before, other.state_dict())


@pytest.mark.parametrize(
    ("changes", "phase", "still"),
    [
        ({"segment_from": "local"}, "segmentation", "encoder.fusion"),
        ({"segment_from": "both"}, "segmentation", "encoder.nets.fused"),
        ({"segment_from": "fused"}, "segmentation", "matching"),
        ({"use_matching": False}, "fusion", "encoder.segmenter"),
        ({"contrast": 0.0}, "features", "encoder.fusion"),
        ({"norm": "code", "rec_weight": 1.0, "sharing": "shared"}, "fusion", "encoder.segmenter"),
        ({"norm_layer": "group"}, "fusion", "encoder.segmenter"),
    ],
)
def test_the_ablations_train(changes: dict[str, Any], phase: str, still: str) -> None:
    made = method(**changes)
    made.enter(phase)
    before = copy.deepcopy(made.state_dict())
    losses = step(made, *batch(2))
    changed = moved(before, made.state_dict())
    assert changed
    assert not [name for name in changed if name.startswith(still)]
    assert ("correlation" in losses) == (phase == "fusion" and made.use_matching)
    assert ("reconstruction" in losses) == (phase == "features" or made.rec_weight > 0)
    if changes.get("segment_from") == "fused":
        assert any(name.startswith("encoder.nets.fused") for name in changed)
        assert set(dict(made.encoder.segmenter.slots.named_children())) == {"fused"}


@both
def test_the_refresh_pass_sees_every_batch_norm(dims: int) -> None:
    made, (images, _) = method(dims, norm_layer="batch"), batch(dims)
    before = copy.deepcopy(made.state_dict())
    with Moments(made) as moments:
        features = made.observe(images, 0.0)
    torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)
    assert not features.requires_grad
    assert moments.sums.keys() == {name.rpartition(".")[0] for name in made.tensors(Role.NORM_MOMENTS)}
    torch.testing.assert_close(method(dims).observe(images, 0.0), method(dims).encoder(images))


@both
def test_matching_is_no_part_of_the_encoder_and_starts_at_rest(dims: int) -> None:
    made, (images, _) = method(dims), batch(dims)
    assert not [name for name in made.encoder.state_dict() if "matching" in name or "affine" in name]
    match = made.match(images)
    assert not bool(match.field.any())
    torch.testing.assert_close(match.warped, made.encoder.fuse(images), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="use_matching=false"):
        method(dims, use_matching=False).match(images)


def textures(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Four correlated textures (B, 4, 32, 32) in a disc, and a round lesion that two of them show, brightly."""
    draw = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    coarse = F.interpolate(torch.rand(count, 5, 8, 8, generator=draw), size=(32, 32), mode="bilinear")
    images = 0.2 + 0.3 * coarse[:, :1] + 0.15 * coarse[:, 1:]
    at = (torch.rand(count, 2, 1, 1, generator=draw) - 0.5) * 0.8
    lesion = (y - at[:, 0]) ** 2 + (x - at[:, 1]) ** 2 < 0.22**2
    images[:, [1, 3]] += 0.35 * lesion[:, None]
    return images * (x**2 + y**2 < 0.9), lesion.to(torch.uint8)


def train(made: NSLF, phase: str, steps: int) -> None:
    made.start_phase(phase)
    made.enter(phase)
    rates = {id(parameter): made.rate(name) for name, parameter in made.named_parameters()}
    optimizer = adamw(made.trainable(), lr=0.01, weight_decay=1e-4)
    scale_rates(optimizer, lambda parameter: rates[id(parameter)])
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 - number / steps)
    for number in range(steps):
        images, masks = textures(2, seed=number)
        optimizer.zero_grad()
        torch.autograd.backward(made([images], 0.0, masks=masks)["total"])
        optimizer.step()
        falling.step()


def test_the_three_phases_learn_one_after_the_other() -> None:
    made, (images, lesion) = method(seed=1, base_width=8), textures(8, seed=10_000)
    inside = lesion.bool()[:, None]
    train(made, "features", 80)
    with torch.no_grad():
        found = made.encoder.features(images)
        errors = [F.mse_loss(maps.reconstruction[:, 0], images[:, k]) for k, maps in enumerate(found.values())]
    assert -10 * float(torch.stack(errors).mean().log10()) > 25  # dB
    train(made, "fusion", 30)
    with torch.no_grad():
        fused, match = made.encoder.fuse(images), made.match(images)
    mean = images.mean(1, keepdim=True)

    def likeness(image: Tensor) -> float:
        return float(torch.stack([ssim(image, images[:, k : k + 1], span=1.0) for k in range(4)]).mean())

    def contrast(image: Tensor) -> float:
        return float(image[inside].mean() - image[(mean > 0) & ~inside].mean())

    assert likeness(fused) > likeness(mean) - 0.01
    assert contrast(fused) > contrast(mean)
    assert float(torch.linalg.vector_norm(match.field, dim=1).mean()) < 1  # the sources lie on each other
    assert float((jacobian(match.field) <= 0).float().mean()) < 1e-3
    train(made, "segmentation", 90)
    with torch.no_grad():
        guess = made.encoder.segment(images).argmax(1) > 0
    both_sets = 2 * (guess & inside[:, 0]).sum() / (guess.sum() + inside.sum())
    assert float(both_sets) > 0.8


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"modalities": None}, "data=multimodal or data=brain"),
        ({"norm": "l2"}, "method.norm: got 'l2'"),
        ({"shares": [1.0, 1.0]}, "method.shares"),
        ({"shares": [0.0, 0.0, 0.0]}, "method.shares"),
        ({"weights": {"fidelity": 1.0}}, "method.weights"),
        ({"contrast": 1.5}, r"method.contrast: got 1.5, need a number in \[0, 1\]"),
        ({"rec_weight": -1.0}, "method.rec_weight"),
        ({"fine_tune": -0.1}, "method.fine_tune"),
        ({"class_weights": [1.0, 1.0]}, "4 numbers"),
        ({"norm_layer": "layer"}, "norm_layer"),
    ],
)
def test_what_cannot_be_used_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        method(**changes)


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="got phase 'fusion', has features, segmentation"):
        method(shares=[1, 0, 1]).enter("fusion")


def test_the_config_takes_modalities_from_the_data() -> None:
    study = config.compose(["method=nslf", "data=brain"])
    assert study.method["modalities"] == list(NAMES)
    assert study.method["spatial_dims"] == study.data["spatial_dims"]
    assert str(study.views["_target_"]).endswith("Crops")
    with pytest.raises(ConfigError, match="named modalities"):
        config.build(config.compose(["method=nslf"]).method)
