"""The losses of MedCSS as pure functions: supervision, alignment (eqs. 6-7), coding rate (eqs. 8-10)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.errors import ConfigError
from medfl.methods.base import full_precision

BINS = 32


@full_precision
def supervised_loss(logits: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Binary cross-entropy of one logit for two classes, else cross-entropy (eq. 4).

    Args:
        logits: (B, 1) or (B, classes).
        labels: (B,) integers in [0, classes): see `check_labels`.
    """
    if classes == 2:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def check_labels(labels: Tensor, classes: int) -> None:
    """
    Raises:
        ConfigError: labels (N,) outside of [0, classes).
    """
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= classes:
        raise ConfigError(
            f"method.classes={classes}: got labels from {low} to {high}, need 0 to {classes - 1}. "
            "Set method.classes to the number of classes of the data."
        )


@full_precision
def alignment(h3: Tensor, h4: Tensor, *, estimator: str, temperature: float) -> Tensor:
    """Jensen-Shannon divergence in [0, ln 2] nats between mid and deep features, eqs. (6)-(7).

    Two sets of points have JS = ln 2 and no gradient: the paper's "empirical distributions" need a surrogate.
    sample: softmax over E of each row, JS by row, mean. marginal: softmax, mean over rows, one JS; never
    above sample. histogram: by dimension, soft histograms of the rows on shared bins, JS by dimension, mean.

    Args:
        h3, h4: (M, E).
        estimator: sample | marginal | histogram.
        temperature: of the softmax; histograms do not use it.
    """
    if estimator == "histogram":
        return jensen_shannon(*_log_histograms(h3, h4)).mean()
    log_p, log_q = F.log_softmax(h3 / temperature, dim=1), F.log_softmax(h4 / temperature, dim=1)
    if estimator == "marginal":
        log_p, log_q = (x.logsumexp(0, keepdim=True) - math.log(len(x)) for x in (log_p, log_q))
    return jensen_shannon(log_p, log_q).mean()


@full_precision
def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """JS divergence in nats over the last axis of log-probabilities, (..., E) -> (...)."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def _log_histograms(h3: Tensor, h4: Tensor) -> tuple[Tensor, Tensor]:
    """Log of soft histograms (E, BINS): Gaussian kernel of a bin's width, bins over the joint range, detached."""
    both = torch.cat([h3, h4]).detach()
    low, high = both.amin(0), both.amax(0)  # (E,)
    bin_width = ((high - low) / (BINS - 1)).clamp_min(1e-6)
    centres = low + bin_width * torch.arange(BINS, device=h3.device)[:, None]  # (BINS, E)

    def histogram(h: Tensor) -> Tensor:
        kernel = -((h[:, None] - centres) / bin_width).square() / 2  # (M, BINS, E)
        return F.log_softmax(kernel.logsumexp(0).T, dim=1)

    return histogram(h3), histogram(h4)


@full_precision
def entropies(h: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Entropy of the mean softmax and mean entropy of the softmaxes of (M, E), nats.

    Where both are equal, all rows have the same distribution and the alignment says nothing.
    """
    log_p = F.log_softmax(h / temperature, dim=1)
    log_mean = log_p.logsumexp(0) - math.log(len(h))
    return -(log_mean.exp() * log_mean).sum(), -(log_p.exp() * log_p).sum(1).mean()


@full_precision
def coding_rate(features: Tensor, *, alpha: float) -> Tensor:
    """R(F) = 1/2 logdet(I + α/M Fcᵀ Fc) in nats, Fc the centred rows (eqs. 8-9); computed in float64.

    The smaller of the two Gram matrices gives the same determinant (Sylvester). Non-finite features give NaN.

    Args:
        features: (M, d).
        alpha: α > 0.
    """
    m, d = features.shape
    centred = (features - features.mean(0)).double()
    gram = centred @ centred.T if m <= d else centred.T @ centred
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(identity + alpha / m * gram)  # no check: it would wait for the device
    rate: Tensor = factor.diagonal().log().sum()
    return rate.to(features.dtype)


def coding_rate_bound(rows: int, width: int, *, alpha: float) -> float:
    """The largest coding rate of (rows, width) features with rows of length at most 1."""
    rank = max(min(rows - 1, width), 1)
    return rank / 2 * math.log1p(alpha / rank)


def coding_rate_hinge(rate3: Tensor, rate4: Tensor, *, direction: str = "equation") -> Tensor:
    """Penalty between the rates of the mid and the deep features.

    equation: ReLU(R3 - R4), eq. (10) as printed: zero unless the deep features collapse below the mid ones.
    text: ReLU(R4 - R3), as sections 2.5 and 4.2-4.4 describe it; its zeros include collapse, so it needs a
    loss that spreads features.
    """
    return F.relu(rate3 - rate4 if direction == "equation" else rate4 - rate3)
