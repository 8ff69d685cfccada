"""Real sites: approvals, seals, policies and site files around the same apps as in a simulation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from flwr.app import ConfigRecord, Message

from medfl import config, envelope
from medfl.cli import site_pages
from medfl.deployment import site_status
from medfl.errors import ConfigError, MedflError
from medfl.messages import DESCRIBE
from medfl.onsite.audit import Audit
from medfl.onsite.site_file import SiteFile
from medfl.provision.keys import load_signing_key
from medfl.run_folder import RunFolder
from tests.federation.real import SMALL, STUDY_ID, SealedGrid, real_study
from tests.federation.small import digest, run

pytestmark = pytest.mark.federation
STAGES = "pretrain,finetune,evaluate,transfer,report"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study of all stages."""
    folder = tmp_path_factory.mktemp("real")
    real_study(folder, f"stages=[{STAGES}]").run()
    return folder


def test_a_study_among_real_sites_gives_the_simulations_files(whole: Path, tmp_path: Path) -> None:
    given = [f"data.root={whole / 'images'}", "data.datalist=all.csv", "data.site=site", f"run.dir={tmp_path}"]
    simulated = run(config.compose([*SMALL, *given, f"stages=[{STAGES}]"]), stages=STAGES, nodes=4)
    for name in ("encoder.safetensors", "evaluation.csv", "transfer.csv"):
        assert digest(whole / "lead" / "run" / name) == digest(simulated.path / name), name
    assert json.loads((whole / "lead" / "run" / "outcome.json").read_text())["state"] == "finished"


def test_the_audit_log_of_a_site_is_what_the_servers_wire_list_says(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "beta" / "audit.jsonl").read_text().splitlines()]
    told = sorted(
        (line["stage"], line["arm"], line["round"], name, int(size))
        for line in lines
        if line["what"] == "answer"
        for _, name, _, _, size in (text.split(" ") for text in line["arrays"])
    )
    wire = RunFolder.open(whole / "lead" / "run").wire_rows()
    up = sorted(
        (row["stage"], row["arm"], int(row["round"]), row["name"], int(row["bytes"]))
        for row in wire
        if row["site"] == "beta"
        and row["direction"] == "up"
        and row["role"] not in ("metric",)
        and row["stage"] != "enrol"
    )
    assert told == up
    assert Audit.verify(whole / "beta" / "audit.jsonl") == []
    (first,) = [line for line in lines if line.get("facts")]
    assert first["facts"] == {"classes": ["no", "yes"], "held_out": "no", "owners": ""}
    assert first["bytes"] == 8 * len(first["metrics"]) + len("noyesno")
    shown = site_pages.egress(site_status.egress(SiteFile.read(whole / "beta"), None))
    assert "names of classes, as this site's list of images has them: no, yes\n" in shown


def test_a_cut_audit_log_is_found_with_the_head_that_the_server_keeps(whole: Path) -> None:
    heads = [
        e for e in RunFolder.open(whole / "lead" / "run").events() if e["name"] == "audit/lines" and e["site"] == "beta"
    ]
    file = whole / "beta" / "audit.jsonl"
    cut = file.with_name("cut.jsonl")
    cut.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-2]))
    number, _, hash_ = heads[-1]["reason"].partition(":")
    assert Audit.verify(file, (int(number), hash_)) == []
    assert Audit.verify(cut) == []
    assert Audit.verify(cut, (int(number), hash_))


def _edit(place: Path, **changes: object) -> None:
    tree = yaml.safe_load((place / "site.yaml").read_text())
    (place / "site.yaml").write_text(yaml.safe_dump(tree | changes))


def _policy(**changes: object) -> Callable[[Path], None]:
    return lambda place: _edit(place, policy={"least_images": 8, "least_steps": 1, "least_batch": 2} | changes)


