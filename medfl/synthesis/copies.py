"""Is a synthetic image a copy of a training image? Three scores, and thresholds set on patients never trained on.

Similarity in feature space over flips, turns, zooms and intensities; the ratio of the distances to the training
images and to other patients' images; and the correlation of voxels after alignment. None has an absolute scale: what is
too much is learned from how much other patients' images resemble the training images.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from medfl import seeding
from medfl.synthesis.alignment import Templates, aligned, likeliest, margins, moved
from medfl.views.spatial import angles

Features = Callable[[Tensor], Tensor]  # (B, C, *S) -> (B, F), not normalised

BATCH = 64  # images per call of the features
NEAREST = 5  # training images whose voxels are compared: this many by features, as many by coarse voxels
PLANTED = 32  # training images that are copied on purpose
NOISE = 0.02  # of the grey range: what a near-copy may differ by
KINDS = ("features", "ratio", "pixels")


@dataclass(frozen=True)
class Scores:
    """How much each of N images looks like a copy; all on the CPU, float64 (N,).

    Attributes:
        similarity: the largest cosine to a training image, over the image's transforms.
        ratio: distance to the nearest training image over that to the nearest held-out one; small for a copy.
        ncc: correlation with the most alike training image, aligned.
        nearest: int64, that image's index.
    """

    similarity: Tensor
    ratio: Tensor
    ncc: Tensor
    nearest: Tensor

    def evidence(self) -> Tensor:
        """(N, 3), in the order of `KINDS`, larger for a copy: minus the log of each score as a distance."""
        distances = [1 - self.similarity, self.ratio, 1 - self.ncc]
        return -torch.stack(distances, dim=1).clamp_min(1e-9).log()

    def of(self, rows: Tensor) -> "Scores":
        return Scores(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Gallery:
    """The training images as copies are looked for in them."""

    units: Tensor  # (n, F)
    templates: Templates

    @classmethod
    def of(cls, images: Tensor, features: Features) -> "Gallery":
        return cls(unit_rows(images, features), Templates.of(images))


@dataclass(frozen=True)
class Calibration:
    """The evidence (3,) above which each score says copy."""

    limits: Tensor

    @classmethod
    def on(cls, held_out: Scores, *, false_alarms: float) -> "Calibration":
        """So that of new patients the share `false_alarms` is expected above each limit.

        A limit is the (k + 1)-th largest of the m held-out images; one more image, exchangeable with them, exceeds it
        with probability (k + 1) / (m + 1) (split conformal prediction). Where m is too small for so small a share, the
        limit lies beyond the largest, on the exponential tail that the upper tenth of the images shows.
        """
        evidence = held_out.evidence().sort(dim=0, descending=True).values
        beyond = max(0, math.floor(false_alarms * (len(evidence) + 1)) - 1)
        upper = max(1, len(evidence) // 10)
        tail = (evidence[:upper] - evidence[upper]).mean(dim=0)
        missing = math.log((beyond + 1) / (len(evidence) + 1) / false_alarms)
        return cls(evidence[beyond] + max(0.0, missing) * tail)

    def flags(self, scores: Scores) -> Tensor:
        """bool (N, 3): which score says copy."""
        return scores.evidence() > self.limits

    def thresholds(self) -> dict[str, float]:
        """In the unit of each score: similarity and ncc above it are copies, a ratio below."""
        similarity, ratio, ncc = (-self.limits).exp().tolist()
        return {"similarity": 1 - similarity, "ratio": ratio, "ncc": 1 - ncc}


def compare(images: Tensor, gallery: Gallery, others: Tensor, features: Features, *, itself: bool = False) -> Scores:
    """Scores of images (N, C, *S) against the training images and the units (m, F) of held-out ones.

    Args:
        itself: image i is row i of `others`, and is not compared with itself.
    """
    parts = []
    for rows in torch.split(torch.arange(len(images)), BATCH):
        part = images[rows.to(images.device)]
        similarity, beside = _similarities(part, [gallery.units, others], features)
        if itself:
            beside[torch.arange(len(rows)), rows] = -1.0
        choice = torch.cat(
            [
                similarity.topk(min(NEAREST, similarity.shape[1]), dim=1).indices,
                likeliest(part, gallery.templates, NEAREST).cpu(),
            ],
            dim=1,
        )
        ncc, place = aligned(part, gallery.templates, choice).cpu().double().max(dim=1)
        near, far = (_distance(cosine.amax(dim=1)) for cosine in (similarity, beside))
        nearest = choice.gather(1, place[:, None])[:, 0]
        parts.append(Scores(similarity.amax(dim=1), near / far.clamp_min(1e-9), ncc, nearest))
    return Scores(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scores)))


def unit_rows(images: Tensor, features: Features) -> Tensor:
    """Features of length 1, (B, F) float64 on the CPU."""
    rows = torch.cat([features(part).detach().double().cpu() for part in torch.split(images, BATCH)])
    return F.normalize(rows, dim=1)


def transforms(images: Tensor) -> Iterator[Tensor]:
    """The images, mirrored along each axis, turned by ±10° about each, zoomed, brighter and darker by 10 %."""
    dims = images.ndim - 2
    yield images
    yield from (images.flip(axis) for axis in range(2, images.ndim))
    yield from (moved(images, axis=axis, degrees=turn) for axis in range(angles(dims)) for turn in (-10.0, 10.0))
    yield from (moved(images, zoom=zoom) for zoom in (0.9, 1.1))
    yield from ((images + 1) * factor - 1 for factor in (0.9, 1.1))  # -1 is black


def planted(real: Tensor, seed: int) -> dict[str, Tensor]:
    """Near-copies of training images drawn at random, by kind: what the copy test has to find."""
    draw = seeding.generator(seed, "planted")
    source = real[torch.randperm(len(real), generator=draw)[:PLANTED].to(real.device)]
    noise = 2 * NOISE * torch.randn(source.shape, generator=draw)  # the grey range is 2
    turns = (torch.rand(len(source), generator=draw) * 16 - 8).tolist()
    parts = torch.rand(len(source), source.ndim - 2, generator=draw) * 2 - 1
    shifts = (parts * torch.tensor(margins(source))).round().int().tolist()
    axes = tuple(range(1, source.ndim - 1))
    return {
        "noise": source + noise.to(source.device),
        "flip": source.flip(source.ndim - 1),
        "shift": torch.stack([image.roll(shift, axes) for image, shift in zip(source, shifts, strict=True)]),
        "turn": torch.cat([moved(image[None], degrees=turn) for image, turn in zip(source, turns, strict=True)]),
    }


def _similarities(images: Tensor, references: list[Tensor], features: Features) -> list[Tensor]:
    """The largest cosine (B, n) over the transforms of each image, for each set of reference units (n, F)."""
    best = [torch.full((len(images), len(units)), -1.0, dtype=torch.float64) for units in references]
    for transformed in transforms(images):
        rows = unit_rows(transformed, features)
        best = [torch.maximum(so_far, rows @ units.T) for so_far, units in zip(best, references, strict=True)]
    return best


def _distance(cosine: Tensor) -> Tensor:
    """Euclidean distance of unit rows."""
    return (2 - 2 * cosine).clamp_min(0).sqrt()
