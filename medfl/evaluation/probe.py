"""Linear probe: logistic regression on frozen features, its strength chosen on the validation split."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from medfl.evaluation.metrics import auc, point

ITERATIONS = 1000  # of lbfgs, at each strength; what stops there is used and noted


@dataclass(frozen=True)
class Features:
    """Representations of one split: features (N, F) float32 on the CPU, labels (N,) int64 with -1 = unknown.

    Raises:
        ValueError: the numbers of rows differ.
    """

    features: Tensor
    labels: Tensor
    patients: tuple[str, ...]

    def __post_init__(self) -> None:
        rows = (len(self.features), len(self.labels), len(self.patients))
        if self.features.ndim != 2 or len(set(rows)) > 1:
            raise ValueError(
                f"Features: got features {tuple(self.features.shape)}, {rows[1]} labels, {rows[2]} patients; "
                "need (N, F), N and N."
            )

    def labelled(self) -> "Features":
        """Without the rows of unknown label."""
        keep = self.labels >= 0
        patients = tuple(p for p, known in zip(self.patients, keep.tolist(), strict=True) if known)
        return Features(self.features[keep], self.labels[keep], patients)


@dataclass(frozen=True)
class Scores:
    """Class probabilities (N, K) of the labelled test rows, their labels (N,) and patients.

    No rows, and every metric undefined, when nothing could be fitted: `note` then says why. `strength` is the
    chosen C of the linear probe.
    """

    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]
    patients: tuple[str, ...]
    note: str = ""
    strength: float | None = None


def linear_probe(
    train: Features, val: Features, test: Features, *, classes: int, grid: Sequence[float], seed: int
) -> Scores:
    """L2-regularised logistic regression (binary or multinomial) on features standardised by `train`.

    Args:
        train, val, test: splits of one site or of several; rows of unknown label are dropped.
        classes: K, the columns of the result; a class without training images gets probability 0.
        grid: inverse strengths C, as in scikit-learn; the smallest with the best AUC on `val` is taken, the
            middle one if `val` has no two classes.
        seed: of the solver; lbfgs draws nothing, so that the result does not depend on it.

    Raises:
        ValueError: `grid` is empty or not positive, or a label is not below `classes`.
    """
    if not grid or min(grid) <= 0:
        raise ValueError(f"linear_probe: got grid {list(grid)}; need at least one C, all above 0.")
    train, val, test = train.labelled(), val.labelled(), test.labelled()
    if problem := obstacle(train, test, val, classes=classes):
        return nothing(problem, classes=classes)
    center, scale = _standard(_rows(train))
    x, x_val, x_test = ((_rows(split) - center) / scale for split in (train, val, test))
    strengths, notes = sorted(grid), [_missing(train, classes)]
    selectable = len(set(val.labels.tolist())) > 1
    if not selectable:
        strengths = [strengths[len(strengths) // 2]]
        notes.append(f"C={strengths[0]:g} is the middle of the grid: the validation split has no two classes")
    model = LogisticRegression(max_iter=ITERATIONS, warm_start=True, random_state=seed)
    best, chosen, probabilities, settled = -1.0, strengths[0], np.empty((0, classes)), True
    for strength in strengths:
        converged = _fit(model.set_params(C=strength), x, train.labels.numpy())
        reached = (point(auc, _predict(model, x_val, classes), val.labels.numpy()) or 0.0) if selectable else 0.0
        if reached > best:
            best, chosen, settled = reached, strength, converged
            probabilities = _predict(model, x_test, classes)
    if not settled:
        notes.append(f"C={chosen:g} had not converged after {ITERATIONS} iterations")
    return Scores(probabilities, test.labels.numpy(), test.patients, "; ".join(filter(None, notes)), chosen)


def obstacle(train: Features, test: Features, *others: Features, classes: int) -> str:
    """Why labelled splits cannot be fitted and scored, or "".

    Raises:
        ValueError: fewer than two classes, or a label is not below `classes`.
    """
    splits = (train, test, *others)
    highest = max((int(split.labels.max()) for split in splits if len(split.labels)), default=-1)
    if classes < 2 or highest >= classes:
        raise ValueError(f"got label {highest} with {classes} classes; need classes >= 2 and above every label.")
    if len(train.labels) == 0:
        return "no labelled training images"
    if len(set(train.labels.tolist())) < 2:
        return f"all {len(train.labels)} labelled training images are of class {int(train.labels[0])}"
    if len(test.labels) == 0:
        return "no labelled test images"
    finite = all(bool(torch.isfinite(split.features).all()) for split in splits)
    return "" if finite else "the features have NaN or infinity"


def nothing(note: str, *, classes: int) -> Scores:
    """Scores without rows, and why."""
    return Scores(np.empty((0, classes)), np.empty(0, dtype=np.int64), (), note)


def _rows(split: Features) -> NDArray[np.float64]:
    return split.features.numpy().astype(np.float64)


def _standard(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each feature; 1 for a constant one, which then stays at 0."""
    center, scale = x.mean(axis=0), x.std(axis=0)
    constant = scale <= 1e-7 * np.abs(center)  # float32 rounding is not information; holds for 0 = 0 too
    return center, np.where(constant, 1.0, scale)


def _missing(train: Features, classes: int) -> str:
    absent = sorted(set(range(classes)) - set(train.labels.tolist()))
    return f"no training images of class {', '.join(map(str, absent))}" if absent else ""


def _fit(model: LogisticRegression, x: NDArray[np.float64], labels: NDArray[np.int64]) -> bool:
    """Fit in place, starting from the previous strength's solution; False if the iterations ran out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said once, in the note, for the chosen strength only
        model.fit(x, labels)
    return bool(model.n_iter_.max() < ITERATIONS)


def _predict(model: LogisticRegression, x: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """Probabilities (N, K), 0 in the columns of classes that the model never saw."""
    table = np.zeros((len(x), classes))
    if len(x):
        table[:, model.classes_] = model.predict_proba(x)
    return table