REFUSALS: dict[str, tuple[Callable[[Path], None], int]] = {
    "another method only": (_policy(methods=["nslf"]), 11),
    "more steps": (_policy(least_steps=20), 11),
    "no fine-tuning": (_policy(stages=["pretrain"]), 11),
    "fewer bytes": (_policy(most_bytes=1000), 11),
    "more images": (_policy(least_images=600), 10),
    "no such data": (lambda place: _edit(place, data={"other": {"root": "/nowhere"}}), 11),
    "approval gone": (lambda place: (place / "studies" / STUDY_ID / "approval.json").unlink(), 11),
    "approval ended": (lambda place: _ended(place), 11),
    "key gone": (lambda place: (place / "keys" / "signing").unlink(), 21),
    "key open": (lambda place: (place / "keys" / "signing").chmod(0o644), 21),
}


def _ended(place: Path) -> None:
    file = place / "studies" / STUDY_ID / "approval.json"
    file.chmod(0o600)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"until": "2020-01-01"}))


@pytest.mark.parametrize("name", REFUSALS)
def test_a_site_that_refuses_is_left_out_and_writes_why(name: str, tmp_path: Path) -> None:
    study = real_study(
        tmp_path, "arms=[federated]", "finetune.protocols=[]", "stages=[pretrain,finetune]", "rounds.count=1"
    )
    change, code = REFUSALS[name]
    change(study.sites["beta"])
    folder = study.run(stages="pretrain")
    weighed = {event["site"] for event in folder.events() if event["name"] == "round/weight"}
    assert weighed == {"alpha", "gamma"}
    lines = [json.loads(line) for line in (study.sites["beta"] / "audit.jsonl").read_text().splitlines()]
    refused = [line for line in lines if line["what"] == "refused"]
    assert refused
    assert all(line["code"] == code and line["reason"] for line in refused)
    reasons = [str(event.get("reason")) for event in folder.events() if event["name"] == "refused"]
    assert reasons
    assert not [text for text in reasons if str(tmp_path) in text]


def test_a_study_that_is_not_the_approved_one_is_obeyed_nowhere(tmp_path: Path) -> None:
    study = real_study(tmp_path, "arms=[federated]")
    for change in ("training.steps=3", "rounds.count=9", "data.size=12", "method.temperature=0.9", "seed=4"):
        study.source = config.changed(study.source, [change]).source
        with pytest.raises(MedflError, match="no site could take part"):
            study.run(stages="pretrain")
        shutil.rmtree(study.lead / "run")


class Tampering(SealedGrid):
    """Gives each reply of beta to `change` on its way."""

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        if self.names[message.metadata.dst_node_id] == "beta" and not reply.has_error():
            return type(self).change(self, message, reply)
        return reply


def _other_metric(grid: SealedGrid, message: Message, reply: Message) -> Message:
    reply.content.metric_records["metrics"]["site/train"] = 39
    return reply


def _other_name(grid: SealedGrid, message: Message, reply: Message) -> Message:
    reply.content.config_records["identity"]["site"] = "delta"
    return reply


def _no_seal(grid: SealedGrid, message: Message, reply: Message) -> Message:
    del reply.content["seal"]
    return reply


def _odd_seal(grid: SealedGrid, message: Message, reply: Message) -> Message:
    reply.content["seal"] = ConfigRecord({"signature": "x"})
    return reply


def _of_alpha(grid: SealedGrid, message: Message, reply: Message) -> Message:
    node = next(node for node, name in grid.names.items() if name == "alpha")
    own, grid.contexts[message.metadata.dst_node_id] = grid.contexts[message.metadata.dst_node_id], grid.contexts[node]
    try:
        return SealedGrid.deliver(grid, message)
    finally:
        grid.contexts[message.metadata.dst_node_id] = own


def _replayed(grid: SealedGrid, message: Message, reply: Message) -> Message:
    kept: dict[str, Message] = grid.__dict__.setdefault("kept", {})
    first = kept.setdefault(message.metadata.message_type, reply)
    if first is reply:
        return reply
    return Message(first.content, reply_to=message)


def _bytes(grid: SealedGrid, message: Message, reply: Message) -> Message:
    reply.content.config_records["identity"]["layout"] = b"x"
    return reply


def _flipped(grid: SealedGrid, message: Message, reply: Message) -> Message:
    for arrays in reply.content.array_records.values():
        for array in arrays.values():
            array.data = bytes([array.data[0] ^ 1]) + array.data[1:]
    return reply


