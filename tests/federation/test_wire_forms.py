"""Compressed weights through the real apps: every method, simulated and real sites, and records that tell the truth."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from client.app import app as client
from medfl import codecs, forms, stages
from medfl.carriers import InProcessGrid
from medfl.deployment.review import review
from medfl.enrolment import Federation
from medfl.errors import PolicyError
from medfl.messages import PRETRAIN, TRAIN
from medfl.onsite.site_file import SiteFile
from medfl.provision.documents import Invitation
from medfl.run_folder import RunFolder
from medfl.site_wire import UNSENT
from medfl.workshop import new_method
from server.app import app as server
from tests.federation.real import real_study
from tests.federation.small import OF_METHOD, digest, run, small_study
from tests.federation.test_invariants import METHODS

pytestmark = pytest.mark.federation
FORMS = ("bf16", "fp16", "int8", "topk")
PLAIN = {"float32", "float64"}
DTYPES = {"bf16": {"bfloat16"}, "fp16": {"float16"}, "int8": {"int8", "float32"}, "topk": {"uint32", "float32"}}
Key = tuple[str, str]  # kind of request, direction


class Counting(InProcessGrid):
    """Adds up the bytes of all arrays that cross."""

    crossed: Counter[Key]

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        assert not reply.has_error(), reply.error
        kind = message.metadata.message_type.partition(".")[2]
        for direction, content in (("down", message.content), ("up", reply.content)):
            arrays = [array for record in content.array_records.values() for array in record.values()]
            self.crossed[kind, direction] += sum(len(array.data) for array in arrays)
        return reply


def counted(folder: Path, *overrides: str) -> tuple[RunFolder, Counter[Key]]:
    study = small_study(folder, *overrides, "arms=[federated]")
    grid, made = Counting(client, 3), RunFolder.create(folder, study.source, resume=True)
    grid.crossed = Counter()
    stages.run(Federation(grid, study, made), ("pretrain",), 3)
    return made, grid.crossed


def written(folder: RunFolder) -> Counter[Key]:
    found: Counter[Key] = Counter()
    for row in folder.wire_rows():
        if row["role"] not in ("metric", "order"):
            found[row["stage"], row["direction"]] += int(row["bytes"])
    return found


@pytest.mark.parametrize("wire", ["int8", "topk"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_a_form_and_the_record_has_every_byte(method: str, wire: str, tmp_path: Path) -> None:
    once = () if method in OF_METHOD else ("rounds.count=1",)
    folder, crossed = counted(tmp_path, f"method={method}", f"rounds.wire={wire}", *once)
    assert {key: size for key, size in written(folder).items() if size} == {k: n for k, n in crossed.items() if n}
    for row in folder.wire_rows():
        compressed = row["stage"] == "pretrain" and row["role"] in ("parameter", "target")
        form = "bf16" if (wire, row["direction"]) == ("topk", "down") else wire
        if row["role"] not in ("metric", "order") and row["stage"] != "enrol":
            assert row["dtype"] in (DTYPES[form] if compressed else PLAIN), row


@pytest.mark.parametrize("wire", FORMS)
def test_volumes_too_and_fewer_bytes(wire: str, tmp_path: Path) -> None:
    words = ("data.spatial_dims=3", "data.count=60", "training.batch_size=8", "rounds.count=1")
    plain, coded = (counted(tmp_path / form, *words, f"rounds.wire={form}")[1] for form in ("fp32", wire))
    most = {"bf16": 0.45, "fp16": 0.5, "int8": 0.35, "topk": 0.35}[wire]  # sums stay as they are
    assert coded["pretrain", "up"] < most * plain["pretrain", "up"]
    assert coded["refresh", "down"] == plain["refresh", "down"]


def test_the_way_of_changes_is_the_way_of_weights_where_nothing_is_rounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a codec without loss, what is left is float32's rounding of broadcast + change."""
    monkeypatch.setitem(forms.HALF, "bf16", "float32")
    monkeypatch.setattr(codecs, "to_half", lambda values, dtype, out: np.copyto(out, values))
    monkeypatch.setattr(codecs, "of_half", lambda halves, dtype, out: np.copyto(out, halves))
    found = {}
    for wire in ("fp32", "bf16"):
        study = small_study(tmp_path / wire, "training=sgd", f"rounds.wire={wire}", "arms=[federated]")
        found[wire] = load_file(run(study).path / "model.safetensors")
    for name, tensor in found["fp32"].items():
        assert float((tensor - found["bf16"][name]).norm()) <= 1e-5 * float(tensor.norm()) + 1e-8, name


