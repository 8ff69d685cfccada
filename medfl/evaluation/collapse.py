"""Collapse monitors: has the embedding become a point, a line, or does it still tell images apart?"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_STD = 0.2  # of `embedding_std`
LEAST_RANK = 0.05  # of the largest possible RankMe
CHUNK = 256  # rows compared with all rows at once in `uniformity`


def rankme(embeddings: Tensor) -> float:
    """RankMe, the effective rank of the centred embeddings (N, E) (Garrido et al. 2023, eq. 1).

    exp of the entropy of the singular values' shares: 1 (constant) to min(N, E). NaN if an entry is NaN.

    Raises:
        ValueError: no rows.
    """
    if embeddings.ndim != 2 or len(embeddings) == 0:
        raise ValueError(f"rankme: got {tuple(embeddings.shape)}; need (N, E) with N >= 1.")
    z = embeddings.double()
    centred = z - z.mean(dim=0)
    scatter = centred.T @ centred if len(z) > z.shape[1] else centred @ centred.T  # equal non-zero eigenvalues
    return _effective_rank(scatter, rank=min(z.shape), power=float(z.square().sum()))


def triangle(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (F, F), row by row: (F (F + 1) / 2,)."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def symmetric(values: Tensor) -> Tensor:
    """The matrix (F, F) that `triangle` had."""
    width = (math.isqrt(8 * len(values) + 1) - 1) // 2
    matrix = values.new_empty(width, width)
    rows, columns = torch.triu_indices(width, width)
    matrix[rows, columns] = values
    matrix[columns, rows] = values
    return matrix


def sums(embeddings: Tensor) -> tuple[int, Tensor, Tensor]:
    """What `rankme_from_sums` needs of embeddings (N, E): N, sum z (E,), sum z zᵀ (E, E), in float64.

    They add up over sites, also under secure aggregation.
    """
    z = embeddings.double()
    return len(z), z.sum(dim=0), z.T @ z


def rankme_from_sums(count: int, total: Tensor, second: Tensor) -> float:
    """RankMe of all embeddings behind the summed (n, sum z (E,), sum z zᵀ (E, E)), without any of them.

    Raises:
        ValueError: no rows, or the shapes do not agree.
    """
    if count < 1 or second.shape != (*total.shape, *total.shape):
        raise ValueError(
            f"rankme_from_sums: got n={count}, sums {tuple(total.shape)} and {tuple(second.shape)}; "
            "need n >= 1, (E,) and (E, E)."
        )
    total, second = total.double(), second.double()
    scatter = second - torch.outer(total, total) / count
    return _effective_rank(scatter, rank=min(count, len(total)), power=float(second.trace()))


def embedding_std(embeddings: Tensor) -> float:
    """sqrt(E) x mean over dimensions of the deviation of z / |z|, z (N, E): 1 isotropic, 0 collapsed."""
    z = F.normalize(embeddings.double(), dim=1)
    return float(z.std(dim=0, correction=0).mean() * math.sqrt(z.shape[1]))


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two normalised views (N, E): 0 equal, 4 opposite (Wang & Isola 2020, eq. 1).

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"alignment: got {tuple(first.shape)} and {tuple(second.shape)}; need two views, equal shapes."
        )
    difference = F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)
    return float(difference.square().sum(dim=1).mean())


def uniformity(embeddings: Tensor) -> float:
    """log mean over pairs of exp(-2 |z_i - z_j|²), z normalised (N, E): 0 collapsed, about -4 uniform in many
    dimensions (Wang & Isola 2020). Holds 256 rows of the N x N distances at once.

    Raises:
        ValueError: fewer than two rows.
    """
    n = len(embeddings)
    if n < 2:
        raise ValueError(f"uniformity: got {n} rows; need at least 2.")
    z = F.normalize(embeddings.double(), dim=1)
    squares = (2 - 2 * rows @ z.T for rows in torch.split(z, CHUNK))  # |a - b|² of unit vectors
    kernel = sum(float(torch.exp(-2 * square.clamp(min=0)).sum()) for square in squares)
    own = float(torch.exp(-2 * (2 - 2 * z.square().sum(dim=1)).clamp(min=0)).sum())  # i = j is no pair
    return math.log((kernel - own) / (n * (n - 1)))


def monitors(first: Tensor, second: Tensor) -> dict[str, float]:
    """All monitors of two views' embeddings (N, E), named as in metrics.jsonl; empty below two rows."""
    if len(first) < 2:
        return {}
    return {
        "rankme": rankme(first),
        "embedding_std": embedding_std(first),
        "alignment": alignment(first, second),
        "uniformity": uniformity(first),
    }


def collapsed(values: Mapping[str, float], *, rank: int) -> str | None:
    """What is wrong with the embeddings behind `monitors`, with the thresholds, or None.

    For embeddings: representations after a ReLU all point one way, so their std is small in good health too.

    Args:
        values: of `monitors`; what is missing is not judged.
        rank: the largest RankMe possible, min(N, E).
    """
    found = [f"{name} is not finite" for name, value in values.items() if not math.isfinite(value)]
    if values.get("embedding_std", 1.0) < LEAST_STD:
        found.append(f"embedding std is {values['embedding_std']:.3f}, healthy is above {LEAST_STD}")
    if values.get("rankme", float(rank)) < LEAST_RANK * rank:
        found.append(f"RankMe is {values['rankme']:.1f} of {rank}, healthy is above {LEAST_RANK:.0%} of it")
    return "collapsed: " + "; ".join(found) if found else None


def _effective_rank(scatter: Tensor, *, rank: int, power: float) -> float:
    """RankMe from sum (z - mean)(z - mean)ᵀ; what is below the rounding of `power`, sum |z|², counts as 0."""
    if not bool(torch.isfinite(scatter).all()):
        return math.nan
    values = torch.linalg.eigvalsh(scatter).flip(0)[:rank]
    floor = 4 * len(scatter) * torch.finfo(torch.float64).eps * power
    sigma = torch.where(values > floor, values, 0.0).clamp(min=0).sqrt()
    if float(sigma.sum()) == 0:
        return 1.0
    shares = sigma / sigma.sum() + 1e-7  # the paper's epsilon: it moves both ends of the range a little
    return min(max(1.0, math.exp(-float(torch.xlogy(shares, shares).sum()))), float(rank))
