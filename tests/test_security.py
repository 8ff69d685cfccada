"""Attacks in numbers: mutated, replayed and oversized answers, and payloads that would run code. None is accepted."""

import hashlib
import io
import itertools
import json
import os
import pickle
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medfl import admission, arms, checkpoint, config, envelope, export
from medfl.data.sample import Records
from medfl.deployment import sealed
from medfl.errors import ConfigError, CredentialError, MedflError, PolicyError
from medfl.files import sha256
from medfl.gate import ReplyRefused, admit
from medfl.messages import RAW, Broadcast, Order, from_array
from medfl.onsite import policy
from medfl.onsite.site_file import SiteFile, SitePolicy
from medfl.provision import app
from medfl.provision.documents import Invitation, JoinRequest
from medfl.provision.keys import load_signing_key, new_node_key, new_signing_key
from medfl.provision.study_file import StudyFile
from medfl.run_folder import RunFolder
from medfl.server_seals import Seals
from medfl.state import SiteState
from tests.federation.real import register
from tests.test_gate import LAYOUT, MALFORMED, at, expected, header, honest, identity, metric, reply, with_array

Change = Callable[[RecordDict], None]
ARRAYS = [("parameter", "all/float32"), ("norm_moments", "all/float64"), ("codebook", "all/float64"),
          ("statistics", "all/float64")]  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def sealing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Seals, Path]:
    """The study lead's side, with two approved sites, and the folder of their keys."""
    folder = tmp_path_factory.mktemp("sealed")
    new_signing_key(folder / "keys" / "study")
    for name in ("a", "b"):
        new_node_key(folder / name / "keys" / "node")
        new_signing_key(folder / name / "keys" / "signing")
        register(folder, folder / name, name)
    return Seals.of(folder), folder


ORDER = Order("study", "0" * 32, "local:site-1", "pretrain", 1, 3, 5, "", "nonce")
TREE: dict[str, Any] = {"rounds": {"count": 3}, "stages": ["evaluate", "pretrain"]}


def test_a_site_does_what_was_approved_and_stays_in_its_folder(tmp_path: Path) -> None:
    site = SiteFile(tmp_path / "site.yaml", "a", policy=SitePolicy(least_steps=5))
    for good in (ORDER, replace(ORDER, lineage="none", arm=""), replace(ORDER, arm="finetune:federated:a-b.c:0.1")):
        admission._check_order(good, TREE, TREE, site, "pretrain")
    for kind in ("finetune", "synthesize"):
        with pytest.raises(PolicyError, match="the approved study has the stages evaluate, pretrain alone"):
            admission._check_order(ORDER, TREE, TREE, site, kind)
    words = ("/tmp/x", "../x", "a/../../b", "..", "x\n", "a:../b")
    for name, word in itertools.product(("lineage", "parent", "arm"), words):
        with pytest.raises(PolicyError, match=f"the order's {name} is none"):
            admission._check_order(replace(ORDER, **{name: word}), TREE, TREE, site, "pretrain")
    for changes in ({"steps": 4}, {"round": 4}, {"rounds": 9}):
        with pytest.raises(PolicyError):
            admission._check_order(replace(ORDER, **changes), TREE, TREE, site, "pretrain")


def test_a_study_whose_sums_are_of_few_images_is_not_allowed() -> None:
    tree = yaml.safe_load(config.compose(["method=dissect"]).source)
    assert not [text for text in policy.refusals(tree, SitePolicy()) if "rounds" in text]
    for key, value in {"refresh_volumes": 15, "codebook_images": 4}.items():
        found = policy.refusals({**tree, "rounds": tree["rounds"] | {key: value}}, SitePolicy())
        assert any(f"rounds.{key}={value}" in text for text in found)
    with pytest.raises(ConfigError, match="refresh_volumes"):
        config.compose(["rounds.refresh_volumes=-1"])


def an_order(seals: Seals, nonce: str = "nonce-7", within: float = 60.0) -> str:
    order = Order("study", "line", "federated", "pretrain", 1, 3, 5, LAYOUT.digest, nonce)
    return seals.order(Broadcast(order).to_record(), within, "train.pretrain")


