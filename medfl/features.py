"""What the sums of unit features over all sites tell: spread, and how far apart the sites are."""

from dataclasses import replace

import torch
from torch import Tensor

from medfl.evaluation.collapse import rankme_from_sums, symmetric
from medfl.gate import Update
from medfl.layout import Layout
from medfl.methods.base import Role

PRECISION = 0.5  # ε² of the coding rate, as in MedCSS


class Pool:
    """The sums of all sites, added up as they come: one site's are not kept."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout.of_role(Role.STATISTICS)
        self._parts: dict[str, tuple[float, float]] = {}  # site -> images, coding rate
        self._total: tuple[float, Tensor, Tensor] | None = None

    def add(self, update: Update) -> Update:
        """The update without what was added."""
        if not self.layout.slots:
            return update
        tensors = self.layout.unpack(update.flat)
        part = float(tensors["features.count"][0]), tensors["features.sum"], symmetric(tensors["features.gram"])
        self._parts[update.site] = part[0], coding_rate(*part)
        if self._total is None:
            self._total = part[0], part[1].clone(), part[2]
        else:
            count, total, gram = self._total
            self._total = count + part[0], total.add_(part[1]), gram.add_(part[2])
        return replace(update, flat={g: a for g, a in update.flat.items() if g not in self.layout.sizes})

    def told(self) -> list[tuple[str, str, float]]:
        """(site, name, value): global coding rate and RankMe, the rate of each site, and the separability of the sites.

        Separability is R(all) - Σ w_i R(site i), w_i by images: the rate reduction of the division into sites (Yu et
        al. 2020, eq. 8). It falls as the encoder forgets the scanner. With few images per feature it is far above 0
        without any difference between the sites: read its change over the rounds, beside the rate, not its level.
        """
        if self._total is None:
            return []
        count, total, gram = self._total
        rate = coding_rate(count, total, gram)
        inside = sum(images * own for images, own in self._parts.values()) / count
        return [
            ("", "features/coding_rate", rate),
            ("", "features/rankme", rankme_from_sums(int(count), total, gram)),
            ("", "features/site_separability", rate - inside),
            *((site, "features/coding_rate", own) for site, (_, own) in self._parts.items()),
        ]


def coding_rate(count: float, total: Tensor, gram: Tensor) -> float:
    """R = 1/2 logdet(I + F / ε² C) in nats, C the covariance (F, F) behind n, Σz (F,) and Σzzᵀ (F, F).

    Equal to `medcss_losses.coding_rate` of the same rows (Ma et al. 2007, eq. 10).
    """
    covariance = gram / count - torch.outer(total, total) / count**2
    identity = torch.eye(len(total), dtype=gram.dtype)
    return float(torch.linalg.slogdet(identity + len(total) / PRECISION * covariance).logabsdet) / 2
