"""What the sums of unit features over all sites tell: spread, and how far apart the sites are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from medfl.evaluation.collapse import rankme_from_sums
from medfl.gate import Update
from medfl.layout import Layout
from medfl.methods.base import Role

PRECISION = 0.5  # ε² of the coding rate, as in MedCSS


def told(updates: Sequence[Update], layout: Layout) -> list[tuple[str, str, float]]:
    """(site, name, value): global coding rate and RankMe, the rate of each site, and the separability of the sites.

    Separability is R(all) - Σ w_i R(site i), w_i by images: the rate reduction of the division into sites (Yu et al.
    2020, eq. 8). It falls as the encoder forgets the scanner. With few images per feature it is far above 0 without any
    difference between the sites: read its change over the rounds, beside the rate, not its level.
    """
    slots = layout.of_role(Role.STATISTICS)
    if not slots.slots:
        return []
    sums = {update.site: slots.unpack(update.flat) for update in updates}
    parts = {site: (float(t["features.count"][0]), t["features.sum"], t["features.gram"]) for site, t in sums.items()}
    rates = {site: coding_rate(*part) for site, part in parts.items()}
    counts, totals, grams = zip(*parts.values(), strict=True)
    count, total, gram = sum(counts), torch.stack(totals).sum(0), torch.stack(grams).sum(0)
    rate = coding_rate(count, total, gram)
    inside = sum(n * rates[site] for n, site in zip(counts, rates, strict=True)) / count
    return [
        ("", "features/coding_rate", rate),
        ("", "features/rankme", rankme_from_sums(int(count), total, gram)),
        ("", "features/site_separability", rate - inside),
        *((site, "features/coding_rate", value) for site, value in rates.items()),
    ]


def coding_rate(count: float, total: Tensor, gram: Tensor) -> float:
    """R = 1/2 logdet(I + F / ε² C) in nats, C the covariance (F, F) behind n, Σz (F,) and Σzzᵀ (F, F).

    Equal to `medcss_losses.coding_rate` of the same rows (Ma et al. 2007, eq. 10).
    """
    covariance = gram / count - torch.outer(total, total) / count**2
    identity = torch.eye(len(total), dtype=gram.dtype)
    return float(torch.linalg.slogdet(identity + len(total) / PRECISION * covariance).logabsdet) / 2
