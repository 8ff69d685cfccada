"""A site decides: its settings, what it approved, which program may run, and what it can say of itself."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import CertificateBuilder, Name, NameAttribute
from cryptography.x509.oid import NameOID

from medfl import PROTOCOL, __version__, config
from medfl.cli.site import site as command
from medfl.deployment import clientapp, site_processes, site_status, site_watch
from medfl.errors import ConfigError, CredentialError, MedflError, PolicyError
from medfl.flower_compat import task_commands
from medfl.onsite.approvals import app_folder, approval_of, approve, every, the_one
from medfl.onsite.audit import Audit
from medfl.onsite.site_file import SiteFile
from medfl.provision.app import PROJECT, TEMPLATE, bundle
from medfl.provision.documents import Invitation, JoinRequest
from medfl.provision.keys import public_of

STUDY = "chest-0a1b2c3d"
KEY = Ed25519PrivateKey.generate()
APP = """
import medfl
from flwr.app import Message, RecordDict, ConfigRecord
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
def train(message, context):
    return Message(RecordDict({"said": ConfigRecord({"file": __file__, "medfl": medfl.WHO})}), reply_to=message)
"""


@cache
def authority() -> str:
    key, name = generate_private_key(SECP256R1()), Name([NameAttribute(NameOID.COMMON_NAME, "study")])
    start = datetime(2026, 1, 1, tzinfo=UTC)
    made = CertificateBuilder(name, name, key.public_key(), 1, start, start + timedelta(days=36500))
    return made.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


@cache
def study_text(*overrides: str) -> str:
    words = ["method=simclr", "encoder=tiny", "stages=[pretrain,evaluate]", "arms=[federated]", f"run.study={STUDY}"]
    return config.compose([*words, "rounds.count=3", "run.dir=run", *overrides]).source


def small_app(extra: Mapping[str, bytes] | None = None) -> bytes:
    files = {PROJECT: TEMPLATE.format(version=__version__).encode(), "client/app.py": APP.encode()}
    packages = {"client/__init__.py": b"", "medfl/__init__.py": b"WHO = 'the bundle'\n"}
    return bundle(files | packages | dict(extra or {}))


def invited(folder: Path, **changes: object) -> Path:
    facts: dict[str, object] = {
        "study_id": STUDY, "name": "Chest", "address": "fl.example.org", "port": 8443, "until": "2099-12-31",
        "created": "2026-11-22T00:00:00+00:00", "medfl": __version__, "protocol": PROTOCOL, "config": study_text(),
        "authority": authority(), "app": small_app(), "study_key": public_of(KEY),
    }  # fmt: skip
    invitation = Invitation(**(facts | changes))  # type: ignore[arg-type]
    path = folder / f"{invitation.digest[:8]}.invitation.json"
    invitation.write(path, KEY)
    return path


@pytest.fixture
def place(tmp_path: Path) -> SiteFile:
    """A site in a folder whose name has a space."""
    folder = tmp_path / "hospital a"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "list.csv").write_text("File,Class,Patient ID\na.png,x,1\n")
    command(["init", str(folder), "--yes", "--name", "hospital-a", "--data", str(tmp_path / "images")])
    return SiteFile.read(folder)


@pytest.fixture
def joined(place: SiteFile, tmp_path: Path) -> SiteFile:
    approve(place, invited(tmp_path), "Dr A. Smith")
    return place


def test_init_makes_private_keys_and_a_request_without_secrets(place: SiteFile, tmp_path: Path) -> None:
    private = [place.node_key, place.signing_key, place.secret, place.path, place.audit]
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (place.folder, place.keys, place.state)} == {0o700}
    request = JoinRequest.read(place.request)
    assert (request.site, request.medfl) == ("hospital-a", __version__)
    sent = place.request.read_bytes()
    for path in private[:3]:
        for line in path.read_bytes().splitlines():
            assert line.startswith(b"-----") or line not in sent
    columns = {"image": "File", "label": "Class", "patient": "Patient ID"}  # the study's own `split` stays
    assert place.data_set("default") == {"root": str(tmp_path / "images"), "datalist": "list.csv", **columns}
    assert all("#" in line for line in place.path.read_text().splitlines() if line)
    assert "    # split:  " in place.path.read_text()
    before = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="not overwritten"):
        command(["init", str(place.folder), "--yes"])
    assert before == {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("gone", ["node.pub", "signing.pub", "signing", "superexec.secret", "half a node.pub"])
def test_init_goes_on_where_it_was_cut_off(place: SiteFile, tmp_path: Path, gone: str) -> None:
    place.path.unlink()  # it is written after the keys
    public, node = place.keys / "node.pub", (place.keys / "node.pub").read_text()
    if gone.startswith("half"):
        public.write_text(node[:20])
    else:
        (place.keys / gone).unlink(missing_ok=True)
    command(["init", str(place.folder), "--yes", "--name", "hospital-a", "--data", str(tmp_path / "images")])
    assert JoinRequest.read(SiteFile.read(place.folder).request).node_key == node.strip()
    assert public.read_text() == node


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("site: A", "small|a-z"),
        ("site: central", "no arm's .random, local, federated, central"),
        ("site: a\npolicy: {methds: [simclr]}", "policy.methds'. Did you mean 'policy.methods'"),
        ("site: a\nprot: 9094", "Did you mean 'port'"),
        ("site: a\ndevice: tpu", "auto, cpu, cuda"),
        ("site: a\nthreads: true", "whole number"),
        ("site: a\nport: 80", "1024"),
        ("site: a\npolicy: {stages: [report]}", "policy.stages"),
        ("site: a\npolicy: {least_images: 0}", "at least 1"),
        ("site: a\npolicy: {privacy: {epsilon: 3}}", "need max_epsilon"),
        ("site: a\nlimits: {hours: -1}", "limits.hours"),
        ("site: a\ndata: {default: images}", "data.default"),
        ("device: cpu", "'site' is missing"),
        ("- site", "need keys"),
        ("site: [", "cannot be read"),
        ("site: a\npolicy: [1]", "mapping of keys"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(tmp_path: Path, change: str, found: str) -> None:
    (tmp_path / "site.yaml").write_text(change)
    with pytest.raises(ConfigError, match=found):
        SiteFile.read(tmp_path)


def test_a_relative_root_is_beside_the_settings(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("site: a\ndata: {default: {root: images, size: 32}}\npolicy:\n")
    assert SiteFile.read(tmp_path).data == {"default": {"root": str(tmp_path / "images"), "size": 32}}
    with pytest.raises(ConfigError, match="site init"):
        SiteFile.read(tmp_path / "nowhere")


def test_an_approval_is_of_these_very_bytes(
    joined: SiteFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    approval, invitation = approval_of(joined, STUDY)
    assert (approval.by, approval.data, approval.app) == ("Dr A. Smith", "default", invitation.app_digest)
    folder = joined.study(STUDY)
    app = app_folder(folder)
    assert all(not path.stat().st_mode & 0o222 for path in [app.parent, app, *app.rglob("*")])
    lines = Audit(joined.audit).head()
    assert approve(joined, invited(tmp_path), "Dr A. Smith") == approval
    assert Audit(joined.audit).head() == lines
    other = invited(tmp_path, port=8444)
    with pytest.raises(PolicyError, match="--replace"):
        approve(joined, other, "Dr A. Smith")
    assert approve(joined, other, "Dr A. Smith", replace=True) != approval
    assert approval_of(joined, STUDY)[1].port == 8444
    assert [a.study_id for a in every(joined)] == [STUDY] == [the_one(joined, None)]
    for name in ("other-0a1b2c3d", "None", "../keys"):
        with pytest.raises(PolicyError, match="not approved here"):
            approval_of(joined, name)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def _add(path: Path) -> None:
    path.parent.chmod(0o700)
    (path.parent / "torch.py").write_text("")


def _remove(path: Path) -> None:
    path.parent.chmod(0o700)
    path.unlink()


def _link(path: Path) -> None:
    copy = path.parents[5] / "copy.py"
    copy.write_bytes(path.read_bytes())
    _remove(path)
    path.symlink_to(copy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("invitation.json", _flip),
        ("approval.json", _flip),
        ("authority.crt", _flip),
        ("home/apps/*/client/app.py", _flip),
        ("home/apps/*/client/app.py", _add),
        ("home/apps/*/client/app.py", _remove),
        ("home/apps/*/client/app.py", _link),
    ],
)
def test_whatever_changes_afterwards_ends_the_approval(
    joined: SiteFile, name: str, change: Callable[[Path], None]
) -> None:
    (path,) = joined.study(STUDY).path.glob(name)
    change(path)
    with pytest.raises(PolicyError, match=r"approve|Approve"):
        approval_of(joined, STUDY)


def test_an_approval_ends_with_the_study(joined: SiteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medfl.provision.documents.today", lambda: date(2100, 1, 1))
    with pytest.raises(PolicyError, match="ended on 2099-12-31"):
        approval_of(joined, STUDY)


@pytest.mark.parametrize("rule", ["methods: [medcss]", "stages: [pretrain]", "least_batch: 100", "least_steps: 100"])
def test_the_sites_policy_forbids_an_approval(place: SiteFile, tmp_path: Path, rule: str) -> None:
    place.path.write_text(f"site: hospital-a\ndata: {{default: {{root: images}}}}\npolicy: {{{rule}}}\n")
    with pytest.raises(PolicyError, match=rf"policy forbids .*policy.{rule.split(':')[0]}"):
        approve(SiteFile.read(place.path), invited(tmp_path), "Dr A. Smith")
    assert every(place) == []


def test_an_approval_needs_a_name_and_a_data_set(place: SiteFile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="who decides"):
        approve(place, invited(tmp_path), " ")
    with pytest.raises(ConfigError, match="need one of default"):
        approve(place, invited(tmp_path), "Dr A", "lungs")
    two = replace(place, data={"a": {}, "b": {}})
    with pytest.raises(ConfigError, match="--data"):
        approve(two, invited(tmp_path), "Dr A")


def test_the_review_says_what_leaves_and_whether_the_program_is_known(
    place: SiteFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = invited(tmp_path)
    command(["review", str(path), "--site", str(place.folder)])
    page = capsys.readouterr().out
    for text in (
        "CAUTION",
        "Method simclr",
        "3 rounds",
        "never leaves",
        "DICOM tags",
        "Allowed",
        "fl.example.org:8443",
    ):
        assert text.lower() in page.lower()
    command(["review", str(path), "--site", str(place.folder), "--json"])
    facts = json.loads(capsys.readouterr().out)
    rows = {row["request"]: row for row in facts["asked"]}
    assert rows["train.pretrain"]["times"] == 3
    assert rows["train.pretrain"]["bytes"]["parameter"] >= 4 * 100_000
    assert facts["bytes"] == sum(row["times"] * sum(row["bytes"].values()) for row in facts["asked"])
    several = ("task=multilabel", "data=folder", "data.root=x", "data.image=a", "data.labels=[Mass,Edema]")
    findings = study_text("stages=[pretrain,finetune]", *several)
    command(["review", str(invited(tmp_path, config=findings)), "--site", str(place.folder), "--json"])
    tuned = {row["request"]: row for row in json.loads(capsys.readouterr().out)["asked"]}["train.finetune"]
    assert tuned["bytes"]["parameter"] > 0
    place.path.write_text(place.path.read_text().replace("most_bytes: 2000000000", "most_bytes: 1000"))
    with pytest.raises(PolicyError, match="most_bytes allows 1000"):
        command(["approve", str(path), "--by", "Dr A", "--site", str(place.folder)])


@pytest.mark.parametrize("own", [True, False])
def test_the_review_names_the_texts_that_leave_as_class_names_and_who_chose_them(
    place: SiteFile, tmp_path: Path, capsys: pytest.CaptureFixture[str], own: bool
) -> None:
    of_folder = ("data=folder", "data.root=x", "data.image=File", "data.label=Patient ID")
    text = place.path.read_text()
    if not own:
        place.path.write_text("".join(line for line in text.splitlines(True) if "label:" not in line))
    path = invited(tmp_path, config=study_text(*of_folder))
    command(["review", str(path), "--site", str(place.folder)])
    page = " ".join(capsys.readouterr().out.split())
    column = "Class" if own else "Patient ID"
    assert f"every different text in the column '{column}' of its list" in page
    assert ("The study chose it" in page) == (not own)
    for changed, told in (("data.classes=[a,b]", "names of classes: a, b"), ("data.labels=[A,B]", "columns A, B")):
        place.path.write_text("".join(line for line in text.splitlines(True) if "label:" not in line))
        more = ("task=multilabel", "data.label=null") if "labels" in changed else ()
        path = invited(tmp_path, config=study_text(*of_folder, changed, *more))
        command(["review", str(path), "--site", str(place.folder)])
        assert told in " ".join(capsys.readouterr().out.split())


def test_the_two_processes_know_only_what_they_need(joined: SiteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDFL_CA_PASSPHRASE", "secret words")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.hospital:3128")
    node, around_node = site_processes.node(joined, STUDY)
    _, around_apps = site_processes.apps(joined, STUDY)
    assert "secret words" not in {**around_node, **around_apps}.values()
    assert around_node["HTTPS_PROXY"]
    assert not {name for name in around_apps if "https_proxy" in name.lower()}
    assert {"fl.example.org:8443", "process"} <= set(node)
    assert "--insecure" not in node
    assert node[node.index("--node-config") + 1] == f"site-file='{joined.path}'"
    assert around_apps["PATH"].startswith(f"{joined.study(STUDY).bin}{os.pathsep}{Path(sys.executable).parent}")
    assert around_apps["FLWR_HOME"] == str(joined.study(STUDY).home)
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
        assert around_node[name] == around_apps[name] == ("0" if name.endswith("ENABLED") else "1")
    joined.node_key.chmod(0o640)
    with pytest.raises(CredentialError, match="0600"):
        site_processes.node(joined, STUDY)


def launched(place: SiteFile, program: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Start a program by name, as the SuperExec does."""
    _, environment = site_processes.apps(place, STUDY)
    return subprocess.run(
        [str(place.study(STUDY).bin / program), *words], env=environment, text=True, capture_output=True, check=False
    )


