"""Numbers as whole numbers modulo 2^32 or 2^64, whose sum over the sites cannot wrap around."""

import math
from dataclasses import dataclass

import numpy as np

from medfl.errors import ConfigError, DivergedError

UNSIGNED = {"float32": "uint32", "float64": "uint64"}
SIGNED = {"uint32": "int32", "uint64": "int64"}
LEAST_POWER = 8  # bits behind the point
CHUNK = 1 << 13  # elements: stays in the cache, and is too small for BLAS to start threads
ROUNDED = 1000  # units that roundings of all sites add up to at most


@dataclass(frozen=True)
class Scale:
    """x becomes round(x 2^power); a site's own |x| is at most `limit`, and a true sum stays below 2^(bits - 2).

    The bit that is left tells a true sum from what masks make of a wrong one. Each site rounds by at most 2^-(power+1).
    """

    dtype: str  # uint32 | uint64
    power: int
    limit: float
    key: str  # of the configuration, that sets the limit

    @classmethod
    def of(cls, dtype: str, limit: float, reach: float, key: str) -> "Scale":
        """
        Args:
            dtype: float32 | float64, of what is summed.
            reach: the largest absolute value of the sum.

        Raises:
            ConfigError: too few bits would be left behind the point.
        """
        bits = 8 * np.dtype(dtype).itemsize
        power = bits - 2 - math.ceil(math.log2(reach))
        if power < LEAST_POWER:
            raise ConfigError(
                f"{key}={limit:g}: leaves {power} bits behind the point of {bits}, need {LEAST_POWER}. Lower it."
            )
        return cls(UNSIGNED[dtype], power, limit, key)

    def encode(
        self, values: np.ndarray, into: np.ndarray, *, factor: float = 1.0, before: np.ndarray | None = None
    ) -> float:
        """Write round(factor (values - before) 2^power) into an unsigned array; ‖values - before‖² as it was.

        Raises:
            DivergedError: NaN or infinity.
            ConfigError: a value beyond the limit; it is never cut or wrapped.
        """
        signed, squares = into.view(SIGNED[self.dtype]), 0.0
        for start in range(0, values.size, CHUNK):
            place = slice(start, start + CHUNK)
            part = values[place].astype(np.float64)
            if before is not None:
                part -= before[place]
            self._check(float(np.abs(part).max()))
            squares += float(np.dot(part, part))
            part *= factor * 2.0**self.power
            signed[place] = np.rint(part, out=part)
        return squares

    def _check(self, largest: float) -> None:
        if not math.isfinite(largest):
            raise DivergedError("a value to be summed is NaN or infinite. Lower training.optimizer.lr.")
        if largest > self.limit:
            raise ConfigError(f"got a value of size {largest:.4g}, need at most {self.key}={self.limit:g}. Raise it.")

    def decode(self, total: np.ndarray) -> np.ndarray:
        """The sum (n,) in float64.

        Raises:
            ValueError: it is beyond what true values can add up to.
        """
        signed = total.view(SIGNED[self.dtype])
        most = 1 << (8 * signed.itemsize - 2)
        if signed.size and (int(signed.max()) > most + ROUNDED or int(signed.min()) < -most - ROUNDED):
            raise ValueError("the sum is beyond what its parts can add up to: a mask is left in it")
        return np.ldexp(signed.astype(np.float64), -self.power)
