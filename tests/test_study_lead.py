"""The study lead's side without a SuperLink: decisions about sites, the keeper's, processes that are kept running."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from medfl.cli.study import study as command
from medfl.deployment import lead, nginx, status, wishes
from medfl.deployment.control import Control, pem_of
from medfl.deployment.progress import progress
from medfl.errors import ConfigError, CredentialError, NetworkError, PolicyError
from medfl.provision.documents import registry, standing
from medfl.provision.keys import load_signing_key
from medfl.provision.study_file import StudyFile
from tests.test_provision import request_of

PLAN = lead.Plan("Chest X-rays", "127.0.0.1", 8443, 8000, 2, "2099-12-31", ["method=simclr", "rounds.count=3"])


def a_study(folder: Path) -> Path:
    """A coordinator's folder with an invitation and the approved sites a and b."""
    lead.create(folder, PLAN, "a long passphrase")
    lead.invite(folder)
    for site in ("a", "b"):
        place = folder.parent / site
        assert lead.approve(folder, request_of(place, site), (place / "request.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_study(tmp_path_factory.mktemp("lead") / "study")


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "study"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def touched(before: Mapping[str, bytes], folder: Path) -> set[str]:
    after = snapshot(folder)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_every_decision_touches_its_own_site_alone(study: Path, tmp_path: Path) -> None:
    before = snapshot(study)
    request = request_of(tmp_path / "c", "c")
    lead.approve(study, request, (tmp_path / "c" / "request.json").read_bytes())
    assert touched(before, study) == {"sites/c/request.json", "sites/c/approved.json"}
    before = snapshot(study)
    assert lead.revoke(study, "b", "left")
    assert touched(before, study) == {"sites/b/revoked.json"}
    assert set(registry(study)) == {"a", "c"}
    before = snapshot(study)
    new = request_of(tmp_path / "b2", "b")
    lead.renew_site(study, "b", new, (tmp_path / "b2" / "request.json").read_bytes())
    assert {name.rpartition("/")[0] for name in touched(before, study)} == {"sites/b"}
    assert registry(study)["b"] == new
    before = snapshot(study)
    assert lead.invite(study)[2] == "unchanged"
    assert touched(before, study) == set()


def test_one_key_is_one_site_and_a_revoked_one_does_not_come_back(study: Path, tmp_path: Path) -> None:
    taken = study / "sites" / "a" / "request.json"
    content = taken.read_bytes()
    assert not lead.approve(study, lead.read_request(study, taken), content)  # the same request twice
    other = request_of(tmp_path / "new", "a")
    with pytest.raises(PolicyError, match="other keys"):
        lead.approve(study, other, b"")
    stolen = replace(request_of(tmp_path / "d", "d"), node_key=registry(study)["a"].node_key)
    stolen.write(tmp_path / "stolen.json", load_signing_key(tmp_path / "d" / "signing"))
    with pytest.raises(PolicyError, match="one key is one site"):
        lead.read_request(study, tmp_path / "stolen.json")
    lead.revoke(study, "a", "")
    with pytest.raises(PolicyError, match="was revoked"):
        lead.approve(study, lead.read_request(study, taken), content)
    with pytest.raises(PolicyError, match="had before"):
        lead.renew_site(study, "a", lead.read_request(study, taken), content)


@pytest.mark.parametrize(("steps", "revoked"), [(0, False), (0, True), (1, False), (1, True), (2, True)])
def test_a_renewal_that_was_cut_off_lets_nobody_in_and_goes_on(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, revoked: bool
) -> None:
    if revoked:
        lead.revoke(study, "a", "")
    place, left = study / "sites" / "a", steps
    old = tmp_path / "old.json"
    old.write_bytes((place / "request.json").read_bytes())
    new, sent = request_of(tmp_path / "new", "a"), tmp_path / "new" / "request.json"

    def cut(plain: Callable[..., object]) -> Callable[..., object]:
        def step(*given: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise InterruptedError
            return plain(*given, **named)

        return step

    content = sent.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(lead, "write_bytes", cut(lead.write_bytes))
        patch.setattr(Path, "unlink", cut(Path.unlink))
        with pytest.raises(InterruptedError):
            lead.renew_site(study, "a", new, content)
    if revoked:
        assert standing(place) is None
    elif steps:
        with pytest.raises(ConfigError, match="not the request that was approved"):
            standing(place)
    if not steps:
        with pytest.raises(PolicyError, match="had before"):
            lead.renew_site(study, "a", lead.read_request(study, old), old.read_bytes())
    lead.renew_site(study, "a", lead.read_request(study, sent), content)
    assert registry(study)["a"] == new
    lead.revoke(study, "a", "")
    with pytest.raises(PolicyError, match="had before"):  # a site that is revoked again needs new keys again
        lead.renew_site(study, "a", new, content)


def test_a_run_is_true_to_the_invitation_or_refused(study: Path) -> None:
    assert wishes.invitation_of(study).config == (study / "config.yaml").read_text()
    (study / "app" / "server" / "app.py").write_text("print('other code')\n")
    with pytest.raises(ConfigError, match=r"not what app\.fab was built from"):
        lead.check_app(study)
    (study / "config.yaml").write_text((study / "config.yaml").read_text().replace("count: 3", "count: 4"))
    with pytest.raises(ConfigError, match=r"config\.yaml is not the one of"):
        wishes.invitation_of(study)


def test_a_study_is_made_whole_or_not_at_all(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        lead.create(study, PLAN, "a long passphrase")
    for plan, passphrase in ((PLAN, "short"), (replace(PLAN, until="2001-01-01"), "a long passphrase")):
        with pytest.raises(ConfigError):
            lead.create(tmp_path / "new", plan, passphrase)
    with pytest.raises(ConfigError, match=r"run\.dir"):
        lead.create(tmp_path / "new", replace(PLAN, overrides=["run.dir=x"]), "a long passphrase")
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]
    assert StudyFile.read(study).names == ["127.0.0.1", "link"]
    (study / "study.yaml").write_text((study / "study.yaml").read_text().replace("port: 8443", "prot: 8443"))
    with pytest.raises(ConfigError, match="Did you mean port"):
        StudyFile.read(study)


def test_the_proxy_passes_the_fleet_path_alone(study: Path) -> None:
    text = nginx.configuration(study, StudyFile.read(study))
    assert text.count("proxy_pass ") == 1
    assert 'location ~ "^/v1/fleet/[a-z-]{1,40}\\z" {' in text
    assert "location / { return 403; }" in text
    assert text.count("{") == text.count("}")
    if found := shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"):
        path = nginx.prepare(study, StudyFile.read(study))
        words = [found, "-t", "-c", str(path), "-p", str(study / "state" / "nginx"), "-e", "stderr"]
        subprocess.run(words, check=True)


def test_flowers_names_are_where_the_control_looks_for_them(study: Path) -> None:
    control = Control(study, replace(StudyFile.read(study), link_port=9))
    asking: list[Callable[[], object]] = [
        control.nodes,
        control.runs,
        lambda: control.register("a", pem_of(registry(study)["a"].node_key)),
        lambda: control.unregister(1),
        lambda: control.start(b"bundle", {"study": "", "sites": 2}),
        lambda: control.stop(1),
    ]
    for ask in asking:
        with pytest.raises(NetworkError, match="does not answer"):
            ask()


def test_progress_counts_the_rounds_of_a_resumed_arm_too() -> None:
    def event(second: int, **facts: object) -> dict[str, object]:
        return {"t": f"2027-01-01T00:00:{second:02d}+00:00", "stage": "pretrain", "site": ""} | facts  # no arm, no key

    def closed(second: int, number: int) -> dict[str, object]:
        return event(second, arm="federated", round=number, name="round/sites", value=3.0)

    plan, loss = event(0, round=0, name="planned", value=4.0), event(5, arm="federated", round=1)
    began = [plan, loss | {"name": "loss/total", "value": 0.5}, closed(5, 1)]
    assert progress(began, {"pretrain": 4}).loss == 0.5
    seen = progress([*began, event(6, round=0, name="planned", value=4.0), closed(16, 2)], {"pretrain": 4})
    assert (seen.round, seen.rounds, seen.done, seen.planned, seen.seconds_left) == (2, 4, 2, 4, 20.0)
    assert seen.loss is None
    assert progress([], {}).stage == ""
    masked = event(7, stage="keys", arm="federated", round=2, name="audit/lines", value=9.0)
    assert progress([*began, masked], {"pretrain": 4}).round == 1  # the stage goes on


ODD_TEXT = "[/a] [red]x[/red] \x1b[2J a\\"


def test_what_a_site_says_is_shown_as_it_is_and_never_obeyed(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = status.read(study)
    for site in facts["sites"]:
        site |= {"why": ODD_TEXT, "contact": ODD_TEXT}
    facts["run"] |= {"state": "running", "error": ODD_TEXT, "problem": ODD_TEXT, "since": ""}
    facts["progress"] |= {"told": [ODD_TEXT], "stage": "pretrain", "arm": ODD_TEXT, "planned": 4}
    facts["link"] = ODD_TEXT
    monkeypatch.setattr(status, "read", lambda _: json.loads(json.dumps(facts)))
    monkeypatch.setenv("COLUMNS", "300")
    for verb, times in (("status", 7), ("list", 2)):
        command([verb, str(study)])
        shown = capsys.readouterr().out
        assert shown.count("[/a] [red]x[/red] ?[2J a\\") == times, shown
        assert "\x1b[2J" not in shown


def test_the_commands_say_what_comes_next(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEDFL_CA_PASSPHRASE", "a long passphrase")
    handler = signal.getsignal(signal.SIGTERM)
    request_of(tmp_path / "c", "c")
    verbs = [["invite"], ["approve", str(tmp_path / "c" / "request.json"), "--yes"], ["renew"], ["revoke", "c"]]
    for verb, *rest in [*verbs, ["list"], ["run"], ["status"], ["stop"]]:
        command([verb, str(study), *rest])
        said = capsys.readouterr().out
        assert "medfl study" in said.splitlines()[-1], verb
    command(["status", str(study), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["keeper"], facts["study"]["sites"], len(facts["missing"])) == (False, 2, 2)
    with pytest.raises(ConfigError, match="no study"):
        command(["list", str(tmp_path)])
    with pytest.raises(ConfigError, match="need one of"):
        command(["begin", str(study)])
    (study / "authority" / "server.key").chmod(0o644)
    with pytest.raises(CredentialError, match="0600"):
        command(["serve", "link", str(study)])
    assert os.environ["MEDFL_CA_PASSPHRASE"]
    assert signal.getsignal(signal.SIGTERM) == handler