def test_only_client_apps_run_here(joined: SiteFile) -> None:
    programs = task_commands()
    assert [name for name, runs in programs.items() if runs] == ["flwr-clientapp"]
    done = launched(joined, "flwr-serverapp", ["--runtime-api-address", "127.0.0.1:9", "--token", "t"])
    assert done.returncode == clientapp.REFUSED
    assert sorted(path.name for path in joined.study(STUDY).bin.iterdir()) == sorted(programs)
    assert list(Audit(joined.audit).entries())[-1]["program"] == "flwr-serverapp"


PULLED = """
import sys, time
from pathlib import Path
from flwr.app import Context, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp as runtime
from medfl.deployment import clientapp
from medfl.flower_compat import identify_message, take_identity

SENT, BUSY, SITE = map(Path, sys.argv[1:])

class Still:
    is_running = False
    def __init__(self, *given): pass
    def start(self): pass

def pull(client):
    take_identity(5)
    message = Message(RecordDict(), dst_node_id=3, message_type="train", group_id="2")
    identify_message(message, "m-1")
    run = Run.create_empty(run_id=5)
    run.fab_id, run.fab_version = "medfl/medfl", VERSION
    return message, Context(5, 3, {}, RecordDict(), {}), run, Fab("0" * 64, SENT.read_bytes(), {})

def push(client, message, context):
    time.sleep(1 if "hours: 0.0001" in SITE.read_text() else 0)
    busy = BUSY.exists()
    print("REPLY", busy, message.error.reason if message.has_error() else dict(message.content["said"]))

runtime.HeartbeatSender, runtime.pull_task_input, runtime.push_message = Still, pull, push
runtime.push_task_output = lambda **given: print("DETAILS", given["details"])
clientapp.main(["flwr-clientapp", "--runtime-api-address", "127.0.0.1:9", "--insecure", "--token", "t"])
"""