def closed(folder: Path, record: RecordDict, order: str, site: str = "a", at_time: float | None = None) -> RecordDict:
    """An answer as a site seals it."""
    now = envelope.now() if at_time is None else at_time
    key = load_signing_key(folder / site / "keys" / "signing")
    envelope.closed(record, key, envelope.Seal("answer", now, now + 60, order, f"7:{'0' * 64}"))
    return record


def copied(record: RecordDict) -> RecordDict:
    """Flower's records share what they hold."""
    made = RecordDict()
    for role, arrays in record.array_records.items():
        made[role] = ArrayRecord({n: Array(a.dtype, a.shape, a.stype, a.data) for n, a in arrays.items()})
    for name, values in record.config_records.items():
        made[name] = ConfigRecord(dict(values))
    for name, numbers in record.metric_records.items():
        made[name] = MetricRecord(dict(numbers))
    return made


@st.composite
def mutations(draw: st.DrawFn) -> Change:
    """One change to any part of a sealed answer, be it plausible or not."""
    role, rest = draw(st.sampled_from(ARRAYS))
    place, bit, name = draw(st.integers(0, 10_000)), draw(st.integers(0, 7)), draw(TEXT)
    number = draw(st.floats(0.01, 10) | st.integers(1, 50))

    def flip(record: RecordDict) -> None:
        data = bytearray(record.array_records[role][rest].data)
        data[place % len(data)] ^= 1 << bit
        record.array_records[role][rest].data = bytes(data)

    def rename(record: RecordDict) -> None:
        record.array_records[role][rest + name] = record.array_records[role].pop(rest)

    def swap(record: RecordDict) -> None:
        other, same = ARRAYS[(ARRAYS.index((role, rest)) + 1 + bit % 3) % 4]
        moved = record.array_records[role][rest]
        record.array_records[role][rest] = record.array_records[other][same]
        record.array_records[other][same] = moved

    def add_number(record: RecordDict) -> None:
        record.metric_records["metrics"]["loss/total"] += number

    def say_otherwise(record: RecordDict) -> None:
        fields = sorted(record.config_records["seal"])
        field = fields[place % len(fields)]
        old = record.config_records["seal"][field]
        record.config_records["seal"][field] = old + number if isinstance(old, float) else f"{old}{name}"

    changes: list[Change] = [
        flip, rename, swap, add_number, say_otherwise,
        lambda record: record.array_records[role].pop(rest),
        lambda record: record.array_records.update({name: ArrayRecord({rest: record.array_records[role][rest]})}),
        lambda record: record.metric_records["metrics"].update({f"loss/{'x' * (1 + bit)}": number}),
        lambda record: record.metric_records["metrics"].pop(("site/volumes", "site/steps", "loss/total")[bit % 3]),
        lambda record: record.config_records["identity"].update({name: name}),
        lambda record: record.config_records["identity"].pop(("site", "nonce", "layout")[bit % 3]),
        lambda record: record.config_records.update({"x" + name: ConfigRecord({"a": name})}),
        lambda record: record.metric_records.update({"x" + name: MetricRecord({"a": number})}),
        lambda record: record.config_records["seal"].pop(("kind", "issued", "expires", "answers", "head")[place % 5]),
        lambda record: record.config_records.pop("seal"),
        lambda record: setattr(record.array_records[role][rest], "shape", [place]),
        lambda record: setattr(record.array_records[role][rest], "dtype", name),
        lambda record: setattr(record.array_records[role][rest], "stype", name),
    ]  # fmt: skip
    return draw(st.sampled_from(changes))


def received(seals: Seals, record: RecordDict, order: str) -> None:
    """What the server does with an answer of site a.

    Raises:
        CredentialError, ReplyRefused: it does not count.
    """
    seals.answer(record, "a", order)
    admit(reply(record), expected())


COUNTED = {"sealed": 0, "own": 0}


