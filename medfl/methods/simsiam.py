"""SimSiam: predict the other view, without momentum network and negatives (Chen and He, arXiv:2011.10566)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medfl.errors import ConfigError, one_of
from medfl.methods.base import Claim, Method, Role
from medfl.methods.contrast import crosswise, standardized
from medfl.methods.moco import collapsed, head_for, narrow, spread_of
from medfl.methods.simclr import stacked
from medfl.models.encoders import ResNet
from medfl.models.heads import MLP
from medfl.models.layers import pooled

NARROWER = 4  # bottleneck of the predictor, as in the paper: 512 of 2048


class SimSiam(Method):
    """The local stream of DCL alone. Both views pass through the network together, as one batch.

    With a projector, the published method: three layers with batch norm, of which the last has no scale and shift,
    and a predictor with one narrow hidden layer. Without, the head predicts the encoder's pooled features,
    standardised per channel over the batch, and the method is DCL(use_global=False, beta=1) bit for bit.

    Args:
        encoder: gives maps, of which the last is read.
        head: kind of the predictor: mlp | self_attention | cstp on the map (`head_of`); with a projector only mlp.
        projector: mlp | none.
        hidden: of the projector; null: `width`.
        width: of the embedding; null: the encoder's width, the only one without a projector.
        tokens: channels inside the predictor; null: with a projector a quarter of `width`, else as in MoCo.
        heads: of the attention.

    Raises:
        ConfigError: switches outside of the above or against each other.
    """

    encoder: ResNet

    def __init__(
        self,
        *,
        encoder: ResNet,
        head: str,
        projector: str,
        hidden: int | None,
        width: int | None,
        tokens: int | None,
        heads: int,
    ) -> None:
        super().__init__()
        _refuse(encoder, head, projector, width)
        self.encoder, wide = encoder, width or encoder.width
        self.projector: nn.Module | None = None
        if projector == "mlp":
            inside = hidden or wide
            self.projector = MLP(widths=[encoder.width, inside, inside, wide], norm="batch")
            self.head: nn.Module = MLP(widths=[wide, tokens or max(wide // NARROWER, 1), wide], norm="batch")
        else:
            self.head = head_for(encoder, head, tokens=tokens, width=wide, heads=heads)
        self.claims = {part: Claim(Role.PARAMETER) for part, _ in self.named_children()}

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Term "local" in [-1, 1], and monitors of one view's predictions: "cosine" over pairs, "std" as in BYOL."""
        del progress, labels  # nothing is scheduled, nothing is supervised
        maps = self.encoder.maps(stacked(views))[3]
        predicted, target = self._predicted(maps)
        local = crosswise(*predicted.chunk(2), *target.chunk(2))
        told = {"local": local, **spread_of(predicted[: len(views[0])])}
        return {"total": local, **{name: value.detach() for name, value in told.items()}}

    @torch.no_grad()
    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) of un-augmented images through the whole network; with batch norm B >= 2."""
        del progress
        maps = self.encoder.maps(images)[3]
        self._predicted(maps)
        return pooled(maps)

    def remarks(self, means: Mapping[str, float]) -> list[str]:
        """Says so where the predictions of a round nearly point one way."""
        return narrow(means)

    def alarm(self, means: Mapping[str, float]) -> str:
        """Collapse of the predictions to one direction."""
        return collapsed(means)

    def _predicted(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and targets (B, D) of maps (B, F, *S)."""
        if self.projector is None:
            return self.head(maps), standardized(pooled(maps))
        target = standardized(self.projector(pooled(maps)))
        return self.head(target), target


def _refuse(encoder: ResNet, head: str, projector: str, width: int | None) -> None:
    """ConfigError for parts that do not exist or do not fit."""
    one_of("method.projector", projector, ("none", "mlp"))
    if projector == "mlp" and head != "mlp":
        raise ConfigError(
            f"method.head={head} reads a map, and method.projector=mlp leaves none. "
            "Set method.projector=none, or method.head=mlp."
        )
    if projector == "none" and width not in (None, encoder.width):
        raise ConfigError(
            f"method.projector=none predicts the encoder's features, {encoder.width} wide: got method.width={width}. "
            "Set method.width=null, or method.projector=mlp."
        )
