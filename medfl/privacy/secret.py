"""Randomness that nobody else knows: of the noise, and of who takes part in a step.

Both guarantees fail where a study's seed, which all its members know, draws them. Philox (Salmon et al. 2011) with
a key from the operating system is used on every device; attacks on the rounding of Gaussian noise are out of scope.
"""

import os

import numpy as np
import torch
from torch import Tensor


class Secret:
    """A stream of random numbers from `os.urandom`.

    Args:
        key: of a test alone: equal keys give equal numbers.
    """

    def __init__(self, key: int | None = None) -> None:
        self._key = int.from_bytes(os.urandom(16), "big") if key is None else key
        self._random = np.random.Generator(np.random.Philox(key=self._key))
        self._devices: dict[torch.device, torch.Generator] = {}

    def normal(self, size: int, device: torch.device) -> Tensor:
        """(size,) float32, standard normal."""
        if device.type == "cpu":
            return torch.from_numpy(self._random.standard_normal(size, dtype=np.float32))
        if device not in self._devices:
            self._devices[device] = torch.Generator(device).manual_seed(self.key())
        return torch.randn(size, device=device, generator=self._devices[device])

    def chosen(self, count: int, rate: float) -> Tensor:
        """Indices below `count`, each of them with probability `rate`, independently: a Poisson sample."""
        return torch.from_numpy(np.flatnonzero(self._random.random(count) < rate))

    def some(self, rows: Tensor, most: int) -> Tensor:
        """At most so many of the rows, drawn without replacement."""
        if len(rows) <= most:
            return rows
        return rows[torch.from_numpy(self._random.permutation(len(rows))[:most])]

    def key(self) -> int:
        """A seed below 2^63."""
        return int(self._random.integers(2**63 - 1))
