"""The equations of the methods as plain loops over Python floats: slow, obvious, independent of the tensor code."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Rows = Sequence[Sequence[float]]


def nt_xent(z: Tensor, *, temperature: float) -> float:
    """Chen et al. 2020, eq. (1), over all 2B anchors; row i and row i + B are a pair."""
    rows: Rows = z.double().tolist()
    n = len(rows)

    def similarity(a: Sequence[float], b: Sequence[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    total = 0.0
    for i in range(n):
        partner = (i + n // 2) % n
        others = sum(math.exp(similarity(rows[i], rows[k]) / temperature) for k in range(n) if k != i)
        total -= math.log(math.exp(similarity(rows[i], rows[partner]) / temperature) / others)
    return total / n


def softmax(row: Sequence[float], temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [power / sum(powers) for power in powers]


def jensen_shannon(p: Sequence[float], q: Sequence[float]) -> float:
    def divergence(a: Sequence[float], b: Sequence[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (divergence(p, middle) + divergence(q, middle)) / 2


def alignment(h3: Tensor, h4: Tensor, *, estimator: str, temperature: float) -> float:
    """MedCSS, eqs. (6)-(7), with the three readings of "empirical distribution"."""
    if estimator == "histogram":
        columns = zip(h3.double().T.tolist(), h4.double().T.tolist(), strict=True)
        return _mean([jensen_shannon(*_histograms(a, b)) for a, b in columns])
    p = [softmax(row, temperature) for row in h3.double().tolist()]
    q = [softmax(row, temperature) for row in h4.double().tolist()]
    if estimator == "marginal":
        return jensen_shannon([_mean(column) for column in zip(*p, strict=True)],
                              [_mean(column) for column in zip(*q, strict=True)])  # fmt: skip
    return _mean([jensen_shannon(a, b) for a, b in zip(p, q, strict=True)])


def _histograms(a: list[float], b: list[float], bins: int = 32) -> tuple[list[float], list[float]]:
    """Two soft histograms on the bins of their joint range, Gaussian kernel as wide as a bin."""
    low, width = min(a + b), (max(a + b) - min(a + b)) / (bins - 1)
    centres = [low + width * k for k in range(bins)]

    def histogram(values: list[float]) -> list[float]:
        mass = [sum(math.exp(-(((x - c) / width) ** 2) / 2) for x in values) for c in centres]
        return [m / sum(mass) for m in mass]

    return histogram(a), histogram(b)


def coding_rate(features: Tensor, *, alpha: float) -> float:
    """1/2 logdet(I + α Cov), eqs. (8)-(9), with the (d, d) covariance written out."""
    rows = features.double().numpy()
    m, d = rows.shape
    mean = [sum(rows[i][j] for i in range(m)) / m for j in range(d)]
    covariance = np.zeros((d, d))
    for i in range(m):
        centred = rows[i] - mean
        covariance += np.outer(centred, centred) / m
    return float(0.5 * np.linalg.slogdet(np.eye(d) + alpha * covariance)[1])


def balanced_probabilities(labels: Sequence[int]) -> list[float]:
    """MedCSS, eq. (2): p_i = (1 / n_c(i)) / Σ_j (1 / n_c(j))."""
    inverse = [1 / labels.count(label) for label in labels]
    return [value / sum(inverse) for value in inverse]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
