"""Clipped and noised gradients of a step: one per patient or bucket, none larger than C (Abadi et al. 2016).

The sum of the units' gradients, each at most C long, plus N(0, σ²C²) on each coordinate, over the expected number of
units. Who takes part is a Poisson sample; nothing else of a step depends on other units.
"""

import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from medfl.errors import ConfigError
from medfl.methods.base import Method
from medfl.privacy.secret import Secret
from medfl.privacy.units import Units
from medfl.protection import Privacy
from medfl.training import Device, Plan, Task, losses_of

CHUNK = 16  # images whose own gradients are in memory together
LEAST = 2  # images in a bucket that can be told from each other


class PrivateGradients:
    """The gradients of a site's steps, for `train_locally`; no loss leaves, so it tells of none.

    with PrivateGradients(method, task, plan, where, privacy, units) as gradients:
        train_locally(method, task, optimizer, plan, where, gradients)

    Args:
        method: one that `isolate` has been called on.

    Raises:
        ConfigError: mechanism patient, and the loss is no sum over patients.
    """

    def __init__(
        self, method: Method, task: Task, plan: Plan, where: Device, privacy: Privacy, units: Units,
        secret: Secret | None = None,
    ) -> None:  # fmt: skip
        if privacy.mechanism == "patient" and not method.separable:
            raise ConfigError(
                f"privacy.mechanism=patient: the loss of {type(method).__name__} compares patients with each other, so "
                "none has a gradient of its own. Take privacy=group."
            )
        self.method, self.task, self.plan, self.where = method, task, plan, where
        self.privacy, self.units, self.secret = privacy, units, secret or Secret()
        self.parameters = method.trainable()
        self.size = sum(parameter.numel() for parameter in self.parameters)  # D
        self._sampler: Any = None

    def __enter__(self) -> Self:
        if self.privacy.mechanism == "patient":
            from opacus.grad_sample import GradSampleModule  # seconds of imports

            GradSampleModule.GRAD_SAMPLERS |= dict.fromkeys((nn.Conv2d, nn.Conv3d), _of_convolution)
            self._sampler = GradSampleModule(self.method, loss_reduction="mean", strict=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler is not None:
            self._sampler.to_standard_module()
            self._sampler = None

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Set .grad of all that is trained."""
        total = self.summed(step)
        total += self.secret.normal(len(total), total.device) * (self.privacy.noise * self.privacy.clip)
        total /= self.units.expected
        for parameter, part in zip(self.parameters, self._split(total), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))  # fused steps need its strides
        return {}

    def summed(self, step: int) -> Tensor:
        """The sum (D,) of the clipped gradients of a Poisson sample of the units, without noise."""
        chosen = self.secret.chosen(len(self.units.members), self.units.rate)
        total = torch.zeros(self.size, device=self.where.device)
        for rows in self.of_units(chosen, self.plan.progress(step)):
            total += clipped_sum(rows, self.privacy.clip)
        return total

    def of_units(self, chosen: Tensor, progress: float) -> Iterator[Tensor]:
        """The gradients (units, D) of the chosen units before clipping, some units at a time."""
        picked = [[self.secret.some(self.units.patients[p], self.privacy.images) for p in self.units.members[int(unit)]]
                  for unit in chosen]  # fmt: skip
        if self.privacy.mechanism == "patient":
            yield from self._of_patients([rows for (rows,) in picked], progress)
            return
        for bucket in picked:
            rows = torch.cat(bucket) if bucket else torch.empty(0, dtype=torch.int64)
            if len(rows) >= LEAST:
                yield self._of_bucket(rows, progress)[None]

    def _of_bucket(self, rows: Tensor, progress: float) -> Tensor:
        """The gradient (D,) of the loss among the images of one bucket."""
        losses = losses_of(self.method, self.task, rows, self.secret.key(), progress, self.where)
        if not losses["total"].requires_grad:
            return torch.zeros(self.size, device=self.where.device)
        found = torch.autograd.grad(losses["total"], self.parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        return torch.cat([part.reshape(-1).float() for part in parts])

    def _of_patients(self, picked: list[Tensor], progress: float) -> Iterator[Tensor]:
        """The mean gradients (patients, D) over the images of each patient."""
        while picked:
            taken, count = 1, len(picked[0])
            while taken < len(picked) and count + len(picked[taken]) <= CHUNK:
                count, taken = count + len(picked[taken]), taken + 1
            part, picked = picked[:taken], picked[taken:]
            images = self._of_images(torch.cat(part), progress)
            if count == len(part):
                yield images
                continue
            owners = torch.repeat_interleave(torch.arange(len(part)), torch.tensor([len(rows) for rows in part]))
            owners = owners.to(images.device)
            counts = torch.bincount(owners, minlength=len(part)).to(images.dtype)
            sums = images.new_zeros(len(part), images.shape[1]).index_add_(0, owners, images)
            yield sums / counts[:, None]

    def _of_images(self, rows: Tensor, progress: float) -> Tensor:
        """The gradient (B, D) of each image's own loss, by the hooks of Opacus.

        Raises:
            RuntimeError: a layer saw other rows than one per image, so that clipping would protect something else.
        """
        self.method.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]
        losses = losses_of(self.method, self.task, rows, self.secret.key(), progress, self.where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that images need no gradient
            torch.autograd.backward(losses["total"])
        parts = []
        for parameter in self.parameters:
            found: Any = parameter.grad_sample  # type: ignore[attr-defined]
            if found is None:  # the loss does not reach it
                found = torch.zeros(len(rows), *parameter.shape, device=parameter.device)
            if not isinstance(found, Tensor) or len(found) != len(rows):
                raise RuntimeError(f"a layer saw {len(found)} rows for {len(rows)} images; need one row per image.")
            parts.append(found.reshape(len(rows), -1).float())
            parameter.grad_sample = None  # type: ignore[attr-defined]
        self.method.zero_grad(set_to_none=True)
        return torch.cat(parts, dim=1)

    def _split(self, vector: Tensor) -> tuple[Tensor, ...]:
        return torch.split(vector, [parameter.numel() for parameter in self.parameters])


def clipped_sum(rows: Tensor, most: float) -> Tensor:
    """The sum (D,) of rows (units, D), each cut to length `most`; the rows are written over.

    One that is not finite counts as none, since no scale could shorten it.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1)
    whole = lengths.isfinite()
    rows.masked_fill_(~whole[:, None], 0)
    scales: Tensor = (most / lengths).clamp_max(1.0).where(whole, 0)
    return torch.mv(rows.T, scales)


def _of_convolution(layer: nn.Module, activations: list[Tensor], slopes: Tensor) -> dict[nn.Parameter, Tensor]:
    """Opacus's own, which reads maps in channels-last order as if they were contiguous (1.6.0)."""
    from opacus.grad_sample.conv import compute_conv_grad_sample

    found: dict[nn.Parameter, Tensor] = compute_conv_grad_sample(
        layer, [maps.contiguous() for maps in activations], slopes.contiguous()
    )
    return found
