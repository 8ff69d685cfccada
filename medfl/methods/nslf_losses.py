"""The losses of NSLF's three phases as pure functions. Values are in [0, 1]; `held` (B, M) says who has what."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.methods.base import full_precision
from medfl.models.similarity import local_correlation, ssim_by_channel

SMOOTH = 0.01  # of the Dice loss


@full_precision
def distances(made: Tensor, images: Tensor, *, norm: str) -> Tensor:
    """Length of made - x_m for every modality, (B, M), of made (B, 1, *S) and images (B, M, *S).

    Args:
        norm: rmse (over √N of N voxels) | code (over N, as the authors' code has it: 1/√N of it).
    """
    voxels = images.shape[2:].numel()
    lengths = torch.linalg.vector_norm((images - made).flatten(2), dim=2)
    scaled: Tensor = lengths / (voxels if norm == "code" else math.sqrt(voxels))
    return scaled


@full_precision
def reconstruction_distances(
    made: Tensor, images: Tensor, held: Tensor, *, place: int, others: bool, norm: str
) -> tuple[Tensor, Tensor]:
    """Distance of a modality's reconstruction from its own image and, in the mean, from the patient's other ones.

    As lengths, not squares: then for a weight of at most 1 of the second the exact reconstruction minimises
    first - weight * second (triangle inequality); with squares the loss is linear in the reconstruction at weight 1.

    Args:
        made: reconstructions (B, 1, *S) of modality `place`.
        others: compute the second; else zeros.

    Returns:
        Both (B,); the second is 0 where there are no other modalities.
    """
    if not others:
        own = distances(made, images[:, place : place + 1], norm=norm)[:, 0]
        return own, torch.zeros_like(own)
    lengths = distances(made, images, norm=norm)
    rest = held.to(lengths.dtype)
    rest = torch.cat([rest[:, :place], torch.zeros_like(rest[:, :1]), rest[:, place + 1 :]], dim=1)
    return lengths[:, place], (lengths * rest).sum(1) / rest.sum(1).clamp_min(1)


@full_precision
def fusion_terms(fused: Tensor, images: Tensor, held: Tensor, *, norm: str) -> dict[str, Tensor]:
    """Fidelity (distance to each source), intensity (to their voxel-wise maximum) and 1 - SSIM, means over images.

    Args:
        fused: (B, 1, *S).
        images: (B, M, *S), every image with at least one modality; a missing one is 0, so no maximum.
    """
    return {
        "fidelity": over_modalities(distances(fused, images, norm=norm), held),
        "intensity": distances(fused, images.amax(1, keepdim=True), norm=norm).mean(),
        "ssim": 1 - over_modalities(ssim_by_channel(fused, images, span=1.0), held),
    }


@full_precision
def correlation_loss(warped: Tensor, images: Tensor, held: Tensor) -> Tensor:
    """1 - mean local correlation of the moved fused image (B, 1, *S) with each source, inside of the head.

    Where everything is constant there is no correlation: the head is where any source is not 0.
    """
    head = images.ne(0).any(1, keepdim=True).to(warped.dtype)
    found = (local_correlation(warped, images) * head).flatten(2).sum(2) / head.flatten(2).sum(2).clamp_min(1)
    return 1 - over_modalities(found, held)


@full_precision
def smoothness(field: Tensor) -> Tensor:
    """Mean over axes of the mean squared derivative (length of a vector) of a field (B, d, *S), in voxels."""
    axes = range(2, field.dim())
    slopes = [field.diff(dim=axis).square().sum(1).mean() for axis in axes if field.shape[axis] > 1]
    return torch.stack(slopes).mean()


@full_precision
def segmentation_terms(logits: Tensor, masks: Tensor, *, class_weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted cross-entropy, and 1 - Dice with one sum over batch, voxels and all classes but the first.

    Args:
        logits: (B, K, *S).
        masks: (B, *S) integers in [0, K): every image labelled.
        class_weights: K of them.
    """
    truth = masks.long()
    shares = logits.softmax(dim=1)
    tumour = truth > 0
    hit = (shares.gather(1, truth[:, None])[:, 0] * tumour).sum()
    dice = 2 * hit / ((1 - shares[:, 0]).sum() + tumour.sum() + SMOOTH)
    weights = logits.new_tensor(class_weights)
    return {"cross_entropy": F.cross_entropy(logits, truth, weight=weights), "dice": 1 - dice}


def over_modalities(values: Tensor, held: Tensor) -> Tensor:
    """Mean over images of the mean over the modalities that each has, of values (B, M)."""
    shares = held.to(values.dtype)
    return ((values * shares).sum(1) / shares.sum(1).clamp_min(1)).mean()
