"""The reply gate: what a site sends reaches the aggregate only if it is exactly what was asked for.

Every check names the site and the finding; a refused reply costs that site the round and nobody else. Sizes are
compared before any memory is taken for the content.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Array, Message, RecordDict

from medfl import allowed
from medfl.errors import MedflError
from medfl.evaluation import counts
from medfl.evaluation.collapse import symmetric
from medfl.forms import Form
from medfl.layout import CODED, DTYPES, WHOLE, Flat, Layout, carrier, finite
from medfl.messages import PACKABLE, PACKED, RAW, SITE_ERROR, arrays_of, from_array
from medfl.methods.base import Role

CHUNK = 1 << 16  # elements
ROUNDING = 1e-3  # share by which sums in low precision may pass their bound
HINTS = {
    3: "Its configuration is refused there.",
    10: "Its data could not be used.",
    11: "The site refuses the study.",
    21: "Its approval or a key is missing or expired.",
    30: "It ran out of memory or disk.",
    40: "It has another release.",
    50: "Its training diverged.",
    60: "The privacy budget of its patients is spent.",
}


class ReplyRefused(MedflError):
    """One site's reply does not count in this round."""


@dataclass(frozen=True)
class Expected:
    """What a reply must be."""

    site: str
    nonce: str
    layout: Layout  # of the reply's tensors, for the owner groups this site holds
    digest: str  # of the whole reply layout
    volumes: int = 0  # enrolled training volumes; 0: the reply claims none
    steps: int = 0
    before: Flat = field(default_factory=dict)  # the broadcast, to measure the update
    length: float | None = None  # the broadcast's L2 norm, where it was computed before
    max_update: float = math.inf
    max_growth: float = math.inf
    accepted: Sequence[float] = ()  # norms of the updates accepted so far
    least: int = counts.LEAST  # patients behind each count
    form: Form | None = None  # in which the update comes, of these owner groups; None: as new weights


@dataclass(frozen=True)
class Update:
    """An admitted reply. `flat` are views of the message's bytes; `norm` is the L2 norm of parameters − broadcast."""

    site: str
    flat: Flat
    volumes: int
    metrics: dict[str, float]
    norm: float


def admit(reply: Message, expected: Expected) -> Update:
    """The update in `reply`.

    Raises:
        ReplyRefused: the reply is an error, stale, of another site or layout, has missing, extra, reshaped, oversized
            or non-finite tensors, an update beyond the norm limits, or numbers that are not on the list.
    """
    if reply.has_error():
        raise ReplyRefused(
            f"site '{expected.site}': {reply.error.reason} {HINTS.get(reply.error.code - SITE_ERROR, '')}"
        )
    content = reply.content
    _check_identity(content, expected)
    metrics = _metrics(content, expected)
    flat = _tensors(content, expected)
    _check_moments(flat, expected)
    _check_codebooks(flat, expected)
    _check_features(flat, expected)
    _check_counts(flat, metrics, expected)
    return Update(expected.site, flat, int(metrics.get("site/volumes", 0)), metrics, _update_norm(flat, expected))


def _refuse(expected: Expected, finding: str) -> ReplyRefused:
    return ReplyRefused(f"site '{expected.site}': {finding}")


def _check_identity(content: RecordDict, expected: Expected) -> None:
    identity = content.config_records.get("identity")
    if identity is None or set(content.config_records) != {"identity"}:
        raise _refuse(expected, f"got the records {sorted(content.config_records)}, need 'identity' alone.")
    wanted = {"site": expected.site, "nonce": expected.nonce, "layout": expected.digest}
    meaning = {
        "site": "it speaks for another site",
        "nonce": "it answers another request (stale or replayed)",
        "layout": "it has another model or release",
    }
    for name, value in wanted.items():
        if identity.get(name) != value:
            raise _refuse(
                expected, f"{name} is {str(identity.get(name))[:40]!r}, need {value[:40]!r}: {meaning[name]}."
            )
    if extra := sorted(identity.keys() - wanted.keys()):
        raise _refuse(expected, f"unexpected field {str(extra[0])[:40]!r} in its identity.")