@given(st.lists(mutations(), min_size=1, max_size=3))
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_mutated_answer_counts(sealing: tuple[Seals, Path], changes: list[Change]) -> None:
    seals, folder = sealing
    order = an_order(seals)
    whole = closed(folder, honest().to_record(), order)
    received(seals, copied(whole), order)
    broken = copied(whole)
    for change in changes:
        try:
            change(broken)
        except KeyError:  # an earlier change took it away
            continue
    if envelope.digest(broken) == envelope.digest(whole) and broken.config_records == whole.config_records:
        return  # the changes undid each other
    with pytest.raises((CredentialError, ReplyRefused)):
        received(seals, broken, order)
    COUNTED["sealed"] += 1


@st.composite
def breaches(draw: st.DrawFn) -> Change:
    """What a site that signs it itself must not get through: it is not what was asked for."""
    role, rest = draw(st.sampled_from(ARRAYS))
    group, size = f"{role}/{rest}", LAYOUT.sizes[f"{role}/{rest}"]
    index, name = draw(st.integers(0, size - 1)), draw(TEXT)
    other = draw(st.integers(0, 100_000).filter(lambda n: n != size))
    bad = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    factor = draw(st.floats(30, 1e30)) * draw(st.sampled_from([-1, 1]))
    false = draw(st.sampled_from([True, "32", b"32", [32], float("nan"), 1e300, -1, 0, 101, 31.5]))
    return draw(st.sampled_from([
        with_array(at(index, bad), group),
        with_array(lambda a: a * np.float32(factor)),
        with_array(lambda a: np.resize(a, other), group),
        with_array(lambda a: a.astype("f2"), group),
        with_array(lambda a: a.reshape(1, -1), group),
        header(shape=(other,)), header(shape=(size, other)), header(dtype="O"), header(dtype=name),
        header(stype=name), header(data=bytes(other)),
        lambda record: record.array_records[role].pop(rest),
        lambda record: record.array_records[role].update({rest + name: record.array_records[role][rest]}),
        lambda record: record.array_records.update({"x" + name: ArrayRecord({})}) or
        record.array_records["x" + name].update({rest: record.array_records[role][rest]}),
        lambda record: record.metric_records["metrics"].__dict__["_data"].update({"site/volumes": false}),
        lambda record: record.metric_records["metrics"].update({f"patient/{name}": 1.0}),
        metric(f"loss/{name}!", 1.0), identity("nonce", name), identity("layout", name), identity("x" + name, name),
        lambda record: record.config_records.update({"x" + name: ConfigRecord({})}),
        lambda record: record.metric_records.update({"x" + name: MetricRecord({})}),
    ]))  # fmt: skip


@given(breaches())
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_answer_of_another_form_counts_though_its_site_signed_it(
    sealing: tuple[Seals, Path], change: Change
) -> None:
    seals, folder = sealing
    order, record = an_order(seals), honest().to_record()
    change(record)
    try:
        closed(folder, record, order)
    except (TypeError, ValueError):  # it cannot even be signed
        with pytest.raises(ReplyRefused):
            admit(reply(record), expected())
    else:
        with pytest.raises((CredentialError, ReplyRefused)):
            received(seals, record, order)
    COUNTED["own"] += 1


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_signature_does_not_help_a_malformed_answer(kind: str, sealing: tuple[Seals, Path]) -> None:
    seals, folder = sealing
    order, record = an_order(seals), honest().to_record()
    MALFORMED[kind][0](record)
    try:
        closed(folder, record, order)
    except (TypeError, ValueError):
        return  # as above; test_gate has it without a seal
    with pytest.raises((CredentialError, ReplyRefused)):
        received(seals, record, order)


def test_so_many_were_tried() -> None:
    """Runs behind the two above, in the same process."""
    assert COUNTED["sealed"] + COUNTED["own"] >= 2000, COUNTED


