"""The reply gate: of malformed replies beside honest ones, none reaches the aggregate or costs others the round."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.flower_compat import take_identity
from medfl.gate import Expected, ReplyRefused, admit
from medfl.layout import Layout
from medfl.messages import RAW, Answer, from_array, to_array
from medfl.methods.base import Claim, Role
from medfl.rules import Before, site_weights, weighted_mean

ONES = np.ones(4, np.float32)
P, M = Claim(Role.PARAMETER), Claim(Role.NORM_MOMENTS)
LAYOUT = Layout.of(
    [
        ("encoder.weight", P, (4, 3), "float32"),
        ("encoder.bias", P, (4,), "float32"),
        *((f"encoder.norm.{kind}", M, (4,), "float64") for kind in ("count", "sum", "square")),
        ("book.counts", Claim(Role.CODEBOOK), (2,), "float64"),
        ("book.residuals", Claim(Role.CODEBOOK), (2,), "float64"),
        ("book.sums", Claim(Role.CODEBOOK), (2, 3), "float64"),
        ("features.count", Claim(Role.STATISTICS), (1,), "float64"),
        ("features.gram", Claim(Role.STATISTICS), (3,), "float64"),
        ("features.sum", Claim(Role.STATISTICS), (2,), "float64"),
    ]
)
BEFORE = {"parameter/all/float32": np.ones(16, np.float32)}
PARAMETER, MOMENTS = "parameter/all/float32", "norm_moments/all/float64"
BOOK, FEATURES = "codebook/all/float64", "statistics/all/float64"


def honest(site: str = "a") -> Answer:
    flat = {PARAMETER: BEFORE[PARAMETER] + np.float32(0.1), MOMENTS: np.repeat([8.0, 9.0, 2.0], 4)}
    flat[BOOK] = np.array([3.0, 2.0, 0.5, 0.4, 2.9, 0.0, 0.0, 0.0, 1.9, 0.0])
    flat[FEATURES] = np.array([4.0, 2.0, 0.5, 2.0, 1.0, 1.0])
    metrics = {"site/volumes": 32, "site/steps": 5, "loss/total": 1.0}
    return Answer(site, "nonce-7", LAYOUT.digest, metrics, flat)


def expected(site: str = "a", **changes: Any) -> Expected:
    values: dict[str, Any] = {
        "site": site, "nonce": "nonce-7", "layout": LAYOUT, "digest": LAYOUT.digest, "volumes": 100, "steps": 5,
        "before": BEFORE, "max_update": 10.0, "max_growth": 10.0,
    }  # fmt: skip
    return Expected(**(values | changes))


def reply(content: RecordDict | Error) -> Message:
    take_identity(1)
    order = Message(RecordDict(), dst_node_id=7, message_type="train.pretrain")
    return Message(content, reply_to=order)


def with_array(change: Callable[[np.ndarray], np.ndarray], group: str = PARAMETER) -> Callable[[RecordDict], None]:
    role, rest = group.split("/", 1)

    def act(content: RecordDict) -> None:
        old = from_array(content.array_records[role][rest]).copy()
        content.array_records[role][rest] = to_array(change(old))

    return act


def at(index: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def metric(name: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.metric_records["metrics"].update({name: value})


def identity(name: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.config_records["identity"].update({name: value})


def header(**fields: Any) -> Callable[[RecordDict], None]:
    """The array's own claims about itself, which need not be true."""

    def act(content: RecordDict) -> None:
        array = content.array_records["parameter"]["all/float32"]
        made = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | fields
        content.array_records["parameter"]["all/float32"] = Array(**made)

    return act