def _metrics(content: RecordDict, expected: Expected) -> dict[str, float]:
    record = content.metric_records.get("metrics")
    if record is None or set(content.metric_records) != {"metrics"}:
        raise _refuse(expected, f"got the metric records {sorted(content.metric_records)}, need 'metrics' alone.")
    metrics = checked_metrics(record.items(), expected.site)
    if expected.volumes:
        _check_count("site/volumes", record.get("site/volumes"), expected.volumes, expected)
        _check_count("site/steps", record.get("site/steps"), expected.steps, expected)
    return metrics


def checked_metrics(items: Iterable[tuple[str, object]], site: str) -> dict[str, float]:
    """The named numbers, if all of them may be sent."""
    try:
        return allowed.checked_metrics(items)
    except ValueError as error:
        raise ReplyRefused(f"site '{site}': {error}") from None


def _check_count(name: str, value: object, most: int, expected: Expected) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise _refuse(expected, f"{name} is {str(value)[:40]}, need a whole number from 1 to {most}.")


def _tensors(content: RecordDict, expected: Expected) -> Flat:
    arrays, sizes = arrays_of(content), expected.layout.sizes
    if odd := sorted(arrays.keys() ^ sizes.keys()):
        state = "missing" if odd[0] in sizes else "unexpected"
        raise _refuse(expected, f"array {odd[0][:60]!r} is {state}; need exactly {sorted(sizes)}.")
    flat = {}
    for group, size in sizes.items():
        _check_header(group, arrays[group], size, expected)
        try:
            flat[group] = from_array(arrays[group])
        except ValueError as error:
            raise _refuse(expected, f"array {group!r}: {error}.") from None
    layout = expected.layout
    if expected.form is not None:
        flat, layout = _decoded(flat, expected.form, expected), expected.form.plain
    for group, array in flat.items():
        if not finite(array):
            raise _refuse(
                expected, f"{_first_bad(group, array, layout)} has NaN or infinity. Lower training.optimizer.lr."
            )
    return flat


def _decoded(coded: Flat, form: Form, expected: Expected) -> Flat:
    """New weights from a coded change: beside the server's own weights, whose rounding would swallow small changes."""
    try:
        flat = form.decode(coded)
    except ValueError as error:
        raise _refuse(expected, str(error)) from None
    with np.errstate(over="ignore", invalid="ignore"):  # found by name in the next step
        for group in form.groups:
            np.add(flat[group], expected.before[group], out=flat[group])
    return flat


def _check_header(group: str, array: Array, size: int, expected: Expected) -> None:
    dtype = group.rpartition("/")[2]
    got = (array.stype, array.dtype, tuple(array.shape), len(array.data))
    if dtype not in (*DTYPES, *WHOLE, *CODED):
        raise _refuse(expected, f"array {group!r} is of a dtype that is never asked for.")
    kind = carrier(dtype)
    need = (RAW, str(kind), (size,), size * kind.itemsize)
    packed = kind.itemsize == PACKABLE and len(array.data) < need[3]  # what is longer travels as it is
    if got != need and not (packed and got[:3] == (PACKED, *need[1:3])):
        raise _refuse(expected, f"array {group!r} has (form, dtype, shape, bytes) = {str(got)[:120]}, need {need}.")


def _first_bad(group: str, array: np.ndarray, layout: Layout) -> str:
    name = layout.unsound(group, array)
    return f"'{name}'" if name else f"array '{group}'"


def _check_moments(flat: Flat, expected: Expected) -> None:
    """Counts are positive and no second moment is below the square of the first (Cauchy-Schwarz)."""
    tensors = expected.layout.of_role(Role.NORM_MOMENTS).unpack(flat)
    for name in (n.removesuffix(".count") for n in tensors if n.endswith(".count")):
        count, total, square = (tensors[f"{name}.{kind}"] for kind in ("count", "sum", "square"))
        if (
            bool((count < 1).any())
            or bool((count != count[0]).any())
            or bool((square * count < total.square() * (1 - 1e-6)).any())
        ):
            raise _refuse(expected, f"the moments of '{name}' are of no data: count {float(count.min()):g}.")


