"""The only training loop: one site, one round."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from medfl import seeding
from medfl.data.sample import UNLABELLED
from medfl.errors import DivergedError, ResourceError
from medfl.methods.base import Method, balanced_probabilities
from medfl.optimizers import learning_rate

Views = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Device:
    """Where and in what precision to compute."""

    device: torch.device
    bf16: bool
    channels_last: bool

    @classmethod
    def choose(cls, device: str, precision: str, channels_last: str) -> "Device":
        """Resolve `auto`.

        Raises:
            ResourceError: CUDA was asked for and there is none.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise ResourceError("training.device=cuda: this machine shows no CUDA device. Take training.device=auto.")
        cuda = torch.cuda.is_available() and device != "cpu"
        last = cuda if channels_last == "auto" else channels_last == "always"
        bf16 = cuda if precision == "auto" else precision == "bf16"
        return cls(torch.device("cuda" if cuda else "cpu"), bf16, last)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def resident(self, images: Tensor) -> Tensor:
        """The images on the device, if they leave half of its memory free, else where they are.

        All sites of a process come here before the first of them trains.
        """
        if self.device.type != "cuda":
            return images
        free, total = torch.cuda.mem_get_info(self.device)
        return images.to(self.device) if free - images.nbytes > total / 2 else images

    def of(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The chosen rows on the device; the host does not wait for it."""
        if self.device.type != "cuda" or rows.device.type == "cuda":
            return rows[chosen.to(rows.device, non_blocking=True)].to(self.device)
        pinned = torch.empty(len(chosen), *rows.shape[1:], dtype=rows.dtype, pin_memory=True)  # reused after the copy
        return torch.index_select(rows, 0, chosen, out=pinned).to(self.device, non_blocking=True)

    def memory_format(self, spatial_dims: int) -> torch.memory_format:
        if not self.channels_last:
            return torch.contiguous_format
        return torch.channels_last if spatial_dims == 2 else torch.channels_last_3d


@dataclass(frozen=True)
class Plan:
    """What to train in this round."""

    seed: int
    site: str
    round: int  # from 1
    rounds: int  # of the phase
    steps: int
    batch_size: int
    warmup: float
    schedule: str = "cosine"
    before: int = 0  # rounds of earlier phases
    parts: int = 1  # of a batch, which are computed one after another and make one step

    def progress(self, step: int) -> float:
        """Position in the phase's schedule at this step, in [0, 1]; equal at sites with different step counts."""
        return (self.round - 1 - self.before + step / self.steps) / self.rounds


@dataclass(frozen=True)
class Task:
    """The data and views of one site."""

    images: Tensor  # (N, C, *S) float32
    labels: Tensor | None  # (N,) int64, or (N, L) int8 of a method with `findings`; read by one that is `labelled`
    views: Views
    patients: Tensor | None = None  # (N,) int64; read by a method that is `by_patient`
    masks: Tensor | None = None  # (N, *S) uint8; read by a method that `segments`

    def batch(self, chosen: Tensor, key: int, where: Device, *, count: int, masked: bool = False) -> list[Tensor]:
        """`count` views of the chosen images, on the device; with their masks as a last channel if `masked`."""
        images = where.of(self.images, chosen)
        if masked:
            images = torch.cat([images, self._masks(chosen, images, where)], dim=1)
        made = self.views(images, key=key, count=count)
        return [view.contiguous(memory_format=where.memory_format(view.ndim - 2)) for view in made]

    def _masks(self, chosen: Tensor, images: Tensor, where: Device) -> Tensor:
        if self.masks is None:
            return torch.full_like(images[:, :1], UNLABELLED)
        return where.of(self.masks, chosen)[:, None].float()

    def known(self, chosen: Tensor, method: Method, where: Device) -> dict[str, Tensor | None]:
        """What the method reads of the chosen images besides their views."""
        read = {"labels": self.labels if method.labelled else None}
        if method.by_patient:
            read["patients"] = self.patients
        return {name: None if rows is None else where.of(rows, chosen) for name, rows in read.items()}


Gradients = Callable[[int], dict[str, Tensor]]  # of a step: sets .grad of what is trained; its loss terms


def train_locally(
    method: Method,
    task: Task,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    where: Device,
    gradients: Gradients | None = None,
) -> dict[str, float]:
    """Train `method` in place; returns the mean of each loss term over the steps.

    Nothing is read back from the device before the last step.

    Args:
        gradients: in place of those of the plan's batches, as under differential privacy.

    Raises:
        DivergedError: a loss was not finite.
    """
    method.train()
    peaks = [group["lr"] for group in optimizer.param_groups]
    sums: dict[str, Tensor] = {}
    gradients = gradients or _of_batches(method, task, plan, where)
    for step in range(plan.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            progress = plan.progress(step + 1)
            group["lr"] = learning_rate(progress, peak=peak, warmup=plan.warmup, schedule=plan.schedule)
        optimizer.zero_grad(set_to_none=True)
        losses = gradients(step)
        optimizer.step()
        method.after_step(plan.progress(step + 1))
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak
    return _means(sums, plan)


def _of_batches(method: Method, task: Task, plan: Plan, where: Device) -> Gradients:
    """The gradients of the plan's batches; a batch with nothing of what the phase trains leaves them empty.

    Of a batch in parts it is their mean by images: each part has its own statistics and negatives.
    """
    classes = task.labels if method.labelled and not method.findings else None
    drawn = indices(len(task.images), classes, plan)

    def gradients(step: int) -> dict[str, Tensor]:
        key, chosen = seeding.key(plan.seed, "views", plan.site, plan.round, step), next(drawn)
        sums: dict[str, Tensor] = {}
        for place, part in enumerate(parts_of(chosen, plan.parts)):
            own = key if plan.parts == 1 else seeding.key(key, place)
            losses, share = losses_of(method, task, part, own, plan.progress(step), where), len(part) / len(chosen)
            if losses["total"].requires_grad:
                torch.autograd.backward(losses["total"] if plan.parts == 1 else losses["total"] * share)
            for name, value in losses.items():
                sums[name] = value.detach() if plan.parts == 1 else sums.get(name, 0) + value.detach() * share
        return sums

    return gradients


def parts_of(chosen: Tensor, count: int) -> list[Tensor]:
    """A batch in at most `count` nearly equal parts of two images or more, which batch statistics need."""
    count = max(1, min(count, len(chosen) // 2))
    return [chosen] if count == 1 else list(torch.tensor_split(chosen, count))


def losses_of(
    method: Method, task: Task, chosen: Tensor, key: int, progress: float, where: Device
) -> dict[str, Tensor]:
    """What `method` returns for views of the chosen images (B,), drawn with `key`."""
    views, read = task.batch(chosen, key, where, count=method.views, masked=method.segments), {}
    if method.segments:
        read["masks"] = views[0][:, -1].to(torch.uint8)
        views = [view[:, :-1] for view in views]
    with where.autocast():
        losses: dict[str, Tensor] = method(views, progress, **read, **task.known(chosen, method, where))
    return losses


def _means(sums: dict[str, Tensor], plan: Plan) -> dict[str, float]:
    means = {name: float(value) / plan.steps for name, value in sums.items()}
    if bad := next((name for name, value in means.items() if not math.isfinite(value)), None):
        raise DivergedError(
            f"site '{plan.site}', round {plan.round}: loss '{bad}' is {means[bad]}. Lower training.optimizer.lr."
        )
    return means


def indices(count: int, labels: Tensor | None, plan: Plan) -> Iterator[Tensor]:
    """The batches of a round: passes without replacement that go on over rounds; class-balanced where labels are given.

    A pure function of the plan, so a repeated round draws the same batches. A site with fewer images than a batch
    uses all of them in every step.
    """
    size = min(plan.batch_size, count)
    per_epoch = count // size
    known = -1
    order = torch.empty(0, dtype=torch.int64)
    for step in range((plan.round - 1) * plan.steps, plan.round * plan.steps):
        if labels is not None:
            draw = seeding.generator(plan.seed, "balanced", plan.site, step)
            yield torch.multinomial(balanced_probabilities(labels), size, replacement=True, generator=draw)
            continue
        epoch, place = divmod(step, per_epoch)
        if epoch != known:
            order = torch.randperm(count, generator=seeding.generator(plan.seed, "order", plan.site, epoch))
            known = epoch
        yield order[place * size : (place + 1) * size]


def batches(chosen: Tensor, size: int) -> list[Tensor]:
    """Parts of `size`; a last part of one image joins the one before, since batch statistics need two."""
    parts = list(torch.split(chosen, size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
