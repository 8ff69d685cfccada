"""Nearest neighbours on frozen features: no training, so nothing to tune and nothing to hide behind."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medfl.evaluation.probe import Features, Scores, nothing, obstacle

CHUNK = 512  # test rows compared with the training rows at once


def knn(train: Features, test: Features, *, classes: int, neighbors: int, temperature: float) -> Scores:
    """Cosine nearest neighbours voting with weight exp(similarity / temperature) (Wu et al. 2018, sec. 3.4).

    Args:
        train, test: rows of unknown label are dropped.
        classes: K, the columns of the result.
        neighbors: how many vote; limited to the training rows.
        temperature: smaller = closer to the single nearest neighbour.

    Raises:
        ValueError: `neighbors` or `temperature` is not positive, or a label is not below `classes`.
    """
    if neighbors < 1 or temperature <= 0:
        raise ValueError(f"knn: got neighbors={neighbors}, temperature={temperature}; need at least 1, above 0.")
    train, test = train.labelled(), test.labelled()
    if problem := obstacle(train, test, classes=classes):
        return nothing(problem, classes=classes)
    known = F.normalize(train.features.double(), dim=1)
    ballots = F.one_hot(train.labels, classes).double()  # (N, K)
    votes = [
        _votes(F.normalize(rows.double(), dim=1) @ known.T, ballots, neighbors, temperature)
        for rows in torch.split(test.features, CHUNK)
    ]
    return Scores(torch.cat(votes).numpy(), test.labels.numpy(), test.patients)


def _votes(similarity: Tensor, ballots: Tensor, neighbors: int, temperature: float) -> Tensor:
    """Class probabilities (B, K) from similarities (B, N)."""
    nearest, index = similarity.topk(min(neighbors, similarity.shape[1]), dim=1)  # (B, k)
    weight = (nearest / temperature).softmax(dim=1)
    return torch.einsum("bk,bkc->bc", weight, ballots[index])
