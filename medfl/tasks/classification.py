"""Classification: a linear head on the representation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.errors import ConfigError, one_of
from medfl.methods.base import Claim, Method, Role, full_precision


class Classification(Method):
    """An encoder and a linear head; the head starts at zero, so that every arm starts with equal probabilities.

    Batches are class-balanced (MedCSS, eq. 2), so the loss is not weighted by class.

    Args:
        encoder: (B, C, *S) -> (B, F), with its `width` F.
        classes: K.
        loss: cross_entropy | one_vs_rest (binary cross-entropy of each class against the others, summed over them).
        freeze: the encoder stays as the broadcast brings it.

    Raises:
        ConfigError: fewer than two classes, or another loss.
    """

    labelled = True
    views = 1
    separable = True

    def __init__(self, *, encoder: nn.Module, classes: int | None, loss: str, freeze: bool) -> None:
        super().__init__()
        one_of("task.loss", loss, ("cross_entropy", "one_vs_rest"))
        if classes is None or classes < 2:
            raise ConfigError(f"task.classes: got {classes}, need at least 2. Does the data set have labels?")
        width: Any = encoder.width
        self.encoder, self.loss = encoder, loss
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.claims = {name: Claim(Role.PARAMETER) for name in ("encoder", "head")}
        if freeze:
            self.keep_as_given("encoder")

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Terms "supervised" and "accuracy" of one view (B, C, *S) with labels (B,) int64 in 0..K-1.

        Raises:
            ValueError: no labels.
        """
        del progress
        if labels is None:
            raise ValueError("Classification: got no labels, need one for each image.")
        logits = self.classify(views[0])
        loss = supervised(logits, labels, kind=self.loss)
        right = (logits.detach().argmax(1) == labels).float().mean()
        return {"total": loss, "supervised": loss.detach(), "accuracy": right}

    def classify(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.head(self.encoder(images))
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, K), with rows that sum to 1; of one_vs_rest the classes' own probabilities over their sum."""
        logits = self.classify(images).float()
        if self.loss == "cross_entropy":
            return logits.softmax(1)
        return F.logsigmoid(logits).softmax(1)

    @torch.no_grad()
    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) of plain images."""
        del progress
        features: Tensor = self.encoder(images)
        return features


@full_precision
def supervised(logits: Tensor, labels: Tensor, *, kind: str) -> Tensor:
    """Cross-entropy of logits (B, K), or the sum over classes of each one's binary cross-entropy; mean over B."""
    if kind == "cross_entropy":
        return F.cross_entropy(logits, labels)
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
