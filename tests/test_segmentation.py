"""Segmentation: its losses are their formulas, unknown masks teach nothing, and it learns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from medfl import config
from medfl.data.phantom import Phantom
from medfl.data.sample import UNLABELLED, choose
from medfl.errors import ConfigError
from medfl.evaluation.volumes import segmentation
from medfl.methods.base import Role
from medfl.methods.moments import Moments
from medfl.study import Evaluation
from medfl.tasks.segmentation import Segmentation, dice_ce, iou_bce
from medfl.training import Device, Plan, Task, train_locally
from tests.test_decoder import encoder

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CPU = torch.device("cpu")
PLAN = Evaluation(
    protocols=("segmentation",), regularization=(1.0,), neighbours=3, resamples=20, batch_size=8, window=None,
    fractions=(1.0,), counts=None, pictures="none",
)  # fmt: skip


def task(labels: int | None = 3, *, loss: str = "dice_ce", freeze: bool = False, **changes: Any) -> Segmentation:
    torch.manual_seed(0)
    return Segmentation(encoder=encoder(**changes), labels=labels, loss=loss, freeze=freeze)


def drawn(*size: int, labels: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(4, labels, *size, generator=draw, dtype=torch.float64)
    masks = torch.randint(labels, (4, *size), generator=draw, dtype=torch.uint8)
    masks[0] = 0  # nothing but background
    return logits, masks


# losses


@pytest.mark.parametrize(("size", "labels"), [((9, 7), 2), ((5, 6, 4), 4)])
@pytest.mark.parametrize("loss", [dice_ce, iou_bce])
def test_losses_are_their_formulas(loss: Any, size: tuple[int, ...], labels: int) -> None:
    logits, masks = drawn(*size, labels=labels)
    logits.requires_grad_()
    eps, overlaps, entropies = 1e-5, [], []
    for image, mask in zip(logits, masks, strict=True):
        shares = image.softmax(0) if loss is dice_ce else image.sigmoid()
        for label in range(labels):
            there = (mask == label).double()
            both, either = (shares[label] * there).sum(), shares[label].sum() + there.sum()
            if label and loss is dice_ce:
                overlaps.append(1 - (2 * both + eps) / (either + eps))
            elif label:
                overlaps.append(1 - (2 * both + eps) / (2 * (either - both) + eps))
            if loss is iou_bce:
                entropies.append(-(there * shares[label].log() + (1 - there) * (1 - shares[label]).log()))
        if loss is dice_ce:
            entropies.append(-shares.gather(0, mask.long()[None]).log())
    expected = [torch.stack([part.mean() for part in parts]).mean() for parts in (entropies, overlaps)]
    found = list(loss(logits, masks).values())
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(sum(terms), logits, retain_graph=True)[0] for terms in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_dice_ce_is_monais() -> None:
    from monai.losses.dice import DiceCELoss

    logits, masks = drawn(8, 6)
    reference = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)(logits, masks[:, None].long())
    weight = torch.stack(list(dice_ce(logits, masks).values())).sum()
    torch.testing.assert_close(weight, reference)


# the method


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("dims", [2, 3])
def test_images_without_a_mask_teach_nothing(dims: int, norm: str) -> None:
    method = task(spatial_dims=dims, norm=norm)
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(4, 1, *[33] * dims, generator=draw)
    masks = torch.randint(3, (4, *[33] * dims), generator=draw, dtype=torch.uint8)
    masks[1:3] = UNLABELLED
    alone = method([images[[0, 3]]], 0.0, masks=masks[[0, 3]])
    some = method([images], 0.0, masks=masks)
    torch.testing.assert_close(some, alone, rtol=0, atol=0)
    assert [name for name, value in some.items() if value.requires_grad] == ["total"]
    torch.testing.assert_close(some["total"], some["cross_entropy"] + some["dice"])
    nothing = method([images], 0.0, masks=torch.full_like(masks, UNLABELLED))
    assert (nothing["total"].item(), nothing["total"].requires_grad) == (0, False)
    with pytest.raises(ValueError, match="got no masks"):
        method([images], 0.0)


@pytest.mark.parametrize("freeze", [False, True])
def test_roles_observation_and_a_frozen_encoder(freeze: bool) -> None:
    method = task(freeze=freeze).train()
    images, masks = torch.randn(4, 1, 33, 33), torch.randint(3, (4, 33, 33), dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with Moments(method) as moments:
        features = method.observe(images, 0.0)
    torch.testing.assert_close(dict(method.state_dict()), before, rtol=0, atol=0)
    assert not features.requires_grad
    needed = {name.rpartition(".")[0] for name in method.tensors(Role.NORM_MOMENTS)}
    assert {name for name in needed if name.startswith("decoder")}
    assert needed <= moments.sums.keys()
    optimizer = torch.optim.SGD(method.trainable(), lr=0.1)
    method([images], 0.0, masks=masks)["total"].backward()
    optimizer.step()
    changed = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in changed} == ({"decoder"} if freeze else {"encoder", "decoder"})
    assert method.segment(images).shape == (4, 3, 33, 33)
    if not freeze:
        assert {method.roles()[name].role for name, _ in method.named_parameters()} == {Role.PARAMETER}
        torch.testing.assert_close(method.eval().observe(images, 0.0), method.encoder(images))


def test_the_config_builds_it_on_any_encoder_with_views_that_keep_masks() -> None:
    study = config.compose(["data=phantom", "task=segmentation", "task.labels=2", "encoder.base_width=4"])
    method = config.build(study.task)
    assert isinstance(method, Segmentation)
    assert method.segment(torch.zeros(2, 1, 32, 32)).shape == (2, 2, 32, 32)
    assert config.build(study.finetune.views).keeps_masks


def test_settings_and_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.labels: got None, need at least 2"):
        task(None)
    with pytest.raises(ConfigError, match=r"task\.loss: got 'focal', need one of dice_ce, iou_bce"):
        task(loss="focal")
    masks = torch.full((3, 4, 4), UNLABELLED)
    assert task().holdings(torch.zeros(3, 1, 4, 4), masks) == task().holdings(torch.zeros(3, 1, 4, 4), None) == {}
    masks[1] = 3
    with pytest.raises(ConfigError, match=r"task\.labels: got 3, but there are masks with label 3: need 4"):
        task().holdings(torch.zeros(3, 1, 4, 4), masks)


@pytest.mark.parametrize("loss", ["dice_ce", "iou_bce"])
def test_it_learns_lesions_through_views_that_keep_masks(loss: str) -> None:
    source = yaml.safe_load((CONFIGS / "data" / "phantom.yaml").read_text())
    arguments = {name: value for name, value in source.items() if name != "_target_"}
    records = Phantom(**(arguments | {"seed": 0, "count": 72, "size": 32, "contrast": 1.5})).load()
    train, test = choose(records, range(48)), choose(records, range(48, 72))
    method = task(2, loss=loss, base_width=8, stem="small")
    views = config.build(config.compose(["data=phantom", "views=paired"]).views)
    optimizer = torch.optim.AdamW(method.trainable(), lr=1e-2)
    plan = Plan(seed=0, site="A", round=1, rounds=1, steps=60, batch_size=12, warmup=0.1)
    train_locally(
        method, Task(train.images, None, views, masks=train.masks), optimizer, plan, Device(CPU, False, False)
    )
    table = segmentation(method.eval(), test, PLAN, CPU, spacing=records.spacing, regions=records.regions)
    scores = {name: found.value for name, found in table.averages(resamples=20, seed=0).items()}
    assert scores["dice"] == scores["dice_lesion"] > 0.7
    assert scores["iou"] > 0.5