def pulled(place: SiteFile, sent: Path) -> subprocess.CompletedProcess[str]:
    """Run one request that came with the bundle `sent`."""
    _, environment = site_processes.apps(place, STUDY)
    script = PULLED.replace("VERSION", repr(__version__))
    words = [sys.executable, "-P", "-c", script, *map(str, (sent, place.busy, place.path))]
    return subprocess.run(words, env=environment, text=True, capture_output=True, check=False)


@pytest.mark.parametrize("kind", ["approved", "one byte", "too slow"])
def test_the_reviewed_app_runs_and_no_other(joined: SiteFile, tmp_path: Path, kind: str) -> None:
    sent = small_app()
    (tmp_path / "sent.fab").write_bytes(sent[:-1] + bytes([sent[-1] ^ 1]) if kind == "one byte" else sent)
    if kind == "too slow":
        joined.path.write_text(joined.path.read_text().replace("hours: 12", "hours: 0.0001"))
    before = sorted(joined.study(STUDY).apps.rglob("*"))
    done = pulled(joined, tmp_path / "sent.fab")
    last = list(Audit(joined.audit).entries())[-1]
    if kind == "too slow":
        assert (done.returncode, last["what"]) == (clientapp.OUT_OF_TIME, "request ended")
        assert not joined.busy.exists()
        return
    (reply,) = [line for line in done.stdout.splitlines() if line.startswith("REPLY")] or [done.stderr]
    assert reply.startswith("REPLY True"), reply  # a note for the watchdog, until the answer is there
    assert not joined.busy.exists()
    assert sorted(joined.study(STUDY).apps.rglob("*")) == before
    if kind == "approved":
        assert "'medfl': 'the bundle'" in reply
        assert str(app_folder(joined.study(STUDY)) / "client" / "app.py") in reply
    else:
        assert "not the one that this site approved" in reply
        assert str(tmp_path) not in done.stdout
        assert (last["what"], last["approved"]) == ("bundle refused", approval_of(joined, STUDY)[0].app)


