"""Every exported form, reloaded and compared with the run's own encoder."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medfl.errors import DataError
from medfl.export import WEIGHTS, image_shape, load_encoder, value_range
from medfl.exports import bundle, onnx

FILES = {"safetensors": WEIGHTS, "bundle": bundle.FOLDER, "onnx": onnx.FILE}  # format -> what is written of it
BATCHES = (1, 3)
TOLERANCE = 1e-4  # of the features, or of the largest one where that is above 1
SEED = 0


@torch.no_grad()
def verify(folder: Path, formats: Sequence[str], reference: nn.Module, facts: Mapping[str, Any]) -> dict[str, float]:
    """Format -> largest absolute difference of its features, over random images in batches of 1 and 3.

    Args:
        folder: what was exported.
        reference: the run's own encoder.
        facts: its encoder.json.

    Raises:
        DataError: a format gives other features.
    """
    random, (low, high) = torch.Generator().manual_seed(SEED), value_range(facts)
    images = [low + (high - low) * torch.rand(size, *image_shape(facts), generator=random) for size in BATCHES]
    expected = [reference(batch) for batch in images]
    limit = TOLERANCE * max(1.0, *(float(features.abs().max()) for features in expected))
    found = {}
    for name in formats:
        encoder = reloaded(folder, name)
        found[name] = max(_apart(encoder(batch), features) for batch, features in zip(images, expected, strict=True))
        if not found[name] <= limit:
            raise DataError(
                f"{name} in {folder} gives features that differ by {found[name]:.2g} from the run's encoder, need at "
                f"most {limit:.2g}. Do not use it: delete {folder} and export again."
            )
    return found


def reloaded(folder: Path, name: str) -> Callable[[Tensor], Tensor]:
    """One format as its users load it."""
    loaders: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "safetensors": lambda: load_encoder(folder),
        "bundle": lambda: bundle.load(folder / bundle.FOLDER),
        "onnx": lambda: onnx.load(folder / onnx.FILE),
    }
    return loaders[name]()


def _apart(got: Tensor, expected: Tensor) -> float:
    """Infinite where shapes differ; NaN, which no limit allows, where either is."""
    return float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