@pytest.mark.parametrize(
    "change", [_other_metric, _other_name, _no_seal, _odd_seal, _of_alpha, _bytes, _flipped, _replayed]
)
def test_a_reply_that_is_not_its_makers_costs_that_site_alone(change: object, tmp_path: Path) -> None:
    study = real_study(tmp_path, "arms=[federated]", "rounds.count=2")
    folder = study.run(stages="pretrain", grid=type("Changing", (Tampering,), {"change": change}))
    weighed = {(event["site"], event["round"]) for event in folder.events() if event["name"] == "round/weight"}
    honest = {(name, number) for name in ("alpha", "gamma") for number in (1, 2)}
    assert weighed == honest | ({("beta", 1)} if change is _replayed else set())


class OtherKind(SealedGrid):
    """Gives beta its orders to train as requests of another kind: whoever carries messages could."""

    def deliver(self, message: Message) -> Message:
        if self.names[message.metadata.dst_node_id] == "beta" and message.metadata.message_type == "train.pretrain":
            message.metadata.message_type = "query.refresh"
        return super().deliver(message)


def test_an_order_is_of_the_kind_that_it_was_sealed_as(tmp_path: Path) -> None:
    folder = real_study(tmp_path, "arms=[federated]", "rounds.count=1").run(stages="pretrain", grid=OtherKind)
    assert {event["site"] for event in folder.events() if event["name"] == "round/weight"} == {"alpha", "gamma"}
    lines = [json.loads(line) for line in (tmp_path / "beta" / "audit.jsonl").read_text().splitlines()]
    assert [line["code"] for line in lines if line["what"] == "refused"] == [21]


def test_a_stage_that_was_not_approved_is_not_asked_for(tmp_path: Path) -> None:
    study = real_study(tmp_path, "arms=[federated]", "stages=[pretrain,evaluate]")
    with pytest.raises(ConfigError, match="the approved study has no 'finetune', only pretrain, evaluate"):
        study.run(stages="pretrain,finetune")


def _sealed_again(grid: SealedGrid, message: Message, reply: Message, place: Path) -> Message:
    """The seal that beta itself would have put on what the answer holds now."""
    seal, sealed = dict(reply.content.config_records["seal"]), envelope.Seal.__annotations__
    key = load_signing_key(place / "keys" / "signing")
    envelope.closed(reply.content, key, envelope.Seal(**{name: seal[name] for name in sealed}))
    return reply


ODD = {
    "no metrics": lambda content: content.pop("metrics"),
    "no number of images": lambda content: content["metrics"].pop("site/train"),
    "another number": lambda content: content["metrics"].update({"site/steps": 1}),
    "another record": lambda content: content.update({"more": ConfigRecord({"text": "x"})}),
    "another fact": lambda content: content["identity"].update({"patients": "x"}),
    "no classes": lambda content: content["identity"].pop("classes"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_well_sealed_but_odd_enrolment_costs_that_site_alone(odd: str, tmp_path: Path) -> None:
    def change(grid: SealedGrid, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == DESCRIBE:
            ODD[odd](reply.content)
            return _sealed_again(grid, message, reply, study.sites["beta"])
        return reply

    study = real_study(tmp_path, "arms=[federated]", "rounds.count=1")
    folder = study.run(stages="pretrain", grid=type("Changing", (Tampering,), {"change": change}))
    assert {event["site"] for event in folder.events() if event["name"] == "round/weight"} == {"alpha", "gamma"}
    assert [event for event in folder.events() if event["name"] == "refused" and event["stage"] == "enrol"]


def test_a_revoked_site_and_an_order_of_another_key_do_not_count(tmp_path: Path) -> None:
    study = real_study(tmp_path, "arms=[federated]", "rounds.count=1")
    (study.lead / "sites" / "beta" / "revoked.json").write_text("{}")
    weighed = {event["site"] for event in study.run(stages="pretrain").events() if event["name"] == "round/weight"}
    assert weighed == {"alpha", "gamma"}
    other = real_study(tmp_path / "other", "arms=[federated]")
    for end in ("", ".pub"):
        (other.lead / "keys" / f"study{end}").write_bytes((study.lead / "keys" / f"study{end}").read_bytes())
    with pytest.raises(MedflError, match="CredentialError"):
        other.run(stages="pretrain")
