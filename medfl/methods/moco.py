"""MoCo: tell the other view's key from a queue of earlier keys (He et al., arXiv:1911.05722; v2: arXiv:2003.04297)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from medfl.errors import ConfigError
from medfl.methods.base import Claim, Method, Role
from medfl.methods.byol import follow, spread, target_of
from medfl.methods.contrast import info_nce, pairwise_cosine, unit
from medfl.methods.simclr import positive
from medfl.models.cross_scale import head_of
from medfl.models.encoders import ResNet
from medfl.models.layers import pooled
from medfl.models.queue import Queue

MOST_TOKENS = 512  # channels of an attention head by default: at 2048 it would be larger than the encoder
LARGEST_COSINE = 0.95  # mean over pairs; above it the images are hardly told apart
COLLAPSED_COSINE = 0.9975  # a spread of 0.05


class MoCo(Method):
    """InfoNCE of a query against a key of the other view and the keys of earlier batches, other patients only.

    Keys come from a copy of encoder and head that follows them as a moving average. The queue is local to a site.
    A new key enters the queue after the optimizer step, so it is no negative of its own batch.

    Args:
        encoder: gives maps, of which the last is read.
        head: mlp | self_attention | cstp (`head_of`).
        tokens: channels inside the head; null: the encoder's width, at most 512 with attention.
        heads: of the attention.
        width: D, of queries and keys; null: the encoder's width.
        capacity: most keys in the queue.
        temperature: τ > 0.
        momentum: m of the key network's average, constant, in [0, 1]; 0: the key network is the query's.
        split: sub-batches, every split-th image, whose batch norm statistics the keys get; at least 1. With the
            query's own statistics a key would be found by them (the paper shuffles keys over devices). A small
            batch is split less: two images each.

    Raises:
        ConfigError: a value outside of the above.
    """

    targets: ClassVar[Mapping[str, str]] = {"key_encoder": "encoder", "key_head": "head"}
    target_mode: ClassVar[str] = "shift"
    by_patient = True
    encoder: ResNet

    def __init__(
        self,
        *,
        encoder: ResNet,
        head: str,
        tokens: int | None,
        heads: int,
        width: int | None,
        capacity: int,
        temperature: float,
        momentum: float,
        split: int,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ConfigError(f"method.momentum: got {momentum}, need a number in [0, 1].")
        if split < 1:
            raise ConfigError(f"method.split: got {split}, need at least 1, the whole batch.")
        width = width or encoder.width
        self.encoder, self.head = encoder, head_for(encoder, head, tokens=tokens, width=width, heads=heads)
        self.key_encoder, self.key_head = target_of(encoder), target_of(self.head)
        self.constant_attention = constant(head, encoder.map_sides[3])
        self.queue = Queue(capacity, width)
        self.temperature, self.momentum, self.split = positive("method.temperature", temperature), momentum, split
        self._seen: list[tuple[Tensor, Tensor | None]] = []  # keys and patients of the training forwards of a step
        roles = {"encoder": Role.PARAMETER, "head": Role.PARAMETER, "queue": Role.QUEUE}
        self.claims = {part: Claim(role) for part, role in (roles | dict.fromkeys(self.targets, Role.TARGET)).items()}

    def forward(
        self, views: list[Tensor], progress: float, labels: Tensor | None = None, patients: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Term "nce" of the query views[0] and the key views[1], and monitors of the queries and the queue.

        Monitors: "cosine", the mean over pairs of queries; "std" as in BYOL; "queue_filled" and "queue_stale".
        """
        del progress, labels  # the momentum is constant; nothing is supervised
        refuse_views(views, self.views)
        rows = self.head(self.encoder.maps(views[0])[3])
        nce = info_nce(unit(rows), *self.contrasted(views[1], patients), temperature=self.temperature)
        told = {"nce": nce, **spread_of(rows), **self.queue.monitors()}
        return {"total": nce, **{name: value.detach() for name, value in told.items()}}

    def contrasted(self, view: Tensor, patients: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys (B, D) of a view, the queue before they enter it (N, D), and what of it is hidden from each image.

        Where a batch is alone, the keys of its other patients take the queue's place.
        """
        keys = self.keys_of(view)
        if self.alone:
            own = torch.arange(len(keys), device=keys.device) if patients is None else patients
            return keys, keys, own[:, None] == own[None]
        if self.training and torch.is_grad_enabled():
            self._seen.append((keys, patients))
        return keys, self.queue.snapshot(), self.queue.hidden(patients)

    @torch.no_grad()
    def keys_of(self, view: Tensor) -> Tensor:
        """Unit keys (B, D) of a view (B, C, *S), without gradient."""
        parts = max(1, min(self.split, len(view) // 2))
        found = [unit(self.key_head(self.key_encoder.maps(view[part::parts])[3])) for part in range(parts)]
        keys = found[0].new_empty(len(view), found[0].shape[1])
        for part, rows in enumerate(found):
            keys[part::parts] = rows
        return keys

    def enqueue(self, view: Tensor, patients: Tensor) -> None:
        """Put the keys of one view (B, C, *S) of patients (B,) into the queue."""
        self.queue.push(self.keys_of(view), patients)

    def after_step(self, progress: float) -> None:
        """Enqueue the keys of the step's training forwards, then move the key network towards the query's."""
        del progress
        for keys, patients in self._seen:
            self.queue.push(keys, patients)
        self._seen.clear()
        for target, online in self.targets.items():
            follow(self.get_submodule(target), self.get_submodule(online), momentum=self.momentum)

    @torch.no_grad()
    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) of un-augmented images through encoder and head; neither keys nor queue are touched."""
        del progress
        maps = self.encoder.maps(images)[3]
        self.head(maps)
        return pooled(maps)

    def remarks(self, means: Mapping[str, float]) -> list[str]:
        """Says so where the queries of a round nearly point one way, and where an attention has nothing to choose."""
        return [*narrow(means), *self.constant_attention]

    def alarm(self, means: Mapping[str, float]) -> str:
        """Collapse of the queries to one direction."""
        return collapsed(means)


def head_for(encoder: ResNet, kind: str, *, tokens: int | None, width: int, heads: int) -> nn.Module:
    """A head on the last map of `encoder`; `tokens` null is its width, at most 512 with attention.

    Raises:
        ConfigError: an attention head on a map of one cell, or as `head_of`.
    """
    if kind != "mlp" and encoder.map_sides[3] < 2:
        raise ConfigError(
            f"method.head={kind}: the last map of the encoder has one cell per axis, over which the attention is "
            "constant. Use a larger data.size, an encoder.stem with a smaller stride, or method.head=mlp."
        )
    tokens = tokens or (encoder.width if kind == "mlp" else min(encoder.width, MOST_TOKENS))
    dims = encoder.describe()["spatial_dims"]
    return head_of(kind, inputs=encoder.width, tokens=tokens, width=width, dims=dims, heads=heads)


def constant(kind: str, side: int) -> list[str]:
    """A remark where the cross-scale attention has one source: half of a side of two cells is one."""
    if kind != "cstp" or side > 2:
        return []
    return [
        f"method.head=cstp: the last map of the encoder has {side} cells per axis, halved to one source, so that its "
        "attention is constant. Take an encoder.stem with a smaller stride (small or none) or a larger data.size."
    ]


def spread_of(rows: Tensor) -> dict[str, Tensor]:
    """Monitors of embeddings (B, D): "cosine" and "std"."""
    rows = rows.detach()
    return {"cosine": pairwise_cosine(rows), "std": spread(rows)}


def narrow(means: Mapping[str, float]) -> list[str]:
    """A remark where the embeddings of a round nearly point one way."""
    if not (cosine := means.get("cosine", 0.0)) > LARGEST_COSINE:
        return []
    return [
        f"the embeddings hardly tell images apart: mean cosine of two images {cosine:.3f}, where 1 is one direction "
        f"and at most {LARGEST_COSINE} is expected. Lower training.optimizer.lr, or raise training.batch_size."
    ]


def collapsed(means: Mapping[str, float]) -> str:
    """Why training has collapsed; empty where it has not."""
    if not (cosine := means.get("cosine", 0.0)) > COLLAPSED_COSINE:
        return ""
    return f"the embeddings are one direction (mean cosine of two images {cosine:.4f}, above {COLLAPSED_COSINE})."


def refuse_views(views: list[Tensor], count: int) -> None:
    """ValueError for another number of views, or views of unequal shape."""
    shapes = [tuple(view.shape) for view in views]
    if len(shapes) != count or len(set(shapes)) != 1:
        raise ValueError(f"got views of shapes {shapes}, need {count} of equal shape.")
