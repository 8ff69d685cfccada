"""Training a latent diffusion model on the images of one site: first the autoencoder, then the denoiser.

Every random number is a function of (seed, phase, step), so that a training goes on from its file as if it had never
stopped, bit for bit on the same machine.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medfl import seeding
from medfl.errors import DataError, DivergedError
from medfl.methods.byol import follow
from medfl.optimizers import adamw, learning_rate
from medfl.study import Synthesis
from medfl.synthesis.latent import Diffusion
from medfl.synthesis.losses import prediction, reconstruction
from medfl.synthesis.progress import Progress, average_momentum, batch
from medfl.training import Device

REPORT_EVERY = 10  # steps: the loss is read back from the device no more often
HELD_OUT_PASSES = 4  # each with its own noise levels: one draw for each of few images would be a coarse mean
LATER = ("sampler_steps", "candidates", "budget", "features", "feature_steps")  # of the plan: not this training's
WARMUP = 0.02  # share of the steps with a rising learning rate

Report = Callable[[str, int, int, float], None]  # phase, steps done, steps in all, mean loss since the last report
Rows = tuple[Tensor, ...]  # what a phase learns from, one row for each image


def train(
    images: Tensor,
    plan: Synthesis,
    where: Device,
    *,
    folder: Path,
    held_out: Sequence[int],
    seed: int,
    report: Report,
) -> Diffusion:
    """Train both networks; goes on where an equal call stopped.

    Args:
        images: (N, C, *S) float32 in [-1, 1].
        folder: for the states of this training alone; those of others in it are removed. They are as private as the
            images, and of no use once the model is saved.
        held_out: places in `images` that are not trained on, but choose the best weights; none: the last are kept.
        seed: e.g. `seeding.key(study.seed, "synthesis", site)`.

    Raises:
        ConfigError: networks that cannot be built.
        DataError: no image to train on, or a damaged state.
        DivergedError: a loss was not finite.
    """
    kept = sorted(set(range(len(images))) - set(held_out))
    if not kept:
        raise DataError(f"synthesis: got {len(images)} images, {len(held_out)} of them held out; need one to train on.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key(seed, "init"))
        model = Diffusion(autoencoder=plan.autoencoder, denoiser=plan.denoiser, shape=images.shape[1:])
    model.to(where.device).to(memory_format=where.memory_format(images.dim() - 2))  # type: ignore[call-overload]
    learnt = [(field.name, getattr(plan, field.name)) for field in fields(plan) if field.name not in LATER]
    fingerprint = _fingerprint(images, repr((learnt, seed, sorted(held_out), tuple(images.shape))))
    seen, unseen = torch.tensor(kept), torch.tensor(sorted(held_out), dtype=torch.int64)
    run = Run(plan, where, folder, seed, report, fingerprint, seen, unseen)

    loss: Callable[..., Tensor] = functools.partial(
        reconstruction, multiple=model.multiple, kl=plan.kl, ssim_weight=plan.ssim
    )
    phase = Phase("autoencoder", model.autoencoder, loss, plan.autoencoder_steps, ema=0.0)
    run.finish(phase, (images,))
    mean, deviation = _latents(model, images, plan, where)
    model.scale = _scale(mean[seen.to(mean.device)], deviation[seen.to(mean.device)])
    loss = functools.partial(prediction, schedule=model.schedule, scale=model.scale)
    phase = Phase("denoiser", model.denoiser, loss, plan.denoiser_steps, ema=plan.ema)
    run.finish(phase, (mean, deviation))
    return model


@dataclass(frozen=True)
class Phase:
    """One of the two trainings."""

    name: str
    network: nn.Module
    loss: Callable[..., Tensor]  # of a network, the rows of a batch and a generator
    steps: int
    ema: float  # 0: no average


@dataclass(frozen=True)
class Run:
    """What the two trainings have in common."""

    plan: Synthesis
    where: Device
    folder: Path
    seed: int
    report: Report
    fingerprint: str
    seen: Tensor  # places of the rows to train on
    unseen: Tensor  # of the held-out rows

    def finish(self, phase: Phase, rows: Rows) -> None:
        """Train to the last step, or until the held-out loss no longer falls; leaves the best weights in the network.

        Raises:
            DataError: a damaged state.
            DivergedError: a loss was not finite.
        """
        plan = self.plan
        optimizer = adamw(list(phase.network.parameters()), lr=plan.lr, weight_decay=plan.weight_decay)
        progress = Progress(phase.network, optimizer, self._path(phase))
        progress.restore()
        while progress.step < phase.steps and progress.misses < plan.patience:
            stop = min(phase.steps, progress.step + plan.check_every)
            self._advance(phase, progress, rows, stop)
            if len(self.unseen):
                progress.judge(_finite(phase, self._held_out_loss(phase, progress.average, rows), stop))
            progress.save(stop)
        chosen = progress.best if len(self.unseen) else progress.average
        phase.network.load_state_dict(chosen.state_dict())
        phase.network.requires_grad_(False)

    def _path(self, phase: Phase) -> Path:
        """Where the state of a phase is; those of other images or plans go."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f"{phase.name}-{self.fingerprint}.safetensors"
        for other in set(self.folder.glob(f"{phase.name}-*.safetensors")) - {path}:
            other.unlink()
        return path

    def _advance(self, phase: Phase, progress: Progress, rows: Rows, stop: int) -> None:
        order = seeding.key(self.seed, phase.name, "order")
        losses: list[Tensor] = []
        for step in range(progress.step, stop):
            rate = learning_rate((step + 1) / phase.steps, peak=self.plan.lr, warmup=WARMUP)
            for group in progress.optimizer.param_groups:
                group["lr"] = rate
            chosen = self.seen[batch(len(self.seen), self.plan.batch_size, step, order)]
            loss = self._loss(phase, progress.network, rows, chosen, step)
            progress.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            progress.optimizer.step()
            follow(progress.average, progress.network, momentum=average_momentum(step, largest=phase.ema))
            losses.append(loss.detach())
            if (step + 1) % REPORT_EVERY == 0 or step + 1 == stop:
                mean = _finite(phase, float(torch.stack(losses).mean()), step + 1)
                self.report(phase.name, step + 1, phase.steps, mean)
                losses.clear()

    @torch.no_grad()
    def _held_out_loss(self, phase: Phase, network: nn.Module, rows: Rows) -> float:
        """Mean over the held-out rows, at the same noise and the same noise levels in every call."""
        total = 0.0
        for number in range(HELD_OUT_PASSES):
            for part, chosen in enumerate(torch.split(self.unseen, self.plan.batch_size)):
                total += float(self._loss(phase, network, rows, chosen, "held out", number, part)) * len(chosen)
        return total / (HELD_OUT_PASSES * len(self.unseen))

    def _loss(self, phase: Phase, network: nn.Module, rows: Rows, chosen: Tensor, *place: int | str) -> Tensor:
        """The loss on the chosen rows, with the random numbers of that place."""
        layout = self.where.memory_format(rows[0].dim() - 2)
        taken = [row[chosen.to(row.device)].to(self.where.device, non_blocking=True) for row in rows]
        generator = seeding.generator(self.seed, phase.name, *place)
        with self.where.autocast():
            return phase.loss(network, *[row.contiguous(memory_format=layout) for row in taken], generator)


