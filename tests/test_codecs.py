"""Compressed weights: how far each codec may be off, what is sent over the rounds, and what the gate takes."""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from medfl import codecs, config
from medfl.egress import check, contents
from medfl.errors import ConfigError, DivergedError
from medfl.forms import Form, sound
from medfl.gate import ReplyRefused, Update, admit
from medfl.layout import Flat, Layout
from medfl.messages import PACKED, RAW, Answer, from_array, sizes_of, to_array
from medfl.methods.base import Claim, Role
from medfl.site_wire import closed
from tests.test_gate import at, expected, reply, with_array

P, T, M = Claim(Role.PARAMETER), Claim(Role.TARGET), Claim(Role.NORM_MOMENTS)
LAYOUT = Layout.of(
    [
        ("a.weight", P, (3, 100), "float32"),
        ("a.bias", P, (100,), "float32"),
        ("b.weight", P, (5, 1, 2), "float32"),
        ("head.weight", Claim(Role.PARAMETER, "modality:t1"), (4, 70), "float32"),
        ("only.bias", Claim(Role.PARAMETER, "modality:t2"), (2,), "float32"),
        ("slow.weight", T, (3, 100), "float32"),
        *((f"norm.{kind}", M, (2,), "float64") for kind in ("count", "sum", "square")),
    ]
)
PARAMETER, SUMS = "parameter/all/float32", "norm_moments/all/float64"
COMPRESSED = ("bf16", "fp16", "int8", "topk")
VALUES = arrays.arrays(
    np.float32, st.integers(1, 700), elements=st.floats(-(2.0**60), 2.0**60, width=32), fill=st.just(np.float32(0.25))
)


def form_of(kind: str) -> Form:
    return Form.of(kind, LAYOUT, 0.1)


def drawn(seed: int, scale: float = 1.0) -> Flat:
    draw = np.random.default_rng(seed)
    flat = {g: (scale * draw.standard_normal(n)).astype(g.rpartition("/")[2]) for g, n in LAYOUT.sizes.items()}
    return flat | {SUMS: np.repeat([8.0, 9.0, 2.0], 2)}


@given(VALUES)
@settings(deadline=None)
def test_halves_are_off_by_their_rounding_alone(values: np.ndarray) -> None:
    bits, back = np.empty(values.size, np.uint16), np.empty_like(values)
    codecs.to_half(values, "bfloat16", bits)
    codecs.of_half(bits, "bfloat16", back)
    assert (np.abs(back.astype(float) - values) <= 2.0**-8 * np.abs(values) + 2.0**-134).all()
    small = np.clip(values, -65504, 65504)
    halves = np.empty(small.size, np.float16)
    codecs.to_half(small, "float16", halves)
    codecs.of_half(halves, "float16", back)
    assert (np.abs(back.astype(float) - small) <= np.maximum(2.0**-11 * np.abs(small), 2.0**-25)).all()