def test_an_error_while_the_bundle_is_compared_leaves_without_its_text(joined: SiteFile, tmp_path: Path) -> None:
    """The record cannot be written: its path is in the error's text, which Flower would send."""
    (tmp_path / "sent.fab").write_bytes(b"another bundle")
    joined.audit.unlink()
    joined.audit.mkdir()
    done = pulled(joined, tmp_path / "sent.fab")
    (reply,) = [line for line in done.stdout.splitlines() if line.startswith("REPLY")] or [done.stderr]
    assert "PolicyError" in reply
    assert "could not compare the app bundle" in reply
    assert str(tmp_path) not in done.stdout
    assert "IsADirectoryError" in done.stderr, "the site's own log has it"


def test_a_study_whose_approval_ended_is_refused_and_recorded(joined: SiteFile) -> None:
    joined.study(STUDY).approval.unlink()
    with pytest.raises(PolicyError) as caught:
        clientapp.Gatekeeper(joined, STUDY).admitted(small_app())
    assert str(joined.folder) not in str(caught.value)
    assert list(Audit(joined.audit).entries())[-1]["what"] == "study refused"


def test_a_node_is_stuck_when_its_request_is_too_old_or_lost(joined: SiteFile) -> None:
    gone: dict[str, float] = {}
    assert not site_watch.stuck(joined, gone)
    assert not site_watch.relieve(joined, STUDY, gone)
    site_watch.work_on(joined, "m-1", "train.pretrain", "2")
    assert not site_watch.stuck(joined, gone)
    tree = json.loads(joined.busy.read_text()) | {"born": 1}  # the number is another process's by now
    joined.busy.write_text(json.dumps({**tree, "since": time.time() - 13 * 3600.0}))
    assert "limits.hours=12" in site_watch.stuck(joined, gone)
    joined.busy.write_text(json.dumps({**tree, "since": time.time() - 2 * site_watch.LOST}))
    assert not site_watch.stuck(joined, gone)  # Flower may still answer for it
    gone["m-1"] -= site_watch.LOST + 1
    assert "without an answer" in site_watch.stuck(joined, gone)
    assert site_watch.relieve(joined, STUDY, gone)
    assert not joined.busy.exists()
    entry = list(Audit(joined.audit).entries())[-1]
    assert (entry["what"], entry["round"]) == ("node restarted", "2")
    joined.busy.write_text("{")
    assert site_watch.work(joined) is None