@torch.no_grad()
def _latents(model: Diffusion, images: Tensor, plan: Synthesis, where: Device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of all images, on the device; deviation 0 where latents=mean."""
    found: list[Any] = []
    for part in torch.split(images, plan.batch_size):
        with where.autocast():
            found.append(model.encode(part.to(where.device)))
    mean, deviation = (torch.cat([each.float() for each in parts]) for parts in zip(*found, strict=True))
    return mean, deviation if plan.latents == "sample" else torch.zeros_like(deviation)


def _scale(mean: Tensor, deviation: Tensor) -> float:
    """1 / std of the latents N(mean, deviation²) of a whole set."""
    variance = float(mean.double().var(correction=0) + deviation.double().square().mean())
    if not (math.isfinite(variance) and variance > 0):
        raise DivergedError(f"synthesis: the autoencoder's latents have variance {variance}. Lower synthesis.lr.")
    return 1 / math.sqrt(variance)


def _finite(phase: Phase, loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise DivergedError(f"synthesis: the {phase.name}'s loss is {loss} at step {step}. Lower synthesis.lr.")
    return loss


def _fingerprint(images: Tensor, text: str) -> str:
    """Of the images and all that a training depends on besides."""
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    digest.update(images.cpu().contiguous().numpy().data)
    return digest.hexdigest()