@given(VALUES)
@settings(deadline=None)
def test_int8_is_off_by_half_a_scale_of_its_own_block(values: np.ndarray) -> None:
    codes, scales = np.empty(values.size, np.int8), np.empty(codecs.scales_of(values.size), np.float32)
    back = np.empty_like(values)
    codecs.to_int8(values, codes, scales)
    codecs.of_int8(codes, scales, back)
    assert scales.size == -(-values.size // 256)
    for start in range(0, values.size, 256):
        block = values[start : start + 256].astype(float)
        error = np.abs(back[start : start + 256] - block)
        assert error.max() <= np.abs(block).max() / 254 * (1 + 1e-5) + 127 * float(codecs.SMALLEST)


@given(VALUES, st.floats(0.001, 0.5))
@settings(deadline=None)
def test_the_largest_are_chosen_and_all_else_is_zero(values: np.ndarray, share: float) -> None:
    count = int(np.ceil(share * values.size))
    places, kept = np.empty(count, np.uint32), np.empty(count, np.float32)
    codecs.to_largest(values, places, kept)
    back = codecs.of_largest(places, kept, values.size)
    assert (np.diff(places.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(np.sort(np.abs(kept)), np.sort(np.abs(values))[values.size - count :])
    np.testing.assert_array_equal(back[places], values[places])
    assert np.count_nonzero(back) <= count


def test_long_arrays_are_coded_like_their_parts() -> None:
    values = np.random.default_rng(0).standard_normal(2 * codecs.CHUNK + 1000).astype(np.float32)
    codes, scales = np.empty(values.size, np.int8), np.empty(codecs.scales_of(values.size), np.float32)
    codecs.to_int8(values, codes, scales)
    part, scale = np.empty(256, np.int8), np.empty(1, np.float32)
    for start in (0, codecs.CHUNK, 2 * codecs.CHUNK + 512):
        codecs.to_int8(values[start : start + 256], part, scale)
        np.testing.assert_array_equal(part, codes[start : start + 256])
        assert scale[0] == scales[start // 256]
    places, kept = np.empty(300, np.uint32), np.empty(300, np.float32)
    codecs.to_largest(values, places, kept)
    np.testing.assert_array_equal(places, np.sort(np.argsort(np.abs(values))[-300:]))


@pytest.mark.parametrize("kind", COMPRESSED)
def test_a_form_says_what_travels_and_brings_it_back(kind: str) -> None:
    form, flat = form_of(kind), drawn(0)
    coded = form.encode(flat)
    assert {g: a.size for g, a in coded.items()} == form.coded.sizes
    assert sum(a.nbytes for a in coded.values()) == sum(slot.bytes for slot in form.coded.slots)
    lines = contents(form.coded, {group: array.nbytes for group, array in coded.items()})
    assert sum(int(line.split(" ")[4]) for line in lines) == sum(a.nbytes for a in coded.values())
    back = form.decode(coded)
    assert {g: (a.dtype, a.size) for g, a in back.items()} == {g: (a.dtype, a.size) for g, a in flat.items()}
    assert back[SUMS] is flat[SUMS]  # sums are never compressed
    tensors, plain = LAYOUT.unpack(back), LAYOUT.unpack(flat)
    for name, tensor in plain.items():
        if kind in ("int8", "topk") and tensor.ndim < 2:
            assert tensor.equal(tensors[name]), name
        elif kind != "topk":
            assert float((tensors[name] - tensor).abs().max()) <= float(tensor.abs().max()) / 254 * (1 + 1e-5), name
    own = form.owned(("modality:t1",))
    part = own.decode({g: a for g, a in coded.items() if g in own.coded.sizes})
    assert part.keys() == LAYOUT.owned(("modality:t1",)).sizes.keys()
    assert all(np.array_equal(array, back[group]) for group, array in part.items())


@given(arrays.arrays(np.uint16, st.integers(0, 600)))
@settings(deadline=None)
def test_packing_loses_nothing(halves: np.ndarray) -> None:
    for dtype in (np.dtype(np.uint16), np.dtype(np.float16)):
        found = codecs.of_packed(codecs.to_packed(halves), halves.size, dtype)
        assert found.dtype == dtype
        assert found.tobytes() == halves.tobytes()
    with pytest.raises(ValueError, match="not those of 1000000000000 values"):
        codecs.of_packed(codecs.to_packed(halves), 10**12, np.dtype(np.uint16))


def test_halves_travel_packed_where_that_is_shorter_and_the_records_say_their_true_bytes() -> None:
    form, flat = form_of("bf16"), drawn(0)
    coded = form.encode(flat)
    record = Answer("a", "n", form.digest, {}, coded).to_record()
    sent = record.array_records["parameter"]["all/bfloat16"]
    assert (sent.stype, to_array(np.random.default_rng(0).integers(1 << 16, size=999, dtype=np.uint16)).stype) == (
        PACKED,
        RAW,
    )
    assert len(sent.data) < 0.85 * coded["parameter/all/bfloat16"].nbytes
    assert np.array_equal(from_array(sent), coded["parameter/all/bfloat16"])
    sizes = sizes_of(record)
    assert sum(sizes.values()) == sum(len(a.data) for arrays in record.array_records.values() for a in arrays.values())
    told = list(form.coded.crossing(sizes))
    assert [slot for slot, _ in told] == list(form.coded.slots)
    assert sum(size for _, size in told) == sum(sizes.values())
    assert all(size == slot.bytes for slot, size in told if slot.dtype == "float64")


def test_blocks_never_cross_tensors() -> None:
    form, flat = form_of("int8"), drawn(0)
    before = LAYOUT.unpack(form.decode(form.encode(flat)))
    LAYOUT.unpack(flat)["a.weight"].mul_(1e6)
    after = LAYOUT.unpack(form.decode(form.encode(flat)))
    assert [name for name, tensor in before.items() if not tensor.equal(after[name])] == ["a.weight"]


def test_both_ends_agree_on_the_form_and_not_only_on_the_model() -> None:
    digests = [form_of(kind).digest for kind in ("fp32", *COMPRESSED)] + [Form.of("topk", LAYOUT, 0.2).digest]
    assert len(set(digests)) == 6
    assert digests[0] == LAYOUT.digest
    assert form_of("int8").owned(()).digest == form_of("int8").digest


@pytest.mark.parametrize("kind", ["int8", "topk"])
def test_what_is_not_sent_is_kept_and_sent_later(kind: str) -> None:
    """Over the rounds, what was sent and what is left add up to what was changed."""
    form, before, kept = form_of(kind), drawn(0), {}
    changed, sent = ({g: np.zeros(LAYOUT.sizes[g]) for g in form.groups} for _ in range(2))
    for number in range(1, 9):
        local = {g: a + drawn(number, 1e-2)[g] if g in form.groups else a for g, a in before.items()}
        for group in form.groups:
            changed[group] += local[group].astype(float) - before[group]
        coded, kept = closed(form, local, before, kept)
        decoded = form.decode(coded)
        for group in form.groups:
            sent[group] += decoded[group]
    for (name, left), group in zip(kept.items(), form.groups, strict=True):
        assert name.endswith(group)
        np.testing.assert_allclose(sent[group] + left.numpy(), changed[group], atol=1e-6)
    rest = {group: np.linalg.norm(changed[group] - sent[group]) for group in form.groups}
    assert rest[PARAMETER] < np.linalg.norm(changed[PARAMETER])
    other = Form.of(kind, LAYOUT.of_role(Role.PARAMETER), 0.1)
    assert not set(closed(other, drawn(1), before, kept)[1]) & set(kept)  # of another model nothing is taken


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_halves_keep_nothing_and_small_changes_arrive(kind: str) -> None:
    form, before = form_of(kind), {g: np.ones(n, g.rpartition("/")[2]) for g, n in LAYOUT.sizes.items()}
    coded, kept = closed(form, {g: a + np.float32(1e-5) for g, a in before.items()}, before, {})
    assert not kept
    np.testing.assert_allclose(form.decode(coded)[PARAMETER], 1e-5, rtol=0.02)  # a bf16 of 1.00001 would be 1


@pytest.mark.parametrize(("kind", "value"), [("bf16", np.nan), ("int8", np.inf), ("topk", np.nan), ("fp16", 7e4)])
def test_what_cannot_be_sent_is_an_error_by_name(kind: str, value: float) -> None:
    local, before = drawn(1), drawn(0)
    LAYOUT.unpack(local)["b.weight"][1] = value
    with pytest.raises(DivergedError, match="'b.weight' has " + ("a value beyond 65504" if kind == "fp16" else "NaN")):
        closed(form_of(kind), local, before, {})


def test_the_egress_gate_reads_every_dtype() -> None:
    assert not sound(np.array([0x7F80], np.uint16), "bfloat16")
    assert not sound(np.array([0xFFC1], np.uint16), "bfloat16")
    assert sound(np.array([0x7F7F, 0x3F80], np.uint16), "bfloat16")
    assert not sound(np.array([np.inf], np.float16), "float16")
    form = form_of("bf16")
    answer = Answer("a", "n", form.digest, {}, form.encode(drawn(0)))
    check(answer, form.coded)
    answer.flat["parameter/all/bfloat16"][7] = 0x7F80
    with pytest.raises(DivergedError, match="parameter/all/bfloat16"):
        check(answer, form.coded)


def answered(kind: str) -> tuple[RecordDict, Any]:
    """A reply of a small change, and what the gate expects."""
    form, before = form_of(kind), drawn(0)
    local = {g: a + drawn(1, 1e-3)[g] if g in form.groups else a for g, a in before.items()}
    coded, _ = closed(form, local, before, {})
    metrics = {"site/volumes": 32, "site/steps": 5, "loss/total": 1.0}
    record = Answer("a", "nonce-7", form.digest, metrics, coded).to_record()
    return record, expected(layout=form.coded, digest=form.digest, before=before, form=form)


@pytest.mark.parametrize("kind", COMPRESSED)
def test_the_gate_makes_new_weights_of_a_change(kind: str) -> None:
    record, wanted = answered(kind)
    got: Update = admit(reply(record), wanted)
    local = {g: wanted.before[g] + drawn(1, 1e-3)[g] for g in wanted.form.groups}
    assert got.flat.keys() == LAYOUT.sizes.keys()
    for group, array in local.items():
        assert got.flat[group].dtype == np.float32
        if kind != "topk":
            np.testing.assert_allclose(got.flat[group], array, atol=2e-5)
    assert 0 < got.norm < 0.1


def swapped(array: np.ndarray) -> np.ndarray:
    array[[0, 1]] = array[[1, 0]]
    return array


Spoil = Callable[[RecordDict], None]


def sent_as(change: Callable[[bytes], bytes]) -> Spoil:
    """Packed bytes that are other ones."""

    def act(content: RecordDict) -> None:
        array = content.array_records["parameter"]["all/bfloat16"]
        assert array.stype == PACKED
        content.array_records["parameter"]["all/bfloat16"] = Array(array.dtype, array.shape, PACKED, change(array.data))

    return act


def deflated(upper: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(upper) + deflate.flush()


FP16, INT8, PLACES = (f"parameter/all/{dtype}" for dtype in ("float16", "int8", "uint32"))
SPOILED: dict[str, tuple[str, Spoil, str]] = {
    "places that do not rise": ("topk", with_array(swapped, PLACES), "float32:indices': the places of its values must"),
    "a place twice": ("topk", with_array(lambda a: np.sort(np.append(a[1:], a[-1])), PLACES), "must rise"),
    "a place beyond the end": ("topk", with_array(at(-1, 310), PLACES), "must rise and be below 310"),
    "NaN among the largest": ("topk", with_array(at(0, np.nan), PARAMETER), "NaN or infinity"),
    "one place short": ("topk", with_array(lambda a: a[:-1], PLACES), "shape, bytes"),
    "infinite scale": ("int8", with_array(at(100, np.inf), PARAMETER), "'a.weight' has NaN or infinity"),
    "scale that overflows": ("int8", with_array(at(102, 3e38), PARAMETER), "'b.weight' has NaN or infinity"),
    "codes as float32": ("int8", with_array(lambda a: a.astype(np.float32), INT8), "shape, bytes"),
    "huge scales": ("int8", with_array(lambda a: a * np.float32(1e6), PARAMETER), "max_update=10"),
    "no scales": ("int8", lambda c: c.array_records["parameter"].__delitem__("all/float32"), "float32' is missing"),
    "weights as they are": ("int8", with_array(lambda a: np.ones(410, np.float32), PARAMETER), "shape, bytes"),
    "bf16 infinity": ("bf16", lambda c: bits(c, 0x7F80), "'a.bias' has NaN or infinity"),
    "bf16 NaN": ("bf16", lambda c: bits(c, 0x7FC0), "'a.bias' has NaN or infinity"),
    "packed and cut off": ("bf16", sent_as(lambda d: d[:-1]), "packed bytes are not those of 410 values"),
    "packed and less than the lower bytes": ("bf16", sent_as(lambda d: d[:400]), "packed bytes are not those of 410"),
    "packed and something behind it": ("bf16", sent_as(lambda d: d + b"x"), "packed bytes are not those of 410"),
    "packed noise": ("bf16", sent_as(lambda d: d[:410] + b"\xff" * 90), "packed bytes are not those of 410 values"),
    "one value less in it": ("bf16", sent_as(lambda d: d[:410] + deflated(bytes(409))), "are not those of 410 values"),
    "a thousand times more": ("bf16", sent_as(lambda d: d[:410] + deflated(bytes(300_000))), "not those of 410 values"),
    "packed and longer than as it is": ("bf16", sent_as(lambda d: d + bytes(820)), "shape, bytes"),
    "packed float32": ("int8", lambda c: c.array_records["parameter"].update({"all/float32": packed_ones()}),
                       "shape, bytes"),
    "half infinity": ("fp16", with_array(at(-1, np.inf), FP16), "'b.weight' has NaN or infinity"),
    "another form": ("fp16", lambda c: c.config_records["identity"].update({"layout": form_of("bf16").digest}),
                     "another model or release"),
    "change of the sums": ("bf16", with_array(lambda a: a * 0, SUMS), "moments of 'norm' are of no data"),
}  # fmt: skip


def packed_ones() -> Array:
    return Array("float32", (110,), PACKED, codecs.to_packed(np.ones(220, np.float16)))


def bits(content: RecordDict, value: int) -> None:
    array = from_array(content.array_records["parameter"]["all/bfloat16"]).copy()
    array[3] = value
    content.array_records["parameter"]["all/bfloat16"] = to_array(array)


@pytest.mark.parametrize("kind", SPOILED)
def test_malformed_coded_reply_is_refused_by_name(kind: str) -> None:
    form, spoil, finding = SPOILED[kind]
    record, wanted = answered(form)
    spoil(record)
    with pytest.raises(ReplyRefused, match=finding):
        admit(reply(record), wanted)


@pytest.mark.parametrize("override", ["rounds.wire=int4", "rounds.wire_share=0", "rounds.wire_share=0.6"])
def test_other_forms_and_shares_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        config.compose([override])


def test_no_form_goes_with_masks() -> None:
    with pytest.raises(ConfigError, match=r"^secagg.active=true: rounds.wire=int8: masks .* Take rounds.wire=fp32"):
        config.compose(["secagg.active=true", "rounds.wire=int8", "arms=[federated]"])
