"""What a site counts of its test images, beside its scores."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from medfl.evaluation.counts import BINS, count
from medfl.evaluation.probe import Scores
from medfl.layout import Flat, Tensors, counts_layout
from medfl.study import Evaluation


def tallies(plan: Evaluation, scores: Mapping[str, Scores], classes: Sequence[str]) -> Flat:
    """Counts of test images for each protocol that predicts classes; {} where the study asks for none.

    Args:
        scores: of the protocols; one that could not predict anything counts nothing.
    """
    if plan.counts is None or not classes:
        return {}
    tensors: Tensors = {}
    for protocol in plan.predicting:
        histogram, confusion = _counted(scores[protocol], len(classes), plan.counts)
        tensors |= {
            f"{protocol}.histogram": torch.from_numpy(histogram),
            f"{protocol}.confusion": torch.from_numpy(confusion),
        }
    return counts_layout(plan.predicting, len(classes)).pack(tensors)


def _counted(scores: Scores, classes: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    if not len(scores.labels):
        return np.zeros((classes, 2, BINS)), np.zeros((classes, classes))
    return count(scores.probabilities, scores.labels, scores.patients, least=least)