MALFORMED: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "NaN": (with_array(at(3, np.nan)), "'encoder.bias' has NaN or infinity"),
    "infinity": (with_array(at(9, np.inf)), "'encoder.weight' has NaN or infinity"),
    "overflowing values": (with_array(lambda a: a * np.float32(1e25)), "NaN or infinity"),
    "NaN in the moments": (with_array(at(5, np.nan), MOMENTS), "NaN or infinity"),
    "scaled a million times": (with_array(lambda a: a * np.float32(1e6)), "max_update=10"),
    "sign flipped and scaled": (with_array(lambda a: a * np.float32(-100)), "max_update=10"),
    "one broadcastable value": (with_array(lambda a: a[:1]), r"need \('medfl.raw', 'float32', \(16,\), 64\)"),
    "one value short": (with_array(lambda a: a[:-1]), "shape, bytes"),
    "one value more": (with_array(lambda a: np.append(a, a[:1])), "shape, bytes"),
    "reshaped": (with_array(lambda a: a.reshape(4, 4)), "shape, bytes"),
    "empty": (with_array(lambda a: a[:0]), "shape, bytes"),
    "other dtype": (with_array(lambda a: a.astype(np.float64)), "shape, bytes"),
    "integers": (with_array(lambda a: a.astype(np.int32)), "shape, bytes"),
    "header claims a terabyte": (header(shape=(10**12,)), "shape, bytes"),
    "header claims a negative shape": (header(shape=(-1,)), "shape, bytes"),
    "truncated bytes": (header(data=b"\0" * 60), "shape, bytes"),
    "serialised by another library": (header(stype="numpy.ndarray"), "shape, bytes"),
    "pickled": (header(stype="pickle", data=b"cos\nsystem\n(S'true'\ntR." + b"\0" * 41), "shape, bytes"),
    "no tensors": (lambda c: c.array_records.clear(), "is missing"),
    "missing role": (lambda c: c.array_records.__delitem__("norm_moments"), "'norm_moments/all/float64' is missing"),
    "missing array": (lambda c: c.array_records["parameter"].clear(), "'parameter/all/float32' is missing"),
    "extra role": (lambda c: c.array_records.update({"queue": ArrayRecord({"all/float32": to_array(ONES)})}),
                   "'queue/all/float32' is unexpected"),
    "extra array": (lambda c: c.array_records["parameter"].update({"x/float32": to_array(np.ones(4, "f4"))}),
                    "'parameter/x/float32' is unexpected"),
    "ten thousand arrays": (lambda c: c.array_records["parameter"].update(
        {f"{i}/float32": to_array(np.ones(1, "f4")) for i in range(10_000)}), "is unexpected"),
    "stale nonce": (identity("nonce", "nonce-6"), "stale or replayed"),
    "another site's name": (identity("site", "b"), "speaks for another site"),
    "another layout": (identity("layout", "0" * 64), "another model or release"),
    "no identity": (lambda c: c.config_records.clear(), "need 'identity' alone"),
    "extra record": (lambda c: c.config_records.update({"note": ConfigRecord({"x": "y"})}), "need 'identity' alone"),
    "patient id in the identity": (identity("patient", "0001"), "unexpected field 'patient'"),
    "no metrics": (lambda c: c.metric_records.clear(), "need 'metrics' alone"),
    "negative volumes": (metric("site/volumes", -5), "need a whole number from 1 to 100"),
    "zero volumes": (metric("site/volumes", 0), "need a whole number"),
    "NaN volumes": (metric("site/volumes", float("nan")), "need a finite number"),
    "1e12 volumes": (metric("site/volumes", 10**12), "need a finite number"),
    "more volumes than enrolled": (metric("site/volumes", 101), "from 1 to 100"),
    "fractional volumes": (metric("site/volumes", 31.5), "need a whole number"),
    "more steps than ordered": (metric("site/steps", 6), "from 1 to 5"),
    "NaN metric": (metric("loss/total", float("nan")), "need a finite number"),
    "infinite metric": (metric("loss/total", float("inf")), "need a finite number"),
    "per-patient metric": (metric("patient/0001", 1.0), "not on the list"),
    "a list as a metric": (metric("loss/total", [1.0, 2.0]), "need a finite number"),
    "a flood of metrics": (lambda c: c.metric_records["metrics"].update({f"loss/{i}": 1.0 for i in range(1001)}),
                           "at most 1000"),
    "moments of no image": (with_array(lambda a: a * 0, MOMENTS), "moments of 'encoder.norm'"),
    "negative code count": (with_array(at(0, -1.0), BOOK), "codebook 'book' are of no unit tokens"),
    "code sum longer than its tokens": (with_array(at(4, 3.1), BOOK), "codebook 'book' are of no unit tokens"),
    "impossible distance to a code": (with_array(at(2, 12.1), BOOK), "codebook 'book' are of no unit tokens"),
    "feature sums of long vectors": (with_array(at(1, 3.0), FEATURES), "features are of no unit vectors"),
    "impossible feature product": (with_array(at(2, -5.0), FEATURES), "features are of no unit vectors"),
    "impossible moments": (with_array(at(8, 1e3), MOMENTS), "moments of 'encoder.norm'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_reply_is_refused_by_name_and_costs_nobody_else(kind: str) -> None:
    spoil, finding = MALFORMED[kind]
    bad = honest().to_record()
    spoil(bad)
    with pytest.raises(ReplyRefused, match=finding) as refusal:
        admit(reply(bad), expected())
    assert "site 'a'" in str(refusal.value)
    good = [admit(reply(honest(site).to_record()), expected(site)) for site in ("b", "c")]
    mean = weighted_mean([u.flat[PARAMETER] for u in good], site_weights([u.volumes for u in good], 0.5),
                         Before(BEFORE[PARAMETER], []))  # fmt: skip
    np.testing.assert_array_equal(mean, honest().flat[PARAMETER])


def test_there_are_enough_kinds() -> None:
    assert len(MALFORMED) >= 27


def test_error_reply_is_refused_with_a_hint() -> None:
    with pytest.raises(ReplyRefused, match=r"DataError \(ticket 12\) Its data could not be used"):
        admit(reply(Error(code=1010, reason="DataError (ticket 12)")), expected())


def test_sudden_growth_is_refused_once_there_is_a_history() -> None:
    with pytest.raises(ReplyRefused, match=r"max_growth=10 times the median 0\.01"):
        admit(reply(honest().to_record()), expected(accepted=[0.01, 0.01, 5.0]))


def test_zero_update_is_fine() -> None:
    still = honest().to_record()
    with_array(lambda array: array - np.float32(0.1))(still)
    assert admit(reply(still), expected(accepted=[0.4])).norm < 1e-6


@given(st.binary(max_size=200), st.sampled_from(["parameter", "norm_moments"]))
@settings(max_examples=300, deadline=None)
def test_random_bytes_never_pass_nor_crash(data: bytes, role: str) -> None:
    content = honest().to_record()
    name = next(iter(content.array_records[role]))
    array = content.array_records[role][name]
    if len(data) != len(array.data):
        content.array_records[role][name] = Array(array.dtype, array.shape, RAW, data)
        with pytest.raises(ReplyRefused, match="shape, bytes"):
            admit(reply(content), expected())
