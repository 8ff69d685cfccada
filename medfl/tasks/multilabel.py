"""Classification into any number of findings: a linear head on the representation with one output for each."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.errors import ConfigError
from medfl.methods.base import Claim, Method, Role, full_precision


class MultiLabel(Method):
    """An encoder and a linear head; the head starts at zero, so that every arm starts with equal probabilities.

    Rare findings are not weighted: the scores are of the order of the probabilities, and sites would weigh differently.

    Args:
        encoder: (B, C, *S) -> (B, F), with its `width` F.
        outputs: L, one for each finding.
        freeze: the encoder stays as the broadcast brings it.

    Raises:
        ConfigError: no finding.
    """

    labelled = True
    findings = True
    views = 1
    separable = True

    def __init__(self, *, encoder: nn.Module, outputs: int | None, freeze: bool) -> None:
        super().__init__()
        if not outputs:
            raise ConfigError(
                f"task.outputs: got {outputs}, need at least one finding. Name their columns in data.labels, or take "
                "task=classification."
            )
        width: Any = encoder.width
        self.encoder, self.head = encoder, nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.claims = {name: Claim(Role.PARAMETER) for name in ("encoder", "head")}
        if freeze:
            self.keep_as_given("encoder")

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Term "supervised" of one view (B, C, *S) with labels (B, L): 1, 0, or -1 where not known.

        Raises:
            ValueError: no labels.
        """
        del progress
        if labels is None:
            raise ValueError("MultiLabel: got no labels, need a row of findings for each image.")
        loss = known_bce(self.classify(views[0]), labels, each=self.alone)
        return {"total": loss, "supervised": loss.detach()}

    def classify(self, images: Tensor) -> Tensor:
        """Logits (B, L)."""
        logits: Tensor = self.head(self.encoder(images))
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """Of each finding's presence, (B, L)."""
        return self.classify(images).float().sigmoid()

    @torch.no_grad()
    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) of plain images."""
        del progress
        features: Tensor = self.encoder(images)
        return features


@full_precision
def known_bce(logits: Tensor, labels: Tensor, *, each: bool = False) -> Tensor:
    """Mean binary cross-entropy of logits (B, L) over the known entries of labels (B, L); 0 where none is known.

    Args:
        each: every image counts the same, however many of its entries are known.
    """
    known = (labels >= 0).to(logits.dtype)
    found = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).to(logits.dtype), reduction="none") * known
    if each:
        return (found.sum(1) / known.sum(1).clamp_min(1)).mean()
    return found.sum() / known.sum().clamp_min(1)
