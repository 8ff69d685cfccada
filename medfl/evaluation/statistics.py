"""Metrics of a test split, how sure they are, and what share of central's gain a federation recovers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medfl.evaluation.metrics import METRICS, Array, Labels, Metric, auc, finite, mean, pr_auc
from medfl.seeding import key

CELLS = 300_000  # rows x resamples at once: 2.4 MB for each temporary array, which a cache can hold
OF_FINDINGS: Mapping[str, Metric] = {"auc": auc, "pr_auc": pr_auc}
SMALLEST_GAP = 0.02  # central - local below this is not a gap (rule 1 of the recovered gap)


@dataclass(frozen=True)
class Interval:
    """A value with its confidence bounds; None where it cannot be computed."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Gap:
    """One form of the recovered gap: the three arms' means over sites, and the ratio or why there is none.

    `standard_error` is that of central - local, over resampled test patients.
    """

    federated: float | None
    local: float | None
    central: float | None
    standard_error: float | None
    recovered: Interval
    reason: str


@dataclass(frozen=True)
class RecoveredGap:
    """RG (own form), RGx (cross form), and federated on site i - local_i on site i, for each site."""

    own: Gap
    cross: Gap
    benefits: tuple[Interval, ...]

    @property
    def smallest_benefit(self) -> float | None:
        """The benefit of the site that gains least."""
        return min((b.value for b in self.benefits if b.value is not None), default=None)


