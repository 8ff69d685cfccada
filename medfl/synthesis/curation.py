"""Automatic curation of synthetic images, in place of the experts of DCL-CsTP: sane, real-looking, no copies, no
duplicates, and then the best.

Runs at the site, on images that never leave it; neither an image nor a feature enters its record.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medfl.errors import ConfigError, DataError
from medfl.synthesis.audit import audit, quality
from medfl.synthesis.copies import KINDS, Features, compare, unit_rows
from medfl.synthesis.reference import prepare
from medfl.synthesis.sanity import sane

KEPT, SANITY, REALISM, DUPLICATE, BUDGET = "kept", "sanity", "realism", "duplicate", "budget"
COPIES = tuple(f"copy: {kind}" for kind in KINDS)
REASONS = (KEPT, SANITY, REALISM, *COPIES, DUPLICATE, BUDGET)


@dataclass(frozen=True)
class Curation:
    """What became of each of N candidates, and why.

    Attributes:
        reasons: (N,) of `REASONS`; a candidate that fails several tests bears the first, in that order.
        kept: int64 indices of the kept candidates, the most realistic first.
        copies: bool (N,); also those that an earlier test refused.
        scores: (N,) each: rho, similarity, ratio, ncc, and nearest, the int64 index of the most alike training image.
        thresholds: of these scores, of the statistics of sanity (low and high) and of the duplicates' cosine.
        exportable: whether images and generator may be considered for export; else `objections` say why not.
        findings: the rest of the record.
    """

    reasons: tuple[str, ...]
    kept: Tensor
    copies: Tensor
    scores: dict[str, Tensor]
    thresholds: dict[str, float]
    objections: tuple[str, ...]
    findings: dict[str, Any]

    @property
    def exportable(self) -> bool:
        return not self.objections

    def record(self) -> dict[str, Any]:
        """Ready for JSON: counts, shares and distances only."""
        counts = Counter(self.reasons)
        return {
            "counts": {reason: counts[reason] for reason in REASONS},
            "thresholds": self.thresholds,
            **self.findings,
            "exportable": self.exportable,
            "reasons": list(self.objections),
        }


def curate(candidates: Tensor, real: Tensor, held_out: Tensor, features: Features, *, keep: int, seed: int) -> Curation:
    """Keep the best `keep` of the candidates that are images, look real, and copy neither a patient nor each other.

    Args:
        candidates, real, held_out: (N, C, *S), (n, C, *S), (m, C, *S), nominally in [-1, 1], on one device; `real`
            trained the generator, `held_out` is of other patients, at least 50 to export anything.
        features: of a batch (B, C, *S), (B, F); its rows must not depend on each other. Trained on `real` alone.
        keep: K.
        seed: of the images copied on purpose and of the pairs compared for the record; no verdict depends on it
            unless held-out images repeat training images.

    Raises:
        ConfigError: a `keep` below 0.
        DataError: too few real or held-out images, images of different shapes, or real ones that are not finite.
    """
    if keep < 0:
        raise ConfigError(f"curation: got keep={keep}, need the number of images to keep, at least 0.")
    if candidates.shape[1:] != real.shape[1:]:
        shapes = f"{tuple(candidates.shape[1:])} and training images {tuple(real.shape[1:])}"
        raise DataError(f"curation: got synthetic images {shapes}, need one shape (C, *S). Generate them anew.")
    site = prepare(real, held_out, features, seed=seed)
    finite = candidates.isfinite().flatten(1).all(1)
    images = torch.where(finite.view(-1, *[1] * (candidates.ndim - 1)), candidates, 0.0)
    finite = finite.cpu()
    units = unit_rows(images, features)
    rho = site.manifold.realism(units)
    scores = compare(images, site.gallery, site.beside, features)
    flags = site.calibration.flags(scores) & finite[:, None]
    passed = {
        SANITY: sane(candidates, site.sanity),
        REALISM: rho >= site.realism,
        **{reason: ~flags[:, kind] for kind, reason in enumerate(COPIES)},
    }
    reasons = _verdicts(passed, rho, units, alike=site.alike, keep=keep)
    kept = torch.tensor([row for row in _best_first(rho) if reasons[row] == KEPT], dtype=torch.int64)
    copies = flags.any(dim=1)
    objections, findings = audit(copies[finite], scores.nearest[copies], site, seed=seed)
    return Curation(
        reasons=reasons,
        kept=kept,
        copies=copies,
        scores={"rho": rho.where(finite, torch.nan), **vars(scores)},
        thresholds=site.thresholds(),
        objections=objections,
        findings={
            "candidates": len(candidates),
            "real": len(real),
            "held_out": len(held_out),
            "keep": keep,
            "copies": findings,
            **quality(images, kept, site, rho=rho[finite], units=units, seed=seed),
        },
    )


def _verdicts(passed: dict[str, Tensor], rho: Tensor, units: Tensor, *, alike: float, keep: int) -> tuple[str, ...]:
    """The first test that each candidate fails; of the others the most realistic are kept, each unlike those before."""
    reasons = [BUDGET] * len(rho)
    accepted, count = torch.zeros(min(keep, len(rho)), units.shape[1], dtype=units.dtype), 0
    for row in _best_first(rho):
        if failed := next((name for name, good in passed.items() if not good[row]), None):
            reasons[row] = failed
        elif count == len(accepted):
            continue
        elif bool((accepted[:count] @ units[row] > alike).any()):
            reasons[row] = DUPLICATE
        else:
            reasons[row] = KEPT
            accepted[count], count = units[row], count + 1
    return tuple(reasons)


def _best_first(rho: Tensor) -> list[int]:
    return [int(row) for row in rho.argsort(descending=True, stable=True)]
