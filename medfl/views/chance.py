"""One random quantity of the views: applied with a probability, then uniform between two bounds."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from medfl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Chance:
    """With `probability` a value from U(low, high), else the operation's identity; `low` = `high` is a constant.

    Raises:
        ConfigError: a probability outside [0, 1], or bounds that are not finite or not in order.
    """

    probability: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"views: got probability {self.probability}, need a number from 0 (never) to 1 (always).")
        if not (isfinite(self.low) and isfinite(self.high) and self.low <= self.high):
            raise ConfigError(f"views: got the bounds {self.low} to {self.high}, need finite low <= high.")

    def within(self, name: str, *, lowest: float, highest: float = float("inf")) -> "Chance":
        """Itself, once its bounds are known to make sense for the operation `name`.

        Raises:
            ConfigError: a bound outside [lowest, highest].
        """
        if self.low < lowest or self.high > highest:
            raise ConfigError(
                f"views: {name} got the bounds {self.low} to {self.high}, need {lowest} <= low <= high <= {highest}."
            )
        return self

    def draw(self, columns: Iterator[Tensor], *, identity: float, count: int = 1) -> Tensor:
        """(R, count) values: one gate for the row, then one value each.

        It takes 1 + `count` columns whatever the gate says, so that switching one operation off leaves all others.
        """
        gate = next(columns) < self.probability
        values = torch.stack([next(columns) for _ in range(count)], dim=1)
        values = self.low + (self.high - self.low) * values
        return torch.where(gate[:, None], values, torch.tensor(identity))
