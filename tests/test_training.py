"""Ways to train with less memory, and what is refused: half precision where torch computes it wrongly."""

from typing import Any

import pytest
import torch
from torch import Tensor

from medfl import config
from medfl.errors import ConfigError
from medfl.methods.base import Claim, Method, Role
from medfl.models.layers import recomputed
from medfl.training import Device, Plan, Task, parts_of, train_locally
from medfl.workshop import new_method, workshop

CPU = Device(torch.device("cpu"), bf16=False, channels_last=False)
SMALL = ("encoder=tiny", "encoder.base_width=4", "data.size=16", "training.threads=1", "sites=iid")


def words(method: str, *more: str) -> list[str]:
    return [f"method={method}", *SMALL, *more]


class Squares(Method):
    """A loss that is a mean over images, whose gradient parts of a batch must add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.claims = torch.nn.Linear(4, 3), {"encoder": Claim(Role.PARAMETER)}

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        del progress, labels
        total = self.encoder(views[0].flatten(1)).square().sum(1).mean()
        return {"total": total, "rows": total.new_tensor(float(len(views[0])))}


@pytest.mark.parametrize("parts", [2, 3, 5, 50])
def test_a_batch_in_parts_is_the_whole_batch_for_a_loss_that_is_a_mean(parts: int) -> None:
    images = torch.randn(11, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    task = Task(images, None, lambda given, key, count: [given] * count)
    found = []
    for count in (1, parts):
        torch.manual_seed(0)
        method = Squares()
        plan = Plan(0, "a", 1, 1, 3, 11, 0.0, parts=count)
        losses = train_locally(method, task, torch.optim.SGD(method.parameters(), lr=0.1), plan, CPU)
        found.append((method.encoder.weight.detach().clone(), losses["total"]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_parts_hold_every_image_once_and_two_at_least() -> None:
    for size in range(2, 20):
        for count in range(1, 12):
            parts = parts_of(torch.arange(size), count)
            assert torch.cat(parts).tolist() == list(range(size))
            assert min(map(len, parts)) >= 2
            assert len(parts) <= count


@pytest.mark.parametrize("method", ["dissect", "dcl", "byol"])
def test_keys_and_tokens_of_all_parts_enter_queue_and_codebooks(method: str) -> None:
    """What a step leaves in queues and codebooks stands for all images of its batch."""
    study = config.compose(words(method, *(("method.head=mlp",) if method == "dcl" else ())))
    images = torch.randn(12, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    task = Task(images, None, config.build(study.views), torch.arange(12))
    masses = []
    for parts in (1, 3):
        made = new_method(study).train()
        for book in made.codebooks().values():
            book.set(
                torch.ones(len(book.counts)), torch.randn(book.sums.shape, generator=torch.Generator().manual_seed(2))
            )
        optimizer = torch.optim.SGD(made.trainable(), lr=0.01)
        train_locally(made, task, optimizer, Plan(0, "a", 1, 1, 1, 12, 0.0, parts=parts), CPU)
        keys = [int((queue.versions >= 0).sum()) for queue in made.queues().values()]
        masses.append([*keys, *(float(book.counts.sum()) for book in made.codebooks().values())])
    assert masses[1] == pytest.approx(masses[0], rel=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", ["simclr", "medcss", "byol"])
def test_activations_that_are_computed_again_change_no_bit(dims: int, method: str) -> None:
    study = config.compose(words(method, f"data.spatial_dims={dims}"))
    views = [torch.randn(4, 1, *[16] * dims, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    found: list[dict[str, Any]] = []
    for again in (False, True):
        made = new_method(study).train()
        made.encoder.checkpointing = again  # type: ignore[assignment]
        losses = made(views, 0.3)
        torch.autograd.backward(losses["total"])
        gradients = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
        found.append({**gradients, **made.state_dict()})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_activations_are_not_kept() -> None:
    """The saved tensors of a stage are its input alone."""
    stage = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)))
    kept: list[list[Tensor]] = []
    for run in (stage, lambda given: recomputed(stage, given)):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, into=saved: into.append(tensor) or tensor, lambda t: t
        ):
            run(torch.randn(1, 3, 8, 8, requires_grad=True))
        kept.append([tensor for tensor in saved if tensor.ndim == 4 and tensor.shape[-1] == 8])
    assert len(kept[0]) >= 6
    assert len(kept[1]) <= 1


@pytest.mark.parametrize("word", ["training.parts=2", "training.checkpointing=true"])
def test_less_memory_is_refused_under_privacy(word: str) -> None:
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        config.compose(words("byol", "privacy=patient", word))
    with pytest.raises(ConfigError, match="at least 1"):
        config.compose(words("byol", "training.parts=0"))


@pytest.mark.parametrize("word", ["data.spatial_dims=3", "encoder.stem=imagenet"])
def test_half_precision_is_refused_on_a_cpu_where_its_gradients_are_wrong(word: str) -> None:
    plain = words("simclr", "training.device=cpu", "training.precision=bf16")
    assert workshop(config.compose(plain).source).where.bf16
    with pytest.raises(ConfigError, match=r"precision=bf16: torch's Conv[23]d.*Take fp32 or auto"):
        workshop(config.compose([*plain, word]).source)