def test_no_replayed_answer_counts(sealing: tuple[Seals, Path]) -> None:
    """The same round, an earlier one, another run, another site's, and after a restart: 200 of each."""
    seals, folder = sealing
    accepted = tried = 0
    for number in range(200):
        order = an_order(seals, f"now-{number}")
        own = closed(folder, honest().to_record(), order)
        restarted = Seals.of(folder)
        attempts = [
            (copied(own), an_order(seals, f"again-{number}"), seals),
            (closed(folder, honest().to_record(), an_order(seals, f"earlier-{number}")), order, seals),
            (closed(folder, honest().to_record(), "f" * 64), order, seals),
            (closed(folder, honest().to_record(), order, site="b"), order, seals),
            (copied(own), an_order(restarted, f"after-{number}"), restarted),
            (closed(folder, honest().to_record(), order, at_time=time.time() - 86_400), order, seals),
        ]
        for record, asked, server in attempts:
            tried += 1
            try:
                server.answer(record, "a", asked)
                accepted += 1
            except CredentialError:
                pass
        seals.answer(own, "a", order)
    assert (tried, accepted) == (1200, 0)


def test_one_damaged_site_at_the_coordinator_does_not_touch_another(sealing: tuple[Seals, Path]) -> None:
    seals, folder = sealing
    file = folder / "sites" / "b" / "request.json"
    kept = file.read_bytes()
    try:
        file.write_text("{")
        order = an_order(seals)
        received(seals, closed(folder, honest().to_record(), order), order)
        with pytest.raises(CredentialError, match="'b' cannot be known"):
            seals.answer(closed(folder, honest("b").to_record(), order, site="b"), "b", order)
        with pytest.raises(CredentialError, match="cannot be known"):
            seals.answer(closed(folder, honest().to_record(), order), "../a", order)
    finally:
        file.write_bytes(kept)


