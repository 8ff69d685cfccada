"""BYOL: predict a momentum copy's embedding of the other view (Grill et al., arXiv:2006.07733).

Its parts are also the representation branch and the continuous target of DiSSECT.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from medfl.errors import ConfigError
from medfl.methods.base import Claim, Method, Role, full_precision
from medfl.methods.simclr import stacked
from medfl.models.encoders import ResNet
from medfl.models.heads import MLP
from medfl.models.layers import pooled

LEAST_STD = 0.2  # of the predictions; below it the images are hardly told apart
COLLAPSED_STD = 0.05  # measured: 0.03 to 0.04 in collapsed runs, 0.07 and more in those that still learnt

M = TypeVar("M", bound=nn.Module)


class BYOL(Method):
    """Regression of the target's embeddings, crosswise between the views; no negatives.

    The target network is a copy of encoder and projector that follows them as a moving average. Each network sees
    both views in one forward, so its batch norms take both views together.

    Args:
        encoder: gives h (B, F).
        hidden, width, norm: of projector and predictor. Norm: batch | layer | none.
        momentum: m of the target's average at the start, in [0, 1]; 0: the target is the online network.

    Raises:
        ConfigError: a momentum outside of [0, 1].
    """

    targets: ClassVar[Mapping[str, str]] = {"target_encoder": "encoder", "target_projector": "projector"}
    separable = True
    encoder: ResNet

    def __init__(self, *, encoder: ResNet, hidden: int, width: int, norm: str, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ConfigError(f"method.momentum: got {momentum}, need a number in [0, 1].")
        self.encoder, self.momentum = encoder, momentum
        self.projector = MLP(widths=[encoder.width, hidden, width], norm=norm)
        self.predictor = MLP(widths=[width, hidden, width], norm=norm)
        self.target_encoder, self.target_projector = target_of(encoder), target_of(self.projector)
        trained = {name: Claim(Role.PARAMETER) for name in ("encoder", "projector", "predictor")}
        self.claims = trained | {name: Claim(Role.TARGET) for name in self.targets}

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Term "continuous" in [0, 4], and monitor "std" of the predictions: 1 isotropic, 0 collapsed."""
        del progress, labels  # the momentum is scheduled in after_step; nothing is supervised
        images = stacked(views)
        p, (z, _) = self.of_views(views, self.predictions), self.target_branch(images)
        total = regression(p, other_view(z))
        return {"total": total, "continuous": total.detach(), "std": spread(p.detach())}

    def of_views(self, views: list[Tensor], net: Callable[[Tensor], Tensor]) -> Tensor:
        """`net` of both views, rows (2B, E): one forward, or where images must not share one with themselves, two."""
        return torch.cat([net(view) for view in views]) if self.alone else net(torch.cat(views))

    def predictions(self, images: Tensor) -> Tensor:
        """p (B, E) of the online network."""
        found: Tensor = self.predictor(self.projector(self.encoder(images)))
        return found

    @torch.no_grad()
    def target_branch(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """z (B, E) of the target network, and the maps of layer1..layer4 of its encoder; no gradient."""
        maps = self.target_encoder.maps(images)
        return self.target_projector(pooled(maps[3])), maps

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the target network towards the online one."""
        share = momentum_at(progress, start=self.momentum)
        for target, online in self.targets.items():
            follow(self.get_submodule(target), self.get_submodule(online), momentum=share)

    def remarks(self, means: Mapping[str, float]) -> list[str]:
        """Says so where the predictions of a round were hardly spread."""
        if not (std := means.get("std", 1.0)) < LEAST_STD:
            return []
        return [
            f"the predictions hardly tell images apart: std {std:.2f}, where 1 is isotropic, 0 one point and at least "
            f"{LEAST_STD} is expected. Lower training.optimizer.lr, or raise training.batch_size."
        ]

    def alarm(self, means: Mapping[str, float]) -> str:
        """Collapse of the predictions to one point."""
        std = means.get("std", 1.0)
        return f"the predictions are one point (std {std:.3f}, below {COLLAPSED_STD})." if std < COLLAPSED_STD else ""

    @torch.no_grad()
    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) of un-augmented images through the online network; with batch norm B >= 2."""
        del progress
        features: Tensor = self.encoder(images)
        self.predictor(self.projector(features))
        return features


def target_of(online: M) -> M:
    """A copy that no optimizer steps, whose batch norms keep no running statistics."""
    return batch_statistics(copy.deepcopy(online).requires_grad_(False))


def batch_statistics(module: M) -> M:
    """Make every batch norm in it normalise by the batch, in evaluation mode too, and hold no buffers."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return module


def momentum_at(progress: float, *, start: float) -> float:
    """m(p) = 1 - (1 - m₀)(cos(πp) + 1) / 2: from m₀ to exactly 1 at the end; m₀ = 0 stays 0, no momentum.

    Args:
        progress: p, position in the whole schedule, in [0, 1].
        start: m₀.
    """
    return 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2 if start > 0 else 0.0


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, *, momentum: float) -> None:
    """ξ <- m ξ + (1 - m) θ for every parameter."""
    for own, new in zip(target.parameters(), online.parameters(), strict=True):
        own.lerp_(new, 1 - momentum)


@full_precision
def regression(p: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of 2 - 2 cos(p, target), in [0, 4] (DiSSECT, eq. 7); both (B, E), of any length."""
    return (2 - 2 * F.cosine_similarity(p, target)).mean()


def other_view(rows: Tensor) -> Tensor:
    """Rows (2B, E) of two stacked views, with the views swapped."""
    return rows.roll(len(rows) // 2, dims=0)


@full_precision
def spread(rows: Tensor) -> Tensor:
    """sqrt(E) times the mean deviation per dimension of the rows (B, E) at unit length: 1 isotropic, 0 one point."""
    return math.sqrt(rows.shape[1]) * F.normalize(rows).std(0, correction=0).mean()