def test_one_site_in_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    """Two steps: an untrained net's gradient changes by a tenth when its weights are rounded, more later."""
    found, losses, words = {}, {}, ("sites.count=1", "method=simclr", "training=sgd", "rounds.count=1")
    for wire in ("fp32", "bf16"):
        study = small_study(tmp_path / wire, *words, f"rounds.wire={wire}", "arms=[federated]")
        folder = run(study, nodes=2)
        found[wire] = load_file(folder.path / "model.safetensors")
        losses[wire] = next(e["value"] for e in folder.events() if e["name"] == "loss/total" and not e["site"])
    start = new_method(study).state_dict()
    names = [name for name, tensor in found["fp32"].items() if tensor.ndim > 1]
    moved = torch.cat([(found["fp32"][name] - start[name]).flatten() for name in names])
    apart = torch.cat([(found["fp32"][name] - found["bf16"][name]).flatten() for name in names])
    assert 0 < float(apart.norm()) < 0.25 * float(moved.norm())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


@pytest.mark.parametrize("wire", ["int8", "topk"])
def test_a_repeated_round_gives_the_same_bytes_with_what_was_not_sent_before(wire: str, tmp_path: Path) -> None:
    study = small_study(tmp_path, "arms=[federated]", f"rounds.wire={wire}", "rounds.count=3")
    kept: list[tuple[list[bytes], list[bytes]]] = []

    class Twice(InProcessGrid):
        def deliver(self, message: Message) -> Message:
            first, again = super().deliver(message), super().deliver(message)
            if message.metadata.message_type == PRETRAIN:
                kept.append((arrays(first), arrays(again)))
            return again

    RunFolder.create(Path(study.run_dir), study.source, resume=True)
    asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": 3}
    server(Twice(client, 3), Context(1, 1, {}, RecordDict(), dict(asked)))
    assert len(kept) == 6
    assert all(first == again for first, again in kept)
    states = [load_file(path) for path in Path(study.state_dir).rglob("round-0003-*.safetensors")]
    assert len(states) == 2
    unsent = [tensor for state in states for name, tensor in state.items() if name.startswith(UNSENT)]
    assert all(float(tensor.abs().sum()) > 0 for tensor in unsent)
    once = run(small_study(tmp_path / "once", "arms=[federated]", f"rounds.wire={wire}", "rounds.count=3"))
    assert digest(once.path / "encoder.safetensors") == digest(tmp_path / "encoder.safetensors")


def arrays(message: Message) -> list[bytes]:
    return [array.data for record in message.content.array_records.values() for array in record.values()]


@pytest.mark.parametrize("wire", ["fp16", "topk"])
def test_real_sites_review_and_record_the_bytes_that_leave(wire: str, tmp_path: Path) -> None:
    words = (f"rounds.wire={wire}", "stages=[pretrain,finetune]", "arms=[federated]", "training.optimizer_state=keep")
    study = real_study(tmp_path, *words)
    page = review(SiteFile.read(study.sites["beta"]), Invitation.read(study.lead / "invitation.json"))
    assert page.wire == wire
    folder = study.run(stages="pretrain,finetune")
    lines = [json.loads(line) for line in (tmp_path / "beta" / "audit.jsonl").read_text().splitlines()]
    answers = [line for line in lines if line["what"] == "answer"]
    told = [text.split(" ") for line in answers for text in line["arrays"]]
    up = [row for row in folder.wire_rows() if (row["site"], row["direction"]) == ("beta", "up")]
    assert sorted((name, dtype, size) for _, name, dtype, _, size in told) == sorted(
        (row["name"], row["dtype"], row["bytes"]) for row in up if row["role"] != "metric" and row["stage"] != "enrol"
    )
    for request in TRAIN.values():
        asked = [row for row in page.asked if row.request == request and row.times]
        kind = request.partition(".")[2]
        sent = [line["bytes"] - 8 * len(line["metrics"]) for line in answers if line["stage"] == kind]
        (most,) = {sum(row.bytes.values()) - row.bytes["metric"] for row in asked}
        assert set(sent) == {most} if wire == "topk" else all(0.5 * most < size < most for size in sent)  # packed


def test_the_policy_counts_the_bytes_that_leave(tmp_path: Path) -> None:
    """An answer of this study has 110 kB in fp32."""
    policy = "{least_images: 8, least_steps: 1, least_batch: 2, most_bytes: 45000}"
    plain = real_study(tmp_path / "plain", "stages=[pretrain]", "arms=[federated]", policy=policy)
    with pytest.raises(PolicyError, match="0 of 3 sites"):
        plain.run(stages="pretrain")
    assert "policy.most_bytes allows 45000" in (plain.sites["beta"] / "audit.jsonl").read_text()
    words = ("rounds.wire=int8", "stages=[pretrain]", "arms=[federated]")
    rows = real_study(tmp_path / "coded", *words, policy=policy).run(stages="pretrain").wire_rows()
    assert {row["round"] for row in rows if row["stage"] == "pretrain"} == {"1", "2"}