def test_egress_status_and_the_record(joined: SiteFile, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--site", str(joined.folder)]
    command(["egress", *where])
    assert capsys.readouterr().out == "nothing has left yet.\n"
    arrays = ["parameter encoder.w float32 3x3 36", "norm_moments bn.sum float64 4 32"]
    for number in (1, 2):
        Audit(joined.audit).write("answer", study=STUDY, stage="pretrain", arm="federated", round=number,
                                  arrays=arrays, metrics=["loss/total", "site/steps"], bytes=84)  # fmt: skip
    command(["egress", STUDY, *where, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["bytes"], facts["roles"]) == (168, {"norm_moments": 64, "parameter": 72})
    assert [row["round"] for row in facts["answers"]] == [1, 2]
    command(["egress", "other-0a1b2c3d", *where])
    command(["egress", *where])
    command(["status", *where])
    page = capsys.readouterr().out
    for text in ("nothing has left yet", "2 answers, 168 bytes", "not joined", "round 2 of pretrain", "site join"):
        assert text in page
    command(["audit", "verify", *where])
    head = capsys.readouterr().out.split("head: ")[1].split("\n")[0]
    lines = joined.audit.read_bytes().splitlines(keepends=True)
    joined.audit.write_bytes(b"".join(lines[:-1]))
    command(["audit", "verify", *where])
    with pytest.raises(PolicyError, match="cut off"):
        command(["audit", "verify", "--head", head, *where])
    command(["stop", *where])
    assert "nothing was joined" in capsys.readouterr().out


def test_the_status_names_a_request_that_failed_until_one_succeeds(
    joined: SiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_status, "answers", lambda *_, **__: True)  # the node runs as a service
    record = Audit(joined.audit)
    record.write("refused", stage="pretrain", code=10, reason="DataError: 3 images cannot be read.", ticket="1")
    found = site_status.status(joined, " --site X")["next"]
    assert "DataError: 3 images cannot be read." in found
    assert "medfl site check --site X" in found
    record.write("answer", study=STUDY, stage="pretrain", arm="federated", round=1, arrays=[], metrics=[], bytes=0)
    assert "failed" not in site_status.status(joined)["next"]


@pytest.mark.parametrize(
    ("sign", "state"),
    [
        ("INFO : Starting Flower SuperNode\n", "connecting"),
        ("INFO : SuperNode ID: 1\n", "connected"),
        ("INFO : SuperNode ID: 1\nWARNING : Connection attempt failed, retrying\n", "coordinator not reached"),
        ("WARNING : Connection attempt failed\nINFO : Connection successful after 1.2 s\n", "connected"),
        ("ERROR : SSL/TLS handshake error detected.\n", "coordinator's certificate refused"),
        ("[RUN 1, ROUND 2]\n" * 2000, "connected"),
        ("", "connecting"),
    ],
)
def test_the_nodes_log_says_how_it_stands(tmp_path: Path, sign: str, state: str) -> None:
    (tmp_path / "node.log").write_text(sign)
    assert site_status.connection(tmp_path / "node.log") == state
    assert site_status.connection(tmp_path / "none.log") == "connecting"


def test_words_that_are_no_command_are_refused(place: SiteFile) -> None:
    with pytest.raises(ConfigError, match=r"init \| check"):
        command(["leave"])
    with pytest.raises(PolicyError, match="no study is approved here"):
        command(["join", "--site", str(place.folder)])
    with pytest.raises(MedflError, match="neither an invitation's file"):
        command(["review", STUDY, "--site", str(place.folder)])
