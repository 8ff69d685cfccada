"""The losses of MoCo, SimSiam and DCL-CsTP, and what tells that embeddings have collapsed."""

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.methods.base import full_precision

NEVER = -1e9  # a logit of probability 0; with -inf the divergence of two such entries would be NaN


@full_precision
def info_nce(q: Tensor, p: Tensor, negatives: Tensor, hidden: Tensor, *, temperature: float) -> Tensor:
    """L_NCE = -mean_b log( e^{q·p/τ} / (e^{q·p/τ} + Σ_j e^{q·n_j/τ}) ), van den Oord et al. 2018.

    Args:
        q, p: (B, D) unit rows, query and key of one image.
        negatives: (N, D) unit rows.
        hidden: (B, N) or (1, N) bool, what is no negative; where all are, the image has loss 0 and no gradient.
        temperature: τ.
    """
    positive = (q * p).sum(1, keepdim=True)
    others = (q @ negatives.T).masked_fill(hidden, float("-inf"))
    logits = torch.cat([positive, others], dim=1) / temperature  # (B, 1 + N)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


@full_precision
def symmetric_kl(q: Tensor, p: Tensor, negatives: Tensor, hidden: Tensor, *, temperature: float) -> Tensor:
    """L_KL = mean_b ½ Σ_j (P_bj - Q_bj)(log P_bj - log Q_bj), half the sum of both divergences; no gradient for p.

    P_bj and Q_bj are softmaxes over the negatives of p_b·n_j/τ and q_b·n_j/τ. Arguments as in `info_nce`.
    """
    log_p, log_q = (
        F.log_softmax((rows @ negatives.T / temperature).masked_fill(hidden, NEVER), dim=1) for rows in (p.detach(), q)
    )
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1).mean() / 2


@full_precision
def crosswise(q2: Tensor, q3: Tensor, t2: Tensor, t3: Tensor) -> Tensor:
    """-½ mean cos(q2, t3) - ½ mean cos(q3, t2), in [-1, 1]: each view predicts the other's target.

    Args:
        q2, q3: (B, D) predictions of two views, of any length.
        t2, t3: (B, D) their targets, which get no gradient.
    """
    first, second = F.cosine_similarity(q2, t3.detach()), F.cosine_similarity(q3, t2.detach())
    return -(first.mean() + second.mean()) / 2


@full_precision
def standardized(rows: Tensor) -> Tensor:
    """Rows (B, D) with mean 0 and variance 1 in each channel: batch norm without scale and shift."""
    variance, mean = torch.var_mean(rows, dim=0, correction=0)
    return (rows - mean) / (variance + 1e-5).sqrt()


@full_precision
def unit(rows: Tensor) -> Tensor:
    """Rows (B, D) at length 1."""
    return F.normalize(rows, dim=1)


@full_precision
def pairwise_cosine(rows: Tensor) -> Tensor:
    """Mean cosine over all pairs of different rows (B, D): 0 spread, 1 one direction; 0 for a single row."""
    units = F.normalize(rows, dim=1)
    of_pairs = units.sum(0).square().sum() - units.square().sum()
    return of_pairs / max(len(rows) * (len(rows) - 1), 1)
