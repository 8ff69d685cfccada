"""Fused and segmented images of a frozen network, scored one by one at the site, and their averages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medfl.data.sample import Split, labelled, person_of, present
from medfl.errors import ConfigError
from medfl.evaluation.fusion_metrics import FUSION
from medfl.evaluation.metrics import Array, Labels, mean, ratio
from medfl.evaluation.segmentation_metrics import segmentation_scores
from medfl.evaluation.statistics import Interval, bootstrap
from medfl.study import Evaluation

OVERLAP = 0.5  # of neighbouring windows


class Fuses(Protocol):
    """A network that makes one image (B, 1, *S) of all modalities (B, M, *S), zero where absent."""

    def fuse(self, images: Tensor) -> Tensor: ...


class Segments(Protocol):
    """A network that gives logits (B, K, *S) of images (B, M, *S)."""

    def segment(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Table:
    """Metrics of N images, name -> (N,), NaN where undefined, and the N patients.

    Slabs of one brain that count as patients elsewhere are drawn together: their errors are not independent.
    """

    columns: Mapping[str, Array]
    patients: tuple[str, ...]

    def averages(self, *, resamples: int, seed: int) -> dict[str, Interval]:
        """The mean of each metric with its interval over resampled patients, and `n_test`; {} without images."""
        if not self.patients:
            return {}
        zeros, people = np.zeros(len(self.patients), dtype=np.int64), [person_of(one) for one in self.patients]
        intervals = {
            name: bootstrap(_mean, values[:, None], zeros, people, resamples=resamples, seed=seed)
            for name, values in self.columns.items()
        }
        return {**intervals, "n_test": Interval(float(len(self.patients)), None, None)}


def fusion(net: Fuses, split: Split, plan: Evaluation, device: torch.device) -> dict[str, Table]:
    """ "fusion": scores of the fused images; "average": of the plain mean of the same sources, as a reference.

    Images with fewer than two modalities are left out.
    """
    rows = torch.nonzero(present(split.images).sum(1) > 1)[:, 0]
    fused, average = [], []
    for index in _batches(rows, plan):
        images = split.images[index].to(device)
        fused += _scored(windowed(net.fuse, images, plan), images)
        average += _scored(mean_of_present(images), images)
    patients = tuple(split.patients[row] for row in rows.tolist())
    return {"fusion": _table(fused, patients), "average": _table(average, patients)}


def segmentation(
    net: Segments,
    split: Split,
    plan: Evaluation,
    device: torch.device,
    *,
    spacing: Sequence[float],
    regions: Mapping[str, Sequence[int]],
) -> Table:
    """Scores of the regions (name -> labels) in the segmented images; those without a mask are left out."""
    if split.masks is None:
        return Table({}, ())
    rows = torch.nonzero(labelled(split.masks))[:, 0]
    scores = []
    for index in _batches(rows, plan):
        labels = windowed(net.segment, split.images[index].to(device), plan).argmax(1).to("cpu", torch.uint8)
        scores.append(segmentation_scores(labels, split.masks[index], spacing=spacing, regions=regions))
    return _table(scores, tuple(split.patients[row] for row in rows.tolist()))


def mean_of_present(images: Tensor) -> Tensor:
    """The mean (B, 1, *S) of the modalities that each image (B, M, *S) has; 0 where it has none."""
    count = present(images).sum(1).clamp_min(1)
    return images.sum(1, keepdim=True) / count.view(-1, *[1] * (images.ndim - 1))


@torch.no_grad()
def windowed(network: Callable[[Tensor], Tensor], images: Tensor, plan: Evaluation) -> Tensor:
    """What a network makes of images (B, M, *S), window by window, blended with Gaussian weights; float32.

    The windows are `evaluation.window` large, or as the image where it is smaller; without one, it is one window.

    Raises:
        ConfigError: a window of other axes than the images.
    """
    from monai.inferers.utils import sliding_window_inference

    size = tuple(images.shape[2:])
    window = plan.window or size
    if len(window) != len(size):
        raise ConfigError(
            f"evaluation.window: got {list(window)} for images of {len(size)} axes. Need one number for each."
        )
    window = tuple(min(pair) for pair in zip(window, size, strict=True))
    if window == size:
        return network(images).float()
    blended: Any = sliding_window_inference(images, window, plan.batch_size, network, overlap=OVERLAP, mode="gaussian")
    return torch.as_tensor(blended)


def _batches(rows: Tensor, plan: Evaluation) -> Sequence[Tensor]:
    return torch.split(rows, plan.batch_size) if len(rows) else ()


def _scored(fused: Tensor, images: Tensor) -> list[dict[str, Tensor]]:
    """Every metric of each image of a batch, on its own: memory for one volume."""
    pairs = list(zip(torch.split(fused, 1), torch.split(images, 1), strict=True))
    return [{name: metric(one, sources).cpu() for name, metric in FUSION.items()} for one, sources in pairs]


def _table(parts: Sequence[Mapping[str, Tensor]], patients: tuple[str, ...]) -> Table:
    names = parts[0] if parts else ()
    return Table({name: torch.cat([part[name] for part in parts]).double().numpy() for name in names}, patients)


def _mean(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
    """A `Metric`: the mean of one column (N, 1) over the rows that have a value, (R,) for counts (N, R)."""
    del labels
    if counts is None:
        return mean(probabilities, axis=0)
    known = np.isfinite(probabilities[:, 0])
    return ratio(probabilities[known, 0] @ counts[known], counts[known].sum(axis=0))
