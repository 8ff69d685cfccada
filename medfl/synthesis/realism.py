"""Do synthetic images lie where the real ones lie? Nearest neighbours, distances of distributions, and diversity."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from monai.metrics.regression import compute_ssim_and_cs
from torch import Tensor

from medfl import seeding

NEIGHBORS = 5
CHUNK = 256  # rows compared with all rows at once
ROWS = 1000  # of each set in the kernel distance
PAIRS = 128  # whose structural similarity is averaged


@dataclass(frozen=True)
class Manifold:
    """Balls around unit rows (n, F), each reaching to its row's fifth nearest neighbour (Kynkäänniemi et al. 2019)."""

    rows: Tensor
    radii: Tensor  # (n,)

    @classmethod
    def of(cls, rows: Tensor) -> "Manifold":
        """At least two rows; with fewer than six, the farthest neighbour takes the place of the fifth."""
        count = min(NEIGHBORS, len(rows) - 1)
        radii = [
            distance.topk(count + 1, dim=1, largest=False).values[:, count]  # itself is the nearest
            for distance in (torch.cdist(part, rows) for part in torch.split(rows, CHUNK))
        ]
        return cls(rows, torch.cat(radii))

    def realism(self, rows: Tensor, *, without: Tensor | None = None) -> Tensor:
        """max over balls of radius / distance, (N,), eq. (4); the larger half of the balls is left out, as there.

        Args:
            without: (N,), one ball for each row that does not count for it.
        """
        compact = self.radii <= self.radii.median()
        found = []
        for index in torch.split(torch.arange(len(rows)), CHUNK):
            ratio = self.radii / torch.cdist(rows[index], self.rows).clamp_min(1e-9)
            if without is not None:
                ratio[torch.arange(len(index)), without[index]] = 0.0
            found.append(ratio[:, compact].amax(dim=1))
        return torch.cat(found) if found else rows.new_empty(0)

    def share_inside(self, rows: Tensor) -> float:
        """The share of rows in at least one ball."""
        inside = [(torch.cdist(part, self.rows) <= self.radii).any(dim=1) for part in torch.split(rows, CHUNK)]
        return float(torch.cat(inside).double().mean())


def distances(rows: Tensor, real: Tensor, seed: int) -> dict[str, float | None]:
    """How far the unit rows (N, F) are from the real ones (n, F); None where two rows are missing."""
    if min(len(rows), len(real)) < 2:
        return dict.fromkeys(("frechet", "mmd", "precision", "recall"))
    return {
        "frechet": frechet(rows, real),
        "mmd": mmd(_some(rows, seed), _some(real, seed)),
        "precision": Manifold.of(real).share_inside(rows),
        "recall": Manifold.of(rows).share_inside(real),
    }


def frechet(first: Tensor, second: Tensor) -> float:
    """|μ₁ - μ₂|² + tr(C₁ + C₂ - 2 (C₁ C₂)^½) (Heusel et al. 2017), of rows (N, F) and (M, F)."""
    one, two = first.double().T.cov(), second.double().T.cov()
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    gap = (first.double().mean(dim=0) - second.double().mean(dim=0)).square().sum()
    return float(gap + one.trace() + two.trace() - 2 * mixed)


def mmd(first: Tensor, second: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (xᵀy + 1)³; it can be slightly negative.

    As Bińkowski et al. (2018), without the division by F, which for unit rows would leave a kernel that is flat.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T + 1) ** 3

    n, m = len(first), len(second)
    within = [k.sum() - k.trace() for k in (kernel(first, first), kernel(second, second))]
    return float(within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * kernel(first, second).mean())


def mean_similarity(images: Tensor, seed: int) -> float | None:
    """Mean structural similarity of random pairs of different images: small for diverse ones; None for fewer than 2.

    Wang et al. (2004), Gaussian window of 11 voxels and deviation 1.5, images in [-1, 1]; a smaller image takes the
    largest window that fits.
    """
    if len(images) < 2:
        return None
    draw = seeding.generator(seed, "pairs")
    left = torch.randint(len(images), (PAIRS,), generator=draw)
    right = (left + torch.randint(1, len(images), (PAIRS,), generator=draw)) % len(images)
    first, second = (images[rows.to(images.device)].float().clamp(-1, 1) for rows in (left, right))
    dims = images.ndim - 2
    window = [min(11, side - 1 + side % 2) for side in images.shape[2:]]
    ssim, _ = compute_ssim_and_cs(
        first, second, spatial_dims=dims, kernel_size=window, kernel_sigma=[1.5] * dims, data_range=2
    )
    return float(ssim.mean())


def degraded(images: Tensor, seed: int) -> Tensor:
    """Images (B, C, *S) blurred to a quarter of their resolution, with noise of a tenth of the grey range."""
    size = images.shape[2:]
    mode = "bilinear" if len(size) == 2 else "trilinear"
    coarse = F.interpolate(images, [max(1, side // 4) for side in size], mode="area")
    noise = torch.randn(images.shape, generator=seeding.generator(seed, "degraded noise"))
    return F.interpolate(coarse, list(size), mode=mode) + 0.2 * noise.to(images.device)


def _some(rows: Tensor, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=seeding.generator(seed, "rows"))[:ROWS]]
