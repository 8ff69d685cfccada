"""Segmentation: a U-Net decoder on the encoder's maps."""

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.data.sample import labelled
from medfl.errors import ConfigError, one_of
from medfl.methods.base import Claim, Method, Role, full_precision
from medfl.models.blocks import taken
from medfl.models.decoder import Decoder, pyramid
from medfl.models.encoders import ResNet
from medfl.models.layers import pooled


class Segmentation(Method):
    """An encoder and a decoder, trained with label maps; what an image lacks a mask for is not learned from.

    Args:
        encoder: any `ResNet`.
        labels: K, with the background.
        loss: dice_ce | iou_bce, see there.
        freeze: the encoder stays as the broadcast brings it.

    Raises:
        ConfigError: fewer than two labels, or another loss.
    """

    segments = True
    masked_only = True
    views = 1
    separable = True
    encoder: ResNet

    def __init__(self, *, encoder: ResNet, labels: int | None, loss: str, freeze: bool) -> None:
        super().__init__()
        one_of("task.loss", loss, tuple(LOSSES))
        if labels is None or labels < 2:
            raise ConfigError(
                f"task.labels: got {labels}, need at least 2, the background's too. Do the data have masks?"
            )
        self.encoder, self.labels, self.loss = encoder, labels, LOSSES[loss]
        self.decoder = Decoder(encoder, labels=labels)
        self.claims = {name: Claim(Role.PARAMETER) for name in ("encoder", "decoder")}
        if freeze:
            self.keep_as_given("encoder")

    def forward(
        self, views: list[Tensor], progress: float, labels: Tensor | None = None, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The sum of the loss's terms over the images with a known mask, and the terms; 0 without such an image.

        Args:
            views: one of them, (B, C, *S).
            masks: (B, *S) uint8 below K, or 255 in an image that is not labelled.

        Raises:
            ValueError: no masks.
        """
        del progress, labels  # nothing is scheduled; classes of images are not read
        if masks is None:
            raise ValueError("Segmentation: got no masks, need one for each image.")
        rows = labelled(masks).nonzero().flatten()
        if not len(rows):
            return {"total": torch.zeros((), device=masks.device)}
        terms = self.loss(self.segment(taken(views[0], rows)), taken(masks, rows))
        total = torch.stack(list(terms.values())).sum()
        return {"total": total, **{name: value.detach() for name, value in terms.items()}}

    def segment(self, images: Tensor) -> Tensor:
        """Logits (B, K, *S) of images (B, C, *S); the largest is the label."""
        logits: Tensor = self.decoder(pyramid(self.encoder, images))
        return logits

    def holdings(self, images: Tensor, masks: Tensor | None) -> dict[str, int]:
        """Nothing is owned by some sites alone.

        Raises:
            ConfigError: a mask with a label that the logits lack.
        """
        del images
        known = masks[labelled(masks)] if masks is not None else torch.empty(0)
        most = int(known.max()) if len(known) else 0
        if most >= self.labels:
            raise ConfigError(
                f"task.labels: got {self.labels}, but there are masks with label {most}: need {most + 1}."
            )
        return {}

    @torch.no_grad()
    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) of plain images, which the decoder sees too."""
        del progress
        maps = pyramid(self.encoder, images)
        self.decoder(maps)
        return pooled(maps[-1])


@full_precision
def dice_ce(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, and 1 - Dice of the softmax: the mean over images and all labels but the background.

    Args:
        logits: (B, K, *S).
        masks: (B, *S) integers in [0, K).
    """
    from monai.losses.dice import DiceLoss

    truth = masks.long()
    dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True)(logits, truth[:, None])
    return {"cross_entropy": F.cross_entropy(logits, truth), "dice": dice}


@full_precision
def iou_bce(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Binary cross-entropy of every label against the others, and 1 - IoU of the sigmoids, as `dice_ce`."""
    from monai.losses.dice import DiceLoss

    truth = F.one_hot(masks.long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    iou = DiceLoss(include_background=False, sigmoid=True, jaccard=True)(logits, truth)
    return {"binary_cross_entropy": F.binary_cross_entropy_with_logits(logits, truth), "iou": iou}


LOSSES = {"dice_ce": dice_ce, "iou_bce": iou_bce}