def draws(
    metric: Metric,
    probabilities: Array,
    labels: Labels,
    patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> Array:
    """The metric of the sample, then of `resamples` bootstrap resamples of its patients, (1 + resamples,).

    A patient comes with all its rows. The resamples depend on (patients, resamples, seed) alone: the draws of
    two models on the same rows are paired, and each site's test split needs a seed of its own. NaN where
    undefined, and in every resample below two patients.

    Raises:
        ValueError: rows disagree, or a label is outside 0..K-1.
    """
    return _draws({"": metric}, probabilities, labels, patients, resamples=resamples, seed=seed)[""]


def bootstrap(
    metric: Metric,
    probabilities: Array,
    labels: Labels,
    patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """The metric with its percentile interval over resampled patients; see `draws` and `interval`."""
    values = draws(metric, probabilities, labels, patients, resamples=resamples, seed=seed)
    return interval(values, level=level)


def measure(
    probabilities: Array,
    labels: Labels,
    patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Every metric of `METRICS` with its interval, and `n_test`: the rows of one evaluation."""
    values = _draws(METRICS, probabilities, labels, patients, resamples=resamples, seed=seed)
    table = {name: interval(each, level=level) for name, each in values.items()}
    return {**table, "n_test": Interval(float(len(labels)), None, None)}


def measure_findings(
    probabilities: Array,
    labels: Labels,
    patients: Sequence[str],
    names: Sequence[str],
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> dict[str, Interval]:
    """`OF_FINDINGS` as means over L findings, of each by itself ("auc_mass"), and `n_test`, with intervals.

    A finding counts on the rows where it is known, and on no row where it has no value: one class alone, or no
    prediction. One resample of the patients is of all findings; its mean is over those that have a value in it.

    Args:
        probabilities: (N, L) of presence; NaN where nothing could be predicted.
        labels: (N, L), 1, 0 or -1 (unknown). Rows without a known finding are left out.
        patients: (N,).
        names: (L,).
    """
    rows = np.flatnonzero((labels >= 0).any(axis=1))
    metrics = {
        f"{metric}_{name}": _of_finding(measured, place)
        for metric, measured in OF_FINDINGS.items()
        for place, name in enumerate(names)
    }
    tested = [patients[row] for row in rows.tolist()]
    values = _draws(metrics, probabilities[rows], labels[rows], tested, resamples=resamples, seed=seed)
    means = {metric: mean(np.stack([values[f"{metric}_{name}"] for name in names]), axis=0) for metric in OF_FINDINGS}
    table = {name: interval(each, level=level) for name, each in (means | values).items()}
    return {**table, "n_test": Interval(float(len(rows)), None, None)}


def interval(values: Array, *, level: float = 0.95) -> Interval:
    """Entry 0 of `draws`, with percentile bounds of the others if at least half of them are defined."""
    value, defined = finite(values[0]), values[1:][np.isfinite(values[1:])]
    if value is None or len(defined) < max(2, (len(values) - 1) / 2):
        return Interval(value, None, None)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def paired_difference(first: Array, second: Array, *, level: float = 0.95) -> Interval:
    """first - second with its interval, from `draws` of two models on the same rows with the same seed.

    Raises:
        ValueError: the numbers of draws differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"paired_difference: got draws {first.shape} and {second.shape}; need equal shapes.")
    return interval(first - second, level=level)


def mean_interval(values: Sequence[float | None], *, level: float = 0.95) -> Interval:
    """Mean over seeds with Student's interval; None and NaN are left out, no bounds below two values."""
    defined = np.array([v for v in values if v is not None and np.isfinite(v)], dtype=np.float64)
    if len(defined) < 2:
        return Interval(float(defined[0]) if len(defined) else None, None, None)
    mean, half = defined.mean(), defined.std(ddof=1) / np.sqrt(len(defined))
    half *= stats.t.ppf((1 + level) / 2, len(defined) - 1)
    return Interval(float(mean), float(mean - half), float(mean + half))


def recovered_gap(federated: Array, local: Array, central: Array, *, level: float = 0.95) -> RecoveredGap:
    """The share of central's gain over local training that the federation recovers, guarded against noise.

    Own form RG = (F - L) / (C - L) with local_i tested on its own site; cross form RGx with local_i tested on
    the other sites. A ratio is given only if C - L > max(0.02, 2 standard errors); its interval is Fieller's.

    Args:
        federated, central: `draws` on each site's test split, (S, 1 + R).
        local: (S, S, 1 + R), entry [i, j] for the encoder of site i tested on site j; NaN where not tested.

    Raises:
        ValueError: the shapes do not agree.
    """
    sites, size = federated.shape
    if central.shape != (sites, size) or local.shape != (sites, sites, size):
        raise ValueError(
            f"recovered_gap: got federated {federated.shape}, local {local.shape}, central {central.shape}; "
            f"need (S, 1 + R), (S, S, 1 + R), (S, 1 + R)."
        )
    same = np.eye(sites, dtype=bool)
    own = local[same]  # (S, 1 + R)
    others = mean(np.where(same[..., None], np.nan, local), axis=0)
    return RecoveredGap(
        own=_gap(federated, own, central, level=level),
        cross=_gap(federated, others, central, level=level),
        benefits=tuple(paired_difference(f, o, level=level) for f, o in zip(federated, own, strict=True)),
    )


def _gap(federated: Array, local: Array, central: Array, *, level: float) -> Gap:
    """One form, from (S, 1 + R) draws each; a site without a value in one arm is left out of all three."""
    whole = np.isfinite(federated) & np.isfinite(local) & np.isfinite(central)
    whole &= whole[:, :1]
    f, n, c = (mean(np.where(whole, arm, np.nan), axis=0) for arm in (federated, local, central))
    gain, gap = f - n, c - n
    usable = np.isfinite(gap[1:])
    error = float(gap[1:][usable].std(ddof=1)) if usable.sum() >= max(2, len(usable) / 2) else None
    reason = _objection(finite(n[0]), finite(c[0]), error)
    value = None if reason else float(gain[0] / gap[0])
    bounds = (None, None) if reason else _fieller(gain, gap, level=level)
    return Gap(finite(f[0]), finite(n[0]), finite(c[0]), error, Interval(value, *bounds), reason)


def _objection(local: float | None, central: float | None, error: float | None) -> str:
    """Why the ratio means nothing, or ""."""
    if local is None or central is None:
        return "no site has a value in all three arms"
    if error is None:
        return "gap not resolvable: no standard error, because no resample of the test patients is defined"
    if central < local:
        return f"central {central:.3f} is below local {local:.3f}: central is a reference, not a bound"
    need = max(SMALLEST_GAP, 2 * error)
    if central - local > need:
        return ""
    return (
        f"gap not resolvable: central - local is {central - local:.3f}, needs more than {need:.3f} "
        f"(the larger of {SMALLEST_GAP} and 2 standard errors of {error:.3f})"
    )


def _fieller(top: Array, bottom: Array, *, level: float) -> tuple[float | None, float | None]:
    """Fieller's bounds of top[0] / bottom[0], variances from the other draws; None if they are unbounded."""
    usable = np.isfinite(top[1:]) & np.isfinite(bottom[1:])
    covariance = np.cov(top[1:][usable], bottom[1:][usable]) * stats.norm.ppf((1 + level) / 2) ** 2
    a, b = bottom[0] ** 2 - covariance[1, 1], top[0] * bottom[0] - covariance[0, 1]
    if a <= 0:
        return None, None
    half = np.sqrt(max(0.0, b**2 - a * (top[0] ** 2 - covariance[0, 0])))
    return float((b - half) / a), float((b + half) / a)


def _draws(
    metrics: Mapping[str, Metric],
    probabilities: Array,
    labels: Labels,
    patients: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Array]:
    """`draws` of several metrics on the same resamples, each drawn once."""
    if len(patients) != len(labels):
        raise ValueError(f"draws: got {len(patients)} patients for {len(labels)} labels; need one a row.")
    names, rows = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    parts = [{name: metric(probabilities, labels) for name, metric in metrics.items()}]
    if len(names) < 2:
        parts.append(dict.fromkeys(metrics, np.full(resamples, np.nan)))
    else:
        parts += [
            {name: metric(probabilities, labels, counts) for name, metric in metrics.items()}
            for counts in _resampled_counts(len(names), rows, resamples, seed)
        ]
    return {name: np.concatenate([part[name] for part in parts]) for name in metrics}


def _of_finding(metric: Metric, place: int) -> Metric:
    """The metric of one column of (N, L) probabilities and labels, on the rows where it is known and predicted."""

    def measured(probabilities: Array, labels: Labels, counts: Array | None = None) -> Array:
        rows = np.flatnonzero((labels[:, place] >= 0) & np.isfinite(probabilities[:, place]))
        present = probabilities[rows, place]
        both = np.stack([1 - present, present], axis=1)
        return metric(both, labels[rows, place], None if counts is None else counts[rows])

    return measured


def _resampled_counts(patients: int, rows: NDArray[np.intp], resamples: int, seed: int) -> Iterator[Array]:
    """How often each row is in each resample, (N, r) at a time; `rows` holds each row's patient number."""
    stream = np.random.default_rng(key(seed, "bootstrap"))
    size = max(1, CELLS // len(rows))
    for start in range(0, resamples, size):
        r = min(size, resamples - start)
        picks = stream.integers(patients, size=(r, patients)) * r + np.arange(r)[:, None]
        table = np.bincount(picks.ravel(), minlength=patients * r).reshape(patients, r)
        yield table[rows].astype(np.float64)
