"""What a site counts of its test images, beside its scores."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from medfl.evaluation.counts import BINS, count
from medfl.layout import Flat, Layout, Tensors, counts_layout
from medfl.study import Evaluation

if TYPE_CHECKING:
    from medfl.evaluation.probe import Scores  # brings scikit-learn along, which a request for training does without


def tallies(plan: Evaluation, scores: "Mapping[str, Scores]", classes: Sequence[str]) -> Flat:
    """Counts of test images for each protocol that predicts classes; {} where the study asks for none.

    Args:
        scores: of the protocols; one that could not predict anything counts nothing.
    """
    if not (layout := tallies_layout(plan, classes)).slots:
        return {}
    tensors: Tensors = {}
    for protocol in plan.predicting:
        histogram, confusion = _counted(scores[protocol], len(classes), int(plan.counts or 0))
        tensors |= {
            f"{protocol}.histogram": torch.from_numpy(histogram),
            f"{protocol}.confusion": torch.from_numpy(confusion),
        }
    return layout.pack(tensors)


def tallies_layout(plan: Evaluation, classes: Sequence[str]) -> Layout:
    """What the counts are on the wire; empty where the study asks for none."""
    return counts_layout(plan.predicting, len(classes)) if plan.counts and classes else Layout(())


def _counted(scores: "Scores", classes: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    if not len(scores.labels):
        return np.zeros((classes, 2, BINS)), np.zeros((classes, classes))
    return count(scores.probabilities, scores.labels, scores.patients, least=least)
