"""The intensity part of a strong view: which operations there are, their ranges, and their application to rows."""

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from math import ceil, inf
from typing import NamedTuple

import torch
from torch import Tensor

from medfl.errors import ConfigError
from medfl.views import operations
from medfl.views.poisson import poisson
from medfl.views.span import Span

JITTER = {"brightness": (0, inf), "contrast": (0, inf), "saturation": (0, inf), "hue": (-0.5, 0.5), "gamma": (0.05, 20)}


class Operation(IntEnum):
    """The seven that are chosen from, after the resized crop."""

    ROTATE = 0
    JITTER = 1
    AUTO_CONTRAST = 2
    EQUALIZE = 3
    SHARPNESS = 4
    BRIGHTNESS = 5
    PHOTONS = 6  # Poisson noise perturbation, PNP


class Numbers(NamedTuple):
    """What is drawn for each row, (R,) each, whether its operation is chosen or not."""

    jitter_brightness: Tensor
    jitter_contrast: Tensor
    jitter_saturation: Tensor
    jitter_hue: Tensor
    jitter_gamma: Tensor
    sharpness: Tensor
    sigma: Tensor
    brightness: Tensor
    photons: Tensor


class Tone:
    """What is drawn for the intensity part; see `configs/views/eight.yaml` for units and defaults.

    Args:
        jitter: bounds of `brightness`, `contrast` and `saturation` (factors), `hue` (part of the colour circle) and
            `gamma` (exponent).
        percentiles: what auto contrast takes to 0 and 1, as parts of all voxels.
        sharpness: factor of the blend with the smoothed image.
        sigma: of the smoothing of volumes, in voxels.
        brightness: factor.
        photons: expected count at the value 1, κ of y = Poisson(κ u) / κ; log-uniform.

    Raises:
        ConfigError: bounds that cannot be used.
    """

    def __init__(
        self,
        *,
        jitter: Mapping[str, Sequence[float]],
        percentiles: Sequence[float],
        sharpness: Sequence[float],
        sigma: Sequence[float],
        brightness: Sequence[float],
        photons: Sequence[float],
    ) -> None:
        if odd := JITTER.keys() ^ jitter.keys():
            raise ConfigError(f"views: jitter has {', '.join(sorted(odd))} too many or too few, need {list(JITTER)}.")
        self.jitter = [
            Span.read(f"jitter.{name}", jitter[name], lowest=lowest, highest=highest)
            for name, (lowest, highest) in JITTER.items()
        ]
        self.percentiles = Span.read("percentiles", percentiles, lowest=0, highest=1)
        self.sharpness = Span.read("sharpness", sharpness, lowest=0)
        self.sigma = Span.read("sigma", sigma, lowest=0.05, highest=16)
        self.brightness = Span.read("brightness", brightness, lowest=0)
        self.photons = Span.read("photons", photons, lowest=0.1, highest=1e6)

    def columns(self) -> int:
        """How many uniform columns `draw` takes."""
        return len(Numbers._fields)

    def draw(self, columns: Iterator[Tensor]) -> Tensor:
        """The `Numbers` of all rows as one table (R, 9)."""
        spans = (*self.jitter, self.sharpness, self.sigma, self.brightness)
        even = [span.at(next(columns)) for span in spans]
        return torch.stack([*even, self.photons.at_ratio(next(columns))], dim=1)

    @property
    def _radius(self) -> int:
        """Of the smoothing of volumes."""
        return ceil(3 * self.sigma.high)

    def smoothing(self, table: Tensor, dims: int) -> tuple[Tensor, float]:
        """`operations.smoothing` of all rows."""
        return operations.smoothing(Numbers(*table.unbind(1)).sigma, dims, radius=self._radius)

    def changed(self, u: Tensor, operation: Operation, table: Tensor, salts: Tensor) -> Tensor:
        """Rows u (R, C, *S) in [0, 1] after one operation, with their rows of the table and of the salts."""
        drawn = Numbers(*table.unbind(1))
        match operation:
            case Operation.JITTER:
                return jittered(u, drawn)
            case Operation.AUTO_CONTRAST:
                return operations.stretched(u, self.percentiles.low, self.percentiles.high)
            case Operation.EQUALIZE:
                return operations.equalized(u)
            case Operation.SHARPNESS:
                return operations.sharpened(u, drawn.sharpness, drawn.sigma, radius=self._radius)
            case Operation.BRIGHTNESS:
                return operations.brightened(u, drawn.brightness)
            case Operation.PHOTONS:
                kappa = drawn.photons.view(-1, *[1] * (u.ndim - 1))
                return poisson(u * kappa, salts).div_(kappa).clamp_max_(1)
            case Operation.ROTATE:
                return u  # part of the crop's resampling


def jittered(u: Tensor, drawn: Numbers) -> Tensor:
    """Brightness and contrast, then of planes with three channels saturation and hue, of volumes gamma."""
    u = operations.brightened(u, drawn.jitter_brightness)
    u = operations.contrasted(u, drawn.jitter_contrast)
    if operations.is_colour(u):
        return operations.recoloured(u, drawn.jitter_saturation, drawn.jitter_hue)
    return operations.curved(u, drawn.jitter_gamma) if u.ndim == 5 else u
