"""Findings: the loss is that of the known ones, unknown ones teach nothing, and each has its own output."""

from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from medfl.errors import ConfigError
from medfl.tasks.multilabel import MultiLabel, known_bce
from medfl.training import Device, Plan, Task, train_locally
from tests.test_decoder import encoder

SQUARES = ((1, 1, 1), (1, 9, -1), (9, 5, 1))  # row, column and brightness of a finding; none is another one mirrored


def task(outputs: int | None = 3, **changes: Any) -> MultiLabel:
    torch.manual_seed(0)
    return MultiLabel(encoder=encoder(**changes), outputs=outputs, freeze=False)


def films(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (N, 1, 16, 16) with a square for each finding; findings (N, 3) of which each is in a third."""
    draw = torch.Generator().manual_seed(seed)
    findings = (torch.rand(count, 3, generator=draw) < 1 / 3).to(torch.int8)
    images = 0.2 * torch.randn(count, 1, 16, 16, generator=draw)
    for place, (y, x, brightness) in enumerate(SQUARES):
        images[:, 0, y : y + 5, x : x + 5] += brightness * findings[:, place].view(-1, 1, 1)
    return images, findings


def test_the_loss_is_that_of_the_known_entries_and_unknown_ones_have_no_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 4, generator=draw, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(-1, 2, (7, 4), generator=draw, dtype=torch.int8)
    terms = [
        -(logit.sigmoid() if label else 1 - logit.sigmoid()).log()
        for logit, label in zip(logits.flatten(), labels.flatten().tolist(), strict=True)
        if label >= 0
    ]
    found, expected = known_bce(logits, labels), torch.stack(terms).mean()
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes)
    assert bool((slopes[0][labels < 0] == 0).all())
    nothing = known_bce(logits, torch.full_like(labels, -1))
    assert nothing == 0
    assert bool((torch.autograd.grad(nothing, logits)[0] == 0).all())


def test_each_finding_is_learned_from_the_images_where_it_is_known() -> None:
    method, (images, findings) = task(), films(96, 1)
    findings[torch.rand(findings.shape, generator=torch.Generator().manual_seed(2)) < 0.3] = -1
    plan = Plan(0, "site-1", 1, 1, steps=30, batch_size=32, warmup=0.0)
    taught = Task(images, findings, lambda images, *, key, count: [images] * count)
    optimizer = torch.optim.AdamW(method.trainable(), lr=0.02)
    losses = train_locally(method, taught, optimizer, plan, Device.choose("cpu", "fp32", "never"))
    assert losses.keys() == {"total", "supervised"}
    fresh, truth = films(200, 3)
    with torch.no_grad():
        probabilities = method.eval().probabilities(fresh)
    areas = [[roc_auc_score(truth[:, k], probabilities[:, at]) for at in range(3)] for k in range(3)]
    assert all(areas[k][at] > 0.95 if k == at else areas[k][at] < 0.8 for k in range(3) for at in range(3)), areas


def test_there_must_be_something_to_learn() -> None:
    for outputs in (None, 0):
        with pytest.raises(ConfigError, match=rf"task\.outputs: got {outputs}, need at least one finding\. Name"):
            task(outputs)
    with pytest.raises(ValueError, match="MultiLabel: got no labels, need a row of findings for each image"):
        task()([films(2, 0)[0]], 0.0)