BOMBS: dict[str, Change] = {
    "claims 1e12 elements": header(shape=(10**12,)),
    "claims 1e12 elements in rows": header(shape=(10**6, 10**6)),
    "claims 1e308 elements": header(shape=(10**308,)),
    "a thousand dimensions": header(shape=(2,) * 1000),
    "100,000 arrays": lambda c: c.array_records["parameter"].update(
        {f"{n}/float32": Array("float32", (1,), RAW, b"\0" * 4) for n in range(100_000)}
    ),
    "a name of a million letters": identity("site", "a" * 1_000_000),
    "a metric of a million letters": lambda c: c.metric_records["metrics"].update({f"loss/{'x' * 1_000_000}": 1.0}),
    "100,000 metrics": lambda c: c.metric_records["metrics"].update({f"loss/{n}": 1.0 for n in range(100_000)}),
    "a list of a million numbers": lambda c: c.metric_records["metrics"].update({"loss/total": [0.0] * 1_000_000}),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_no_allocation_bomb_takes_memory(kind: str) -> None:
    record = honest().to_record()
    BOMBS[kind](record)
    message = reply(record)
    tracemalloc.start()
    try:
        with pytest.raises(ReplyRefused) as caught:
            admit(message, expected())
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000


class Payload:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def archive(save: Callable[[Any], object]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()


PAYLOADS: dict[str, bytes] = {
    "pickle": pickle.dumps(Payload()),
    "old pickle": pickle.dumps(Payload(), protocol=0),
    "torch file": archive(lambda file: torch.save(Payload(), file)),
    "old torch file": archive(lambda file: torch.save(Payload(), file, _use_new_zipfile_serialization=False)),
    "numpy objects": archive(lambda file: np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)),
    "numpy archive": archive(
        lambda file: np.savez(file, train_images=np.array([Payload()], dtype=object), allow_pickle=True)
    ),
    "YAML call": b"!!python/object/apply:os.system ['touch executed']",
    "YAML call in a key": b"site: !!python/object/apply:os.system ['touch executed']\ndata: {}\n",
    "YAML object": b"!!python/object/new:subprocess.Popen [['touch', 'executed']]",
    "target": json.dumps({"_target_": "os.system", "command": "touch executed"}).encode(),
    "architecture": json.dumps({"architecture": {"_target_": "os.system", "command": "touch executed"}}).encode(),
    "expression": json.dumps({"$import": "$__import__('os').system('touch executed')"}).encode(),
    "shell words": b"$(touch executed); `touch executed`\n",
}


def _written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _checkpoint(folder: Path, content: bytes) -> None:
    file = _written(folder, "round-0001/state.safetensors", content)
    _written(folder, "round-0001/state.json", json.dumps({"round": 1, "sha256": sha256(file)}).encode())
    checkpoint.newest(folder)


def _encoder(folder: Path, content: bytes) -> None:
    file = _written(folder, "encoder.safetensors", content)
    facts = {"architecture": {"_target_": "medfl.models.encoders.Tiny"}, "sha256": sha256(file)}
    if content.startswith(b"{"):
        facts |= json.loads(content)
    _written(folder, "encoder.json", json.dumps(facts).encode())
    export.load_encoder(folder)


def _state(folder: Path, content: bytes) -> None:
    _written(folder, f"l/s/round-0001-{hashlib.sha256(content).hexdigest()[:16]}.safetensors", content)
    SiteState(folder, "l", "s").before(None)


def _image(suffix: str) -> Callable[[Path, bytes], object]:
    def load(folder: Path, content: bytes) -> object:
        _written(folder, f"a{suffix}", content)
        _written(folder, "list.csv", f"image,label\na{suffix},1\n".encode())
        study = config.compose([
            "data=folder", f"data.root={folder}", "data.datalist=list.csv", "data.image=image", "data.label=label",
            "data.size=8", "data.spatial_dims=2",
        ])  # fmt: skip
        records: Records = config.build(study.data).load()
        return records

    return load


def _order(folder: Path, content: bytes) -> None:
    order = Order(content.decode(errors="replace"), "l", "a", "p", 1, 3, 5, "d", "n")
    received_order = Broadcast.order_of(Broadcast(order).to_record())
    config.parse(received_order.study)
    admission._tree(received_order)


def _array(folder: Path, content: bytes) -> None:
    for dtype in ("O", "object", "float32", "V8", "pickle"):
        from_array(Array(dtype, (1,), "pickle", content))


def _bundle(folder: Path, content: bytes) -> None:
    sealed.verify(_written(folder, "bundle.tar", content))


LOADERS: dict[str, Callable[[Path, bytes], object]] = {
    "checkpoint": _checkpoint,
    "site's state": _state,
    "encoder": _encoder,
    "weights of an arm": lambda folder, content: arms.weights(
        RunFolder(_written(folder, "model.safetensors", content).parent), "federated"
    ),
    "MedMNIST file": lambda folder, content: config.build(
        config.compose(["data=medmnist", "data.name=breastmnist", "data.download=false", "data.verify=off",
                        f"data.root={_written(folder, 'breastmnist.npz', content).parent}"]).data
    ).load(),
    "PNG": _image(".png"),
    "JPEG": _image(".jpg"),
    "NIfTI": _image(".nii.gz"),
    "DICOM": _image(".dcm"),
    "site.yaml": lambda folder, content: SiteFile.read(_written(folder, "site.yaml", content)),
    "study.yaml": lambda folder, content: StudyFile.read(_written(folder, "study.yaml", content).parent),
    "order": _order,
    "array": _array,
    "invitation": lambda folder, content: Invitation.read(_written(folder, "x.json", content)),
    "request": lambda folder, content: JoinRequest.read(_written(folder, "x.json", content)),
    "app bundle": lambda folder, content: app.contents(content),
    "offline bundle": _bundle,
    "run's config": lambda folder, content: config.parse(
        RunFolder(_written(folder, "config.yaml", content).parent).config()
    ),
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
def test_no_payload_runs_through_any_load_path(loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, content in enumerate(PAYLOADS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError if loader == "array" else MedflError):
            LOADERS[loader](folder, content)
    assert not list(tmp_path.rglob("executed")), "a payload ran"


def test_the_payloads_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(PAYLOADS["pickle"])
    assert (tmp_path / "executed").exists()
