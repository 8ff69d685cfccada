"""Can an attacker tell who was trained on: by the loss of a fine-tuned network, or by how alike views of an image are.

Encoders of contrastive learning keep views of an image that they were trained on closer together (EncoderMI, Liu et
al. 2021); a classifier has a smaller loss there (Yeom et al. 2018).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

VIEWS = 8
CHUNK = 128
FALSE = 0.01  # rate of false alarms at which the true ones are told


@dataclass(frozen=True)
class Inference:
    """How well members are told from others: AUC (0.5: not at all), and the share found at 1 % false alarms."""

    auc: float
    found: float
    members: int
    others: int


def inference(members: Tensor, others: Tensor) -> Inference:
    """
    Args:
        members, others: (n,) scores, larger where an image looks like a member.
    """
    truth = torch.cat([torch.ones(len(members)), torch.zeros(len(others))]).numpy()
    scores = torch.cat([members, others]).cpu().numpy()
    false, true, _ = roc_curve(truth, scores)
    return Inference(float(roc_auc_score(truth, scores)), float(true[false <= FALSE].max()), len(members), len(others))


@torch.no_grad()
def likeness(encoder: nn.Module, images: Tensor, views: Callable[..., list[Tensor]], *, key: int) -> Tensor:
    """(n,) mean cosine of the features of all pairs of `VIEWS` views of each image."""
    encoder.eval()
    found = []
    for place, part in enumerate(torch.split(images, CHUNK)):
        made = [views(part, key=key + 1000 * place + number, count=1)[0] for number in range(VIEWS)]
        units = torch.stack([F.normalize(encoder(view).float(), dim=1) for view in made], dim=1)  # (n, V, F)
        pairs = torch.einsum("nvf,nwf->n", units, units) - VIEWS
        found.append(pairs / (VIEWS * (VIEWS - 1)))
    return torch.cat(found)


@torch.no_grad()
def confidence(classify: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """(n,) minus the cross-entropy of each image's own class."""
    parts = zip(torch.split(images, CHUNK), torch.split(labels, CHUNK), strict=True)
    return torch.cat([-F.cross_entropy(classify(part).float(), truth, reduction="none") for part, truth in parts])
