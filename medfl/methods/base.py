"""What every self-supervised method is: a module, a loss, and a claim on each of its own tensors."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medfl.errors import ConfigError
from medfl.models.quantizer import Quantizer
from medfl.models.queue import Queue

GIVEN = "given"  # owner group that no site holds: a broadcast brings it, nobody trains it or sends it back
P = ParamSpec("P")
R = TypeVar("R")


class Role(StrEnum):
    """What a tensor is, and with it who may see it (the table of roles in the documentation)."""

    PARAMETER = "parameter"
    NORM_MOMENTS = "norm_moments"
    CODEBOOK = "codebook"
    TARGET = "target"
    QUEUE = "queue"
    LOCAL = "local"
    FIXED = "fixed"
    STATISTICS = "statistics"  # plain sums for the monitors; no tensor of a method has this or a later role
    MASKED = "masked"  # whole numbers under masks, for sums over the sites
    KEY = "key"  # public keys of one sum
    SHARE = "share"  # shares of the secrets behind masks


@dataclass(frozen=True)
class Claim:
    """A role and the group of sites that owns the tensor, e.g. "modality:t1ce"; "" is every site."""

    role: Role
    owner: str = ""


class Method(nn.Module):
    """A method defines `encoder`, `claims`, `labelled` and `forward`; the rest has a default.

    Attributes:
        phases: name of each of its phases, in order -> share of the rounds.
        needs: phase -> the owner group that a site must hold to take part in it; none: every site does.
        claims: whole-component prefix of tensor names -> claim; the longest prefix wins.
        labelled: True if `forward` needs labels (batches are class-balanced then); else they are never read.
        findings: True if these labels are (B, L), 1, 0 or -1 (unknown) for each finding; batches are not balanced then.
        segments: True if `forward` takes `masks`, (B, *S) uint8, cropped like the views.
        views: how many views `forward` takes.
        masked_only: True if it trains on images with a known mask alone.
        by_patient: True if `forward` takes a last `patients`, None or (B,) int64: equal for images of one patient.
        separable: True if, without batch norm, the loss of a batch is the mean of its images' own losses.
        alone: see `isolate`.
        encoder: what is exported and evaluated; (B, C, *S) -> (B, F).
        targets: prefix of each momentum copy -> prefix of its online net; names below both are equal.
        target_mode: what rounds.target=auto means for it.
    """

    phases: Mapping[str, float] = {"pretrain": 1.0}
    needs: Mapping[str, str] = {}
    claims: Mapping[str, Claim]
    labelled: bool = False
    findings: bool = False
    segments: bool = False
    views: int = 2
    masked_only: bool = False
    by_patient: bool = False
    separable: bool = False
    alone: bool = False
    encoder: nn.Module
    targets: ClassVar[Mapping[str, str]] = {}
    target_mode: ClassVar[str] = "average"

    def __init__(self) -> None:
        super().__init__()
        self.frozen: tuple[str, ...] = ()

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Loss of augmented views, each (B, C, *S), at `progress` in [0, 1] of the whole schedule.

        Returns scalars by name: "total" carries the gradient, all others are detached terms and monitors.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(views, progress, labels).")

    def check_labels(self, labels: Tensor) -> None:
        """Look at all labels that a site will train on, once: in a step, the host would wait for the device.

        Raises:
            ConfigError: labels that the method was not made for.
        """

    def enter(self, phase: str) -> None:
        """From here on `forward` and `trainable` are those of this phase."""

    def start_phase(self, phase: str) -> None:
        """Change the global weights once, on the server, before the first round of a phase."""

    def holdings(self, images: Tensor, masks: Tensor | None) -> dict[str, int]:
        """Owner group of `claims` -> how many of a site's training images (N, C, *S) can teach it; 0 is left out."""
        del images, masks
        return {}

    def rate(self, name: str) -> float:
        """Factor of the learning rate of a parameter, in this phase."""
        del name
        return 1.0

    def isolate(self) -> None:
        """From here on a batch learns from itself alone, as differential privacy needs it.

        Codebooks stand still, nothing enters a queue, and views pass through the network one by one.

        Raises:
            ConfigError: a batch norm, which mixes images.
        """
        if mixing := [name for name, module in self.named_modules() if isinstance(module, _BatchNorm)]:
            raise ConfigError(
                f"privacy: '{mixing[0]}' is a batch norm, which mixes patients. Give the network another norm, or take "
                "privacy=none."
            )
        for module in self.modules():
            if "inplace" in vars(module):
                vars(module)["inplace"] = False  # an image's own gradient is read from what would be written over
        self.alone = True
        self.frozen = (*self.frozen, *self.codebooks())

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step: moving averages, queues."""

    def remarks(self, means: Mapping[str, float]) -> list[str]:
        """What a study lead should know of a round, from its mean terms and monitors; nothing by default."""
        del means
        return []

    def alarm(self, means: Mapping[str, float]) -> str:
        """Why training has collapsed, from a round's mean terms and monitors; empty where it has not."""
        del means
        return ""

    def codebooks(self) -> dict[str, Quantizer]:
        """The quantizers by name, claimed as CODEBOOK."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Quantizer)}

    def queues(self) -> dict[str, Queue]:
        """The queues of keys by name, claimed as QUEUE: they never leave a site."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Queue)}

    def enqueue(self, view: Tensor, patients: Tensor) -> None:
        """Put keys of one view (B, C, *S) into the queues, without gradient; nothing where there is none."""

    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F), without gradient, after every batch norm of the method has seen `images`.

        Used by the refresh pass, together with `Moments`. Labelled methods, and those whose `forward` changes
        state of its own, override it.
        """
        with torch.no_grad():
            self.forward([images] * self.views, progress)
            features: Tensor = self.encoder(images)
        return features

    def claim_of(self, name: str) -> Claim:
        """The claim on a tensor of `state_dict()`.

        Inside a trained component the running moments of batch norm become NORM_MOMENTS; its counter is LOCAL
        everywhere but in a frozen module, because integer counters are never aggregated.

        Raises:
            ValueError: no prefix claims it.
        """
        prefixes = [prefix for prefix in self.claims if f"{name}.".startswith(f"{prefix}.")]
        if not prefixes:
            raise ValueError(
                f"{type(self).__name__}: tensor {name!r} is claimed by no prefix of `claims` "
                f"({', '.join(self.claims)}). Add its component with a Role."
            )
        claim = self.claims[max(prefixes, key=len)]
        module, _, leaf = name.rpartition(".")
        if claim.role is Role.FIXED or not isinstance(self.get_submodule(module), _BatchNorm):
            return claim
        if leaf == "num_batches_tracked":
            return Claim(Role.LOCAL, claim.owner)
        moments = leaf in ("running_mean", "running_var") and claim.role is Role.PARAMETER
        return Claim(Role.NORM_MOMENTS, claim.owner) if moments else claim

    def roles(self) -> dict[str, Claim]:
        """The claim on every tensor of `state_dict()`, in its order."""
        return {name: self.claim_of(name) for name in self.state_dict()}

    def tensors(self, role: Role) -> dict[str, Tensor]:
        """The tensors of one role by name; they share memory with the method."""
        return {name: tensor for name, tensor in self.state_dict().items() if self.claim_of(name).role is role}

    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def freeze(self, *modules: str) -> None:
        """Fix submodules for good, as the study's seed made them: role FIXED. Needs `claims`."""
        self._still(Claim(Role.FIXED), modules)

    def keep_as_given(self, *modules: str) -> None:
        """Leave submodules as a broadcast brings them; they are never sent back. Needs `claims`."""
        self._still(Claim(Role.PARAMETER, GIVEN), modules)

    def _still(self, claim: Claim, modules: tuple[str, ...]) -> None:
        """No gradient, batch norm in eval mode."""
        self.claims = {**self.claims, **dict.fromkeys(modules, claim)}
        self.frozen = (*self.frozen, *modules)
        for module in modules:
            self.get_submodule(module).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Method":
        """Training or evaluation mode; frozen submodules stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            self.get_submodule(module).eval()
        return self


def balanced_probabilities(labels: Tensor) -> Tensor:
    """Sampling probabilities (N,) in float64 that give every present class the same mass (MedCSS, eq. 2).

    Args:
        labels: (N,) integers; negative means unknown and is never drawn.

    Raises:
        ValueError: no label is known.
    """
    known = labels >= 0
    if not bool(known.any()):
        raise ValueError(f"balanced_probabilities: none of {len(labels)} labels is known, need at least one >= 0.")
    classes, inverse, counts = torch.unique(labels[known], return_inverse=True, return_counts=True)
    probabilities = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    probabilities[known] = 1 / (len(classes) * counts.double())[inverse]
    return probabilities


def full_precision(loss: Callable[P, R]) -> Callable[P, R]:
    """Run a loss outside autocast, with half-precision arguments as float32 (float64 stays)."""

    @functools.wraps(loss)
    def widened(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value.device.type for value in args if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            wide: Any = [_widen(value) for value in args]
            return loss(*wide, **kwargs)

    return widened


def _widen(value: object) -> object:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half and isinstance(value, Tensor) else value
