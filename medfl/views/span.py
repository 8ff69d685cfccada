"""The bounds of one random quantity, and the value that a uniform number picks between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, log

import torch
from torch import Tensor

from medfl.errors import ConfigError


@dataclass(frozen=True)
class Span:
    """From low to high; equal bounds are a constant."""

    low: float
    high: float

    @classmethod
    def read(cls, name: str, bounds: Sequence[float], *, lowest: float = -inf, highest: float = inf) -> "Span":
        """The span of `bounds` (low, high), for the quantity `name` of a config.

        Raises:
            ConfigError: not two finite numbers in order, or one outside [lowest, highest].
        """
        if isinstance(bounds, str) or len(bounds) != 2 or not all(isfinite(bound) for bound in bounds):
            raise ConfigError(f"views: {name} got {bounds!r}, need two finite numbers, [low, high].")
        low, high = (float(bound) for bound in bounds)
        if not lowest <= low <= high <= highest:
            raise ConfigError(
                f"views: {name} got the bounds {low} to {high}, need {lowest} <= low <= high <= {highest}."
            )
        return cls(low, high)

    def at(self, uniform: Tensor) -> Tensor:
        """Values evenly spread over the span, for numbers in [0, 1)."""
        return self.low + (self.high - self.low) * uniform

    def at_ratio(self, uniform: Tensor) -> Tensor:
        """Values whose logarithms are evenly spread; needs low > 0."""
        return torch.exp(log(self.low) + log(self.high / self.low) * uniform).clamp(self.low, self.high)