def _check_codebooks(flat: Flat, expected: Expected) -> None:
    """Counts are not negative, no sum of unit tokens is longer than their count, no distance above the largest, 2."""
    tensors = expected.layout.of_role(Role.CODEBOOK).unpack(flat)
    for name in (n.removesuffix(".counts") for n in tensors if n.endswith(".counts")):
        counts, sums = tensors[f"{name}.counts"], tensors[f"{name}.sums"]
        most = counts * (1 + ROUNDING) + ROUNDING
        residuals = tensors.get(f"{name}.residuals", torch.zeros_like(counts))
        short = bool((torch.linalg.vector_norm(sums, dim=1) <= most).all())
        near = bool((residuals >= 0).all()) and bool((residuals <= 4 * most).all())
        if not (bool((counts >= 0).all()) and short and near):
            raise _refuse(expected, f"the sums of codebook '{name}' are of no unit tokens.")


def _check_features(flat: Flat, expected: Expected) -> None:
    """Unit features: the trace of Σzzᵀ is their count, and Σz is no longer than it."""
    tensors = expected.layout.of_role(Role.STATISTICS).unpack(flat)
    if "features.count" not in tensors:
        return
    count, total, gram = (tensors[f"features.{kind}"] for kind in ("count", "sum", "gram"))
    gram = symmetric(gram)
    most = count * (1 + ROUNDING)
    if not 0 <= gram.trace() <= most or bool(torch.linalg.vector_norm(total) > most) or bool((gram.abs() > most).any()):
        raise _refuse(expected, "the sums of its features are of no unit vectors.")


def _check_counts(flat: Flat, metrics: dict[str, float], expected: Expected) -> None:
    """Counts of test images stand for enough patients each, and agree with each other and with the scores."""
    tensors = expected.layout.of_role(Role.STATISTICS).unpack(flat)
    for name in (n.removesuffix(".histogram") for n in tensors if n.endswith(".histogram")):
        histogram, confusion = (tensors[f"{name}.{kind}"].numpy() for kind in ("histogram", "confusion"))
        try:
            counts.check(histogram, confusion, least=expected.least)
        except ValueError as error:
            raise _refuse(expected, f"protocol '{name}': {error}") from None
        images, tested = histogram.sum(axis=(1, 2)).max(), metrics.get(f"{name}/n_test/value", 0.0)
        if images not in (0.0, tested):
            raise _refuse(expected, f"protocol '{name}' counts {images:g} images, and tested {tested:g}, need as many.")


def _square(after: np.ndarray, before: np.ndarray | None = None) -> float:
    """‖after - before‖², in parts that stay in the cache: torch.dist takes five times as long. None: of zeros."""
    change = 0.0
    buffer = np.empty(min(CHUNK, after.size), after.dtype)
    for start in range(0, after.size, CHUNK):
        moved = after[start : start + CHUNK]
        if before is not None:
            moved = np.subtract(moved, before[start : start + CHUNK], out=buffer[: moved.size])
        change += float(np.dot(moved, moved))
    return change


def length_of(flat: Flat) -> float:
    """L2 norm of the parameters and momentum encoders in a broadcast."""
    counted = [array for group, array in flat.items() if group.startswith(("parameter/", "target/"))]
    return math.sqrt(sum(_square(array) for array in counted))


def _update_norm(flat: Flat, expected: Expected) -> float:
    change = 0.0
    for group, before in expected.before.items():
        if group.startswith(("parameter/", "target/")) and group in flat:  # what is not answered was left alone
            change += _square(flat[group], before)
    norm, length = math.sqrt(change), length_of(expected.before) if expected.length is None else expected.length
    if norm > expected.max_update * length:
        raise _refuse(
            expected,
            f"its update has norm {norm:.3g}, more than rounds.max_update={expected.max_update:g} "
            f"times the broadcast's {length:.3g}.",
        )
    if expected.accepted and norm > expected.max_growth * float(np.median(expected.accepted)):
        raise _refuse(
            expected,
            f"its update has norm {norm:.3g}, more than rounds.max_growth={expected.max_growth:g} "
            f"times the median {float(np.median(expected.accepted)):.3g} so far.",
        )
    return norm
