"""ε of all that a site has released of its patients, by two accountants that compose over rounds, stages and studies.

Unit: a patient with all images at this site. Adjacency: the data sets of which one has this patient and the other has
not. A statement is ε together with δ; the smaller of both accountants' bounds is one.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

UNIT = "patient with all images at this site, added or removed"
PATIENT, BUCKET = "patient", "bucket"
WEAK = 10.0  # ε above which an attacker may learn almost anything of a patient (e^10 = 22,000)
SURE = 50.0  # ε above which PRV's numbers run out, and no statement is worth its seconds
LEAST_DELTA = 1e-9  # below it the rounding of PRV's convolutions counts
BISECTIONS = 30


@dataclass(frozen=True)
class Release:
    """Noised sums: in each of `steps` steps every unit takes part with probability `rate`, with noise σ = `noise`."""

    unit: str  # patient | bucket
    noise: float
    rate: float
    steps: int


@dataclass(frozen=True)
class Spent:
    """ε per patient at `delta`: by Rényi divergences (Mironov 2017) and by privacy loss variables (Gopi et al. 2021).

    PRV is infinite where it was not computed.
    """

    rdp: float
    prv: float
    delta: float

    @property
    def epsilon(self) -> float:
        return min(self.rdp, self.prv)


def spent(releases: Sequence[Release], delta: float, *, tight: bool = True) -> Spent:
    """ε of all releases together.

    A bucket's gradient changes by up to 2C with one of its patients, so that its (ε, δ) is one of twice the ε and
    (1 + e^ε) times the δ for the patient. Releases of both units share δ in halves, and their ε add up.

    Args:
        tight: compute PRV too, which takes seconds.
    """
    histories = {unit: _history(releases, unit) for unit in (PATIENT, BUCKET)}
    used = {unit: history for unit, history in histories.items() if history}
    rdp = prv = 0.0
    for unit, history in used.items():
        share = delta / len(used)
        at, factor = (share, 1.0) if unit == PATIENT else (_of_group(history, share), 2.0)
        rdp += factor * _rdp(history, at)
        prv += factor * (_prv(history, at) if tight and rdp < SURE and at > LEAST_DELTA else math.inf)
    return Spent(rdp, prv, delta)


def noise_for(epsilon: float, delta: float, releases: Sequence[Release]) -> float:
    """The least σ (to 1 %) with which these releases cost at most ε, whatever theirs is now.

    Raises:
        ValueError: no noise below 10,000 does.
    """
    low, high = 0.1, 0.2
    while spent(_with(releases, high), delta, tight=False).rdp > epsilon:
        low, high = high, 2 * high
        if high > 10_000:
            raise ValueError(f"no noise makes these releases cost ε={epsilon} or less.")
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(_with(releases, middle), delta).epsilon <= epsilon else (middle, high)
    return high


def _with(releases: Sequence[Release], noise: float) -> list[Release]:
    return [replace(release, noise=noise) for release in releases]


def _history(releases: Sequence[Release], unit: str) -> list[tuple[float, float, int]]:
    """(σ, rate, steps), equal ones together: their order does not matter."""
    steps: dict[tuple[float, float], int] = {}
    for one in releases:
        if one.unit == unit and one.steps:
            steps[one.noise, one.rate] = steps.get((one.noise, one.rate), 0) + one.steps
    return [(noise, rate, count) for (noise, rate), count in sorted(steps.items())]


def _of_group(history: list[tuple[float, float, int]], delta: float) -> float:
    """The largest δ of a bucket (to 5 %) whose (1 + e^ε) δ is at most a patient's."""
    low, high = math.log(LEAST_DELTA) * 4, math.log(delta / 2)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        fits = math.log1p(math.exp(min(_rdp(history, math.exp(middle)), 500.0))) + middle <= math.log(delta)
        low, high = (middle, high) if fits else (low, middle)
    return math.exp(low)


def _rdp(history: list[tuple[float, float, int]], delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent  # seconds of imports

    orders = _orders()
    curve = np.sum([count * _curve(noise, rate) for noise, rate, count in history], axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an order at the end of its list is the best
        return float(get_privacy_spent(orders=orders, rdp=curve, delta=delta)[0])


@functools.lru_cache(maxsize=256)
def _curve(noise: float, rate: float) -> np.ndarray:
    """The Rényi divergence of one step, at each order; those of steps add up."""
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=_orders()))


def _orders() -> list[float]:
    from opacus.accountants import RDPAccountant

    return list(RDPAccountant.DEFAULT_ALPHAS)


def _prv(history: list[tuple[float, float, int]], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError):  # its grid cannot hold so large a loss
            return math.inf
    return found if math.isfinite(found) else math.inf
