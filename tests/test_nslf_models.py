"""NSLF's networks: shapes, closed forms, and what a missing modality must not do. 2D and 3D."""

import copy
import itertools
import math
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl import config
from medfl.errors import ConfigError
from medfl.models.blocks import Block, InstanceNorm, Slots
from medfl.models.fusion import fusion_weights
from medfl.models.matching import Match, Matching
from medfl.models.multimodal import MultimodalNet
from medfl.models.unet import UNet
from medfl.models.warp import affine, affine_field, affine_numbers, bounded_affine, compose, jacobian, positions, warp

NAMES = ("flair", "t1ce", "t1", "t2")
both = pytest.mark.parametrize("dims", [2, 3])
M = TypeVar("M", bound=nn.Module)


def net(dims: int = 2, *, seed: int = 0, **changes: Any) -> MultimodalNet:
    settings: dict[str, Any] = {
        "modalities": NAMES, "spatial_dims": dims, "base_width": 4, "levels": 2, "norm": "instance",
        "sharing": "per_modality", "segment_from": "both", "fused_net": True, "checkpointing": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    return MultimodalNet(**settings | changes)


def heads(dims: int = 2, *, batch: int = 2, seed: int = 1) -> Tensor:
    """Images (B, 4, *S) in (0, 1] inside of a margin of zeros."""
    draw = torch.Generator().manual_seed(seed)
    inner = torch.rand(batch, 4, *[{2: 12, 3: 8}[dims]] * dims, generator=draw) * 0.9 + 0.05
    return F.pad(inner, [2, 2] * dims)


def lacking(images: Tensor, *gaps: tuple[int, str]) -> Tensor:
    images = images.clone()
    for row, name in gaps:
        images[row, NAMES.index(name)] = 0
    return images


def unsettled(module: M, seed: int = 3) -> M:
    """The same module with every parameter moved: nothing starts at zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return module


def matched(model: MultimodalNet, matching: Matching, images: Tensor) -> Match:
    features = model.features(images)
    fused = model.fused_from(images, features)
    deep = {name: (maps.rows, maps.deep) for name, maps in features.items()}
    local = {name: (maps.rows, maps.local) for name, maps in features.items()}
    match: Match = matching(deep, local, image=fused, fused=model.features_of_fused(fused))
    return match


@pytest.mark.parametrize("sides", [(80, 80, 64), (160, 160, 64)])
def test_the_papers_unet_has_the_papers_maps_and_size(sides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        unet = UNet(32, levels=4, norm="instance", spatial_dims=3)
        deep, local, made = unet(torch.empty(1, 1, *sides))
    assert deep.shape == (1, 256, *(side // 16 for side in sides))
    assert local.shape == (1, 32, *sides)
    assert made.shape == (1, 1, *sides)
    biases = sum(m.out_channels for m in unet.modules() if isinstance(m, nn.Conv3d) and m.bias is None)
    assert sum(parameter.numel() for parameter in unet.parameters()) + biases == 10_739_873


def test_the_papers_decoders_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        model = net(3, base_width=32, levels=4)
        matching = Matching(NAMES, 32, spatial_dims=3)

    def size(module: nn.Module) -> int:
        inert = sum(len(m.convolution.get_parameter("weight")) for m in module.modules() if isinstance(m, Block))
        return sum(parameter.numel() for parameter in module.parameters()) + inert

    assert size(model.fusion) == 1_888_161
    assert size(model.segmenter) == 415_432
    assert sum(parameter.numel() for parameter in matching.parameters()) == 8_922_450


@both
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("levels", [1, 3])
def test_any_side_comes_back(dims: int, norm: str, levels: int) -> None:
    images = torch.rand(2, 1, *(19, 12, 9)[:dims])
    deep, local, made = UNet(2, levels=levels, norm=norm, spatial_dims=dims)(images)
    assert deep.shape == (2, 16, *(-(-side // 2**levels) for side in images.shape[2:]))
    assert local.shape[2:] == made.shape[2:] == images.shape[2:]
    assert bool((made > 0).all())
    assert bool((made < 1).all())


def test_one_voxel_at_the_bottom_is_not_normalised_away() -> None:
    unet = UNet(2, levels=4, norm="instance", spatial_dims=3)
    deep, _, made = unet(torch.rand(1, 1, 16, 16, 16))
    assert deep.shape[2:] == (1, 1, 1)
    assert bool(deep.count_nonzero() > 0)
    torch.autograd.backward(made.sum())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in unet.parameters())


@both
def test_instance_norm_is_torchs(dims: int) -> None:
    maps = torch.randn(3, 4, *[5] * dims, dtype=torch.float64)
    ours = unsettled(InstanceNorm(4)).double()
    reference = (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(4, affine=True).double()
    reference.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(maps), reference(maps))


def test_nets_of_modalities_share_nothing() -> None:
    model = net()
    places = [p.data_ptr() for p in model.parameters()]
    assert len(set(places)) == len(places)
    assert set(model.nets) == {*NAMES, "fused"}
    assert set(net(sharing="shared").nets) == {"shared"}
    assert set(net(fused_net=False).nets) == set(NAMES)


@both
def test_slots_are_one_convolution_over_the_concatenation(dims: int) -> None:
    torch.manual_seed(0)
    slots = Slots(NAMES, 3, 5, fused=True, dims=dims).double()
    values = torch.randn(5, 2, 3, *[6] * dims, dtype=torch.float64)
    rows = torch.arange(2)
    got = slots({name: (rows, values[k]) for k, name in enumerate(NAMES)}, like=values[4], fused=values[4])
    weight = torch.cat([slots.get_parameter(f"{name}.weight") for name in (*NAMES, "fused")], dim=1)
    convolve = F.conv2d if dims == 2 else F.conv3d
    torch.testing.assert_close(got, convolve(torch.cat(list(values), dim=1), weight, slots.bias, padding=1))


@both
def test_slots_of_what_is_missing_neither_count_nor_run(dims: int) -> None:
    """Row 0 has two of four, so they count twice; zeros in place of the others give the same."""
    torch.manual_seed(0)
    slots = Slots(NAMES, 3, 5, fused=False, dims=dims).double()
    values = torch.randn(4, 2, 3, *[6] * dims, dtype=torch.float64)
    every, second = torch.arange(2), torch.tensor([1])
    parts = {"flair": (every, values[0]), "t1": (every, values[2]), "t2": (second, values[3, 1:])}
    got = slots(parts, like=values[0])
    convolve = F.conv2d if dims == 2 else F.conv3d
    for row, (names, factor) in enumerate([(("flair", "t1"), 2.0), (("flair", "t1", "t2"), 4 / 3)]):
        stacked = torch.stack(
            [values[k, row] if n in names else torch.zeros_like(values[k, row]) for k, n in enumerate(NAMES)]
        )
        weight = torch.cat([slots.get_parameter(f"{name}.weight") for name in NAMES], dim=1) * factor
        torch.testing.assert_close(got[row], convolve(stacked.flatten(0, 1)[None], weight, slots.bias, padding=1)[0])
    torch.autograd.backward(got.sum())
    assert slots.get_parameter("t1ce.weight").grad is None
    assert slots.get_parameter("t2.weight").grad is not None


@both
def test_the_fused_image_is_a_mean_of_what_there_is(dims: int) -> None:
    model, images = net(dims), lacking(heads(dims), (0, "t1"), (1, "flair"), (1, "t2"))
    features = model.features(images)
    weights = model.weights(images, features)
    fused = model.fuse(images)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), atol=1e-6, rtol=0)
    there = images.flatten(2).any(2)
    assert bool((weights.flatten(2).sum(2)[~there] == 0).all())
    for row in range(2):
        sources = images[row, there[row]]
        assert bool((fused[row, 0] >= sources.amin(0) - 1e-6).all())
        assert bool((fused[row, 0] <= sources.amax(0) + 1e-6).all())
    assert float((fused - images.mean(1, keepdim=True)).detach().abs().max()) > 1e-3


def test_weights_are_the_scores_shares_also_where_scores_vanish() -> None:
    logits = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    held = torch.tensor([[True, True, True, True], [True, False, True, False]])
    scores = torch.sigmoid(logits) * held[..., None, None]
    torch.testing.assert_close(fusion_weights(logits, held), scores / scores.sum(1, keepdim=True))
    tiny = fusion_weights(torch.full((1, 4, 2, 2), -200.0), held[:1])
    torch.testing.assert_close(tiny, torch.full((1, 4, 2, 2), 0.25))


@both
def test_equal_sources_are_their_own_fusion(dims: int) -> None:
    images = heads(dims)[:, :1].repeat(1, 4, *[1] * dims)
    torch.testing.assert_close(net(dims).fuse(images), images[:, :1], atol=1e-6, rtol=0)


@both
@pytest.mark.parametrize(
    ("segment_from", "sharing"),
    [("both", "per_modality"), ("local", "per_modality"), ("fused", "per_modality"), ("both", "shared")],
)
def test_the_order_of_modalities_says_nothing(dims: int, segment_from: str, sharing: str) -> None:
    first = net(dims, segment_from=segment_from, sharing=sharing)
    order = [2, 0, 3, 1]
    second = net(dims, segment_from=segment_from, sharing=sharing, seed=1, modalities=[NAMES[k] for k in order])
    second.load_state_dict(first.state_dict())
    images = lacking(heads(dims), (1, "t1"))
    swapped = images[:, order]
    with torch.no_grad():
        found = second.weights(swapped, second.features(swapped))
        torch.testing.assert_close(found, first.weights(images, first.features(images))[:, order], atol=1e-5, rtol=0)
        torch.testing.assert_close(second.fuse(swapped), first.fuse(images), atol=1e-6, rtol=0)
        torch.testing.assert_close(second(swapped), first(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(second.segment(swapped), first.segment(images), atol=1e-4, rtol=0)


@both
def test_what_an_image_gives_does_not_depend_on_its_batch(dims: int) -> None:
    model, images = net(dims), lacking(heads(dims, batch=3), (0, "t1"), (1, "flair"), (1, "t2"))
    matching = unsettled(Matching(NAMES, 4, spatial_dims=dims))
    with torch.no_grad():
        whole = [model(images), model.fuse(images), model.segment(images), matched(model, matching, images).warped]
        for row in range(3):
            one = images[row : row + 1]
            alone = [model(one), model.fuse(one), model.segment(one), matched(model, matching, one).warped]
            for got, expected in zip(alone, whole, strict=True):
                torch.testing.assert_close(got[0], expected[row], atol=1e-4, rtol=1e-4)


@both
@pytest.mark.parametrize("segment_from", ["both", "local", "fused"])
def test_an_image_without_any_modality_is_no_danger(dims: int, segment_from: str) -> None:
    model, images = net(dims, segment_from=segment_from), heads(dims)
    images[1] = 0
    for batch in (images, images[1:]):
        outputs = [model(batch), model.fuse(batch), model.segment(batch)]
        assert all(bool(output.isfinite().all()) for output in outputs)
        assert not bool(outputs[0][-1].any())
        assert not bool(outputs[1][-1].any())
    torch.autograd.backward(
        torch.stack([model(images).sum(), model.fuse(images).sum(), model.segment(images).sum()]).sum()
    )
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@both
def test_nothing_reaches_the_nets_of_what_is_missing(dims: int) -> None:
    model, matching = net(dims), unsettled(Matching(NAMES, 4, spatial_dims=dims))
    images = lacking(heads(dims), (0, "t1ce"), (1, "t1ce")).requires_grad_()
    torch.autograd.backward(
        model.segment(images).sum() + matched(model, matching, images).warped.sum() + model(images).sum()
    )
    absent = [f"nets.t1ce.{name}" for name, _ in model.nets["t1ce"].named_parameters()]
    absent += ["segmenter.slots.t1ce.weight"]
    assert all(model.get_parameter(name).grad is None for name in absent)
    assert all(matching.get_parameter(f"{head}.slots.t1ce.weight").grad is None for head in ("affine", "deformation"))
    assert all(matching.get_parameter(f"{head}.slots.t2.weight").grad is not None for head in ("affine", "deformation"))
    fused = model.fuse(images)
    (gradient,) = torch.autograd.grad(fused.sum(), images)
    assert not bool(gradient[:, 1].any())
    assert bool(gradient[:, 0].any())


@both
def test_matching_starts_as_the_identity(dims: int) -> None:
    model, images = net(dims), heads(dims)
    match = matched(model, Matching(NAMES, 4, spatial_dims=dims), images)
    assert not bool(match.field.any())
    assert not bool(match.local.any())
    torch.testing.assert_close(match.warped, model.fuse(images), atol=1e-6, rtol=0)
    torch.testing.assert_close(jacobian(match.field), torch.ones_like(jacobian(match.field)))


@both
def test_every_head_of_matching_learns(dims: int) -> None:
    model, images = net(dims), heads(dims)
    for matching in (Matching(NAMES, 4, spatial_dims=dims), unsettled(Matching(NAMES, 4, spatial_dims=dims))):
        torch.autograd.backward((matched(model, matching, images).warped - images[:, :1]).square().mean())
        weights = [f"affine.heads.{part}.weight" for part in ("rotation", "scale", "translation", "shear")]
        for name in (*weights, "deformation.out.weight"):
            gradient = matching.get_parameter(name).grad
            assert gradient is not None, name
            assert bool(gradient.any()), name
    assert all(p.grad is not None and bool(p.grad.any()) for p in matching.parameters())


@both
def test_affine_numbers_are_bounded_and_zero_is_the_identity(dims: int) -> None:
    counts = affine_numbers(dims)
    assert sum(counts) == {2: 7, 3: 15}[dims]
    eye = torch.cat([torch.eye(dims), torch.zeros(dims, 1)], dim=1)[None]
    torch.testing.assert_close(bounded_affine(*(torch.zeros(1, n) for n in counts)), eye, rtol=0, atol=0)
    far = bounded_affine(*(torch.full((1, n), 50.0) for n in counts))
    assert float(far[..., -1].abs().max()) == pytest.approx(0.1)
    only_turned = bounded_affine(*(torch.full((1, n), 50.0 * (k == 0)) for k, n in enumerate(counts)))[0, :, :-1]
    torch.testing.assert_close(only_turned @ only_turned.T, torch.eye(dims))
    if dims == 2:
        assert math.degrees(math.acos(float(only_turned[0, 0]))) == pytest.approx(20, abs=1e-3)


@both
def test_a_whole_shift_is_exact(dims: int) -> None:
    image = torch.rand(1, 2, *(9, 7, 6)[:dims])
    field = torch.zeros(1, dims, *image.shape[2:])
    field[:, 0], field[:, 1] = 2, -1
    moved = warp(image, field)
    torch.testing.assert_close(moved[:, :, :-2, 1:], image[:, :, 2:, :-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        moved[:, :, -2:, 1:], image[:, :, -1:, :-1].expand_as(moved[:, :, -2:, 1:]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(warp(image, torch.zeros_like(field)), image, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dims", "plane"), [(2, 0), (3, 0), (3, 1), (3, 2)])
def test_a_quarter_turn_is_exact_on_a_cube(dims: int, plane: int) -> None:
    image = torch.rand(1, 1, *[8] * dims, dtype=torch.float64)
    angles = torch.zeros(1, affine_numbers(dims)[0], dtype=torch.float64)
    angles[0, plane] = math.pi / 2
    zeros = [torch.zeros(1, n, dtype=torch.float64) for n in affine_numbers(dims)]
    maps = affine(angles, zeros[1] + 1, zeros[2], zeros[3])
    axes = list(itertools.combinations(range(2, dims + 2), 2))[plane]
    turned = warp(image, affine_field(maps, positions(image.shape[2:], image)))
    # sampled at R p, with R from the plane's first axis to its second: the image turns the other way
    torch.testing.assert_close(turned, torch.rot90(image, -1, axes))


@both
def test_a_translation_is_in_half_sides_of_each_axis(dims: int) -> None:
    image = torch.rand(1, 1, *(9, 13, 5)[:dims], dtype=torch.float64)
    zeros = [torch.zeros(1, n, dtype=torch.float64) for n in affine_numbers(dims)]
    parts = torch.tensor([[0.25, 0.5, -1.0][:dims]], dtype=torch.float64)
    field = affine_field(affine(zeros[0], zeros[1] + 1, parts, zeros[3]), positions(image.shape[2:], image))
    expected = torch.tensor([1.0, 3.0, -2.0][:dims], dtype=torch.float64).view(1, dims, *[1] * dims)
    torch.testing.assert_close(field, expected.expand_as(field))


@both
def test_one_resampling_is_affine_first_and_field_second(dims: int) -> None:
    """Of an image that is linear in the position, interpolation is exact: twice warped equals once, inside."""
    sides = (17, 15, 13)[:dims]
    draw = torch.Generator().manual_seed(0)
    local = torch.rand(1, dims, *sides, dtype=torch.float64, generator=draw) - 0.5
    numbers = [torch.randn(1, n, dtype=torch.float64, generator=draw) * 0.2 for n in affine_numbers(dims)]
    maps = bounded_affine(*numbers)
    points = positions(sides, local)
    image = (points * torch.tensor([0.3, -0.2, 0.5][:dims]).view(1, dims, *[1] * dims)).sum(1, keepdim=True)
    twice = warp(warp(image, affine_field(maps, points)), local)
    once = warp(image, compose(local, maps))
    for axis in range(2, dims + 2):
        once, twice = (part.narrow(axis, 4, sides[axis - 2] - 8) for part in (once, twice))
    torch.testing.assert_close(once, twice)


@both
def test_warp_and_maps_have_right_gradients(dims: int) -> None:
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, *[4] * dims, dtype=torch.float64, generator=draw, requires_grad=True)
    field = (torch.rand(1, dims, *[4] * dims, dtype=torch.float64, generator=draw) * 0.4 + 0.3).requires_grad_()
    numbers = [torch.randn(1, n, dtype=torch.float64, generator=draw).requires_grad_() for n in affine_numbers(dims)]
    assert torch.autograd.gradcheck(warp, (image, field * 0.9))
    assert torch.autograd.gradcheck(lambda local, *n: compose(local, bounded_affine(*n)), (field, *numbers))


@both
def test_the_jacobian_of_a_linear_map_is_its_determinant(dims: int) -> None:
    torch.manual_seed(0)
    slopes = torch.randn(dims, dims, dtype=torch.float64)
    field = torch.einsum("ij,bj...->bi...", slopes, positions([5] * dims, slopes))
    determinant = torch.linalg.det(slopes + torch.eye(dims)).expand(1, *[4] * dims)
    torch.testing.assert_close(jacobian(field), determinant)


@both
def test_one_modality_is_the_same_shared_or_not(dims: int) -> None:
    alone = net(dims, modalities=["t1"], fused_net=False)
    shared = net(dims, modalities=["t1"], sharing="shared")
    shared.load_state_dict({n.replace("nets.t1.", "nets.shared."): t for n, t in alone.state_dict().items()})
    images = heads(dims)[:, :1]
    torch.testing.assert_close(alone.segment(images), shared.segment(images))
    torch.testing.assert_close(alone.fuse(images), images, atol=1e-6, rtol=0)


@both
def test_checkpointing_changes_no_gradient(dims: int) -> None:
    images = lacking(heads(dims), (0, "t2"))
    gradients = []
    for checkpointing in (False, True):
        model = net(dims, checkpointing=checkpointing)
        torch.autograd.backward(model.segment(images).square().mean())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_half_precision_gives_nearly_the_same_image() -> None:
    model, images = net(), heads()
    with torch.no_grad():
        full = model.fuse(images)
        with torch.autocast("cpu", torch.bfloat16):
            half, logits = model.fuse(images), model.segment(images)
    torch.testing.assert_close(half.float(), full, atol=0.02, rtol=0)
    assert bool(logits.isfinite().all())


def test_the_representation_is_the_mean_of_pooled_deep_features() -> None:
    model, images = net(), lacking(heads(), (0, "t1"), (0, "t2"))
    features = model.features(images)
    pooled = {name: maps.deep.mean((2, 3)) for name, maps in features.items()}
    first = torch.stack([pooled[name][0] for name in ("flair", "t1ce")]).mean(0)
    torch.testing.assert_close(model(images)[0], first)
    assert model.width == model(images).shape[1] == 32


def test_the_description_builds_the_net_again() -> None:
    model = net(3, norm="group")
    again = config.build(model.describe())
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    images = heads(3)
    torch.testing.assert_close(again.segment(images), model.segment(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"norm": "layer"}, "norm_layer"),
        ({"sharing": "all"}, "sharing"),
        ({"segment_from": "nothing"}, "segment_from"),
        ({"levels": 0}, "levels: got 0"),
        ({"base_width": 2.5}, "base_width: got 2.5"),
        ({"spatial_dims": 1}, "spatial_dims"),
        ({"modalities": ["t1", "t1"]}, "all different"),
        ({"modalities": ["fused"]}, "none of them"),
        ({"modalities": ["keys"]}, "Rename it"),
        ({"norm": "batch", "checkpointing": True}, "checkpointing=false"),
        ({"segment_from": "fused", "fused_net": False}, "fused_net=true"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        net(**changes)


def test_images_need_a_channel_for_each_modality() -> None:
    with pytest.raises(ValueError, match="a channel for each"):
        net().fuse(torch.rand(1, 3, 16, 16))
