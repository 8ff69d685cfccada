"""How different the sites are, in numbers, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfl.data.sample import SiteData
from medfl.seeding import generator, key

PER_SITE = 200  # images of a site that the probe reads
FOLDS = 5


@dataclass(frozen=True)
class Calibration:
    """Strength of the shift among the sites that train.

    Attributes:
        site_accuracy: balanced accuracy of a linear probe that names the site from raw intensity statistics,
            cross-validated by patient; 0.5 to 0.7 is a mild shift for four sites, above 0.9 a severe one.
        chance: 1 / sites.
        label_variation: mean total variation distance of a site's labels from the pooled ones, in [0, 1].
        effective_sites: 1 / sum of squared shares of training images; equal sites give their number.
    """

    site_accuracy: float
    chance: float
    label_variation: float
    effective_sites: float


def calibration(sites: Sequence[SiteData], seed: int) -> Calibration:
    """Measure the training splits of the sites that are not held out."""
    members = [site for site in sites if not site.held_out]
    if not members:
        raise ValueError("calibration: got no site that trains.")
    sizes = np.array([len(site.train) for site in members], dtype=np.float64)
    weights = sizes / sizes.sum()
    return Calibration(
        site_accuracy=_site_accuracy(members, seed),
        chance=1 / len(members),
        label_variation=_label_variation(members),
        effective_sites=float(1 / (weights**2).sum()),
    )


def statistics(images: Tensor) -> Tensor:
    """Intensity statistics of each image, (N, K): moments, percentiles, sharpness and noise per axis, corner
    means.
    """
    dims = images.ndim - 2
    flat = images.flatten(1)
    levels = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    columns = [flat.mean(1), flat.std(1), *torch.quantile(flat, levels, dim=1)]
    for axis in range(2, 2 + dims):
        slope = images.diff(dim=axis)
        columns += [slope.abs().flatten(1).mean(1), slope.diff(dim=axis).abs().flatten(1).mean(1)]
    grey = images.mean(1, keepdim=True)
    pool = torch.nn.functional
    corners = pool.adaptive_avg_pool2d(grey, 2) if dims == 2 else pool.adaptive_avg_pool3d(grey, 2)
    return torch.cat([torch.stack(columns, dim=1), corners.flatten(1)], dim=1)


def _site_accuracy(members: Sequence[SiteData], seed: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(members) == 1:
        return 1.0
    features, target, groups = _table(members, seed)
    patients = [len(set(groups[target == site].tolist())) for site in range(len(members))]
    folds = StratifiedGroupKFold(max(2, min(FOLDS, *patients)), shuffle=True, random_state=key(seed, "folds") % 2**32)
    probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    guess = cross_val_predict(probe, features, target, groups=groups, cv=folds)
    return float(balanced_accuracy_score(target, guess))


def _table(members: Sequence[SiteData], seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]:
    """Features (M, K), site index (M,) and patient (M,) of up to PER_SITE images of each site."""
    features, target, groups = [], [], []
    for index, site in enumerate(members):
        rows = torch.randperm(len(site.train), generator=generator(seed, "calibration", site.name))[:PER_SITE]
        features.append(statistics(site.train.images[rows]))
        target += [index] * len(rows)
        groups += [site.train.patients[row] for row in rows.tolist()]
    return torch.cat(features).numpy(), np.array(target, dtype=np.int64), np.array(groups)


def _label_variation(members: Sequence[SiteData]) -> float:
    classes = len(members[0].classes)
    known = [site.train.labels[site.train.labels >= 0] for site in members]
    known = [labels for labels in known if len(labels)]
    if classes < 2 or not known:
        return 0.0
    pooled = torch.cat(known).bincount(minlength=classes) / sum(len(labels) for labels in known)
    gaps = [0.5 * (labels.bincount(minlength=classes) / len(labels) - pooled).abs().sum() for labels in known]
    return float(torch.stack(gaps).mean())
