"""May synthetic images or their generator be exported? And what a curation's record says of copies and quality."""

from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from medfl import seeding
from medfl.synthesis.copies import Calibration, Scores, unit_rows
from medfl.synthesis.realism import degraded, distances, mean_similarity
from medfl.synthesis.reference import FALSE_ALARMS, FOUND, LEAST_HELD_OUT, Reference, share

HELD_OUT = 50  # images of other patients; with fewer, nothing may be exported
REPEATED = 0.05  # of held-out images that repeat a training image: more, and they are not of other patients
COPIED = 0.10  # of the candidates; if more are copies for certain, the generator has memorised
DEGRADED = 256  # training images, blurred and noised as a reference of poor realism


def audit(copies: Tensor, sources: Tensor, site: Reference, *, seed: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What forbids an export, and the copy test's part of the record; `copies` are the flags of finite candidates."""
    count = len(copies)
    bounds = binomtest(int(copies.sum()), count).proportion_ci(method="exact") if count else (0.0, 1.0)
    low, high = (float(bound) for bound in bounds)
    others, repeats = len(site.held_out), site.repeats
    missed = {kind: share for kind, share in site.found.items() if share < FOUND}
    worst = min(missed, key=missed.__getitem__, default="")
    objections = [
        (others < HELD_OUT, f"{others} held-out images of other patients, needs {HELD_OUT} to know what a copy is"),
        (low > COPIED, f"at least {low:.1%} of the candidates are copies of training images, may be {COPIED:.0%}"),
        (
            repeats > REPEATED * (others + repeats),
            f"{repeats} of {others + repeats} held-out images repeat a training image: divide the data by patient",
        ),
        (
            bool(missed),
            f"the copy test finds {missed.get(worst, 1.0):.0%} of planted copies ({worst}), needs {FOUND:.0%}",
        ),
    ]
    findings = {
        "flagged": int(copies.sum()),
        "share": share(copies) if count else None,
        "share_low": low,
        "share_high": high,
        "real_copied": len(set(sources.tolist())) / len(site.real),
        "held_out_repeats": repeats,
        "false_alarms": _false_alarms(site.known, seed),
        "planted_found": site.found,
    }
    return tuple(text for applies, text in objections if applies), findings


def _false_alarms(known: Scores, seed: int) -> float | None:
    """The share of held-out images called copies, each half by the thresholds of the other half."""
    order = torch.randperm(len(known.ncc), generator=seeding.generator(seed, "halves"))
    first, second = (known.of(rows) for rows in order.tensor_split(2))
    if len(order) < 2 * LEAST_HELD_OUT:
        return None
    flags = [
        Calibration.on(one, false_alarms=FALSE_ALARMS).flags(other).any(dim=1)
        for one, other in ((first, second), (second, first))
    ]
    return share(torch.cat(flags))


def quality(images: Tensor, kept: Tensor, site: Reference, *, rho: Tensor, units: Tensor, seed: int) -> dict[str, Any]:
    """Realism, distances to the real images and diversity, of the kept images beside references."""
    source = torch.randperm(len(site.real), generator=seeding.generator(seed, "degraded"))[:DEGRADED]
    poor = unit_rows(degraded(site.real[source.to(images.device)], seed), site.features)
    return {
        "realism": {
            "kept": _median(site.manifold.realism(units[kept])),
            "candidates": _median(rho),
            "held_out": _median(site.manifold.realism(site.beside)),
            "blurred_and_noised": _median(site.manifold.realism(poor, without=source)),
        },
        "distance": {
            "kept": distances(units[kept], site.gallery.units, seed),
            "held_out": distances(site.beside, site.gallery.units, seed),
        },
        "pair_similarity": {
            "kept": mean_similarity(images[kept.to(images.device)], seed),
            "real": mean_similarity(site.real, seed),
        },
    }


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None
