"""The keeper's decisions, against a SuperLink that is a list of nodes and runs."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from medfl.deployment import lead, status, wishes
from medfl.deployment.control import FlowerRun, Node
from medfl.deployment.keeper import FRUITLESS, Keeper
from medfl.errors import NetworkError
from tests.test_study_lead import a_study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_study(tmp_path_factory.mktemp("lead") / "study")


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "study"))


@dataclass
class SuperLink:
    """What the keeper sees of one: nodes and runs that a test sets."""

    listed: list[Node] = field(default_factory=list)
    submitted: list[tuple[bytes, Mapping[str, str | int]]] = field(default_factory=list)
    running: list[FlowerRun] = field(default_factory=list)
    down: bool = False

    def nodes(self) -> list[Node]:
        if self.down:
            raise NetworkError("the SuperLink does not answer")
        return list(self.listed)

    def register(self, name: str, key: bytes) -> int:
        self.listed.append(Node(len(self.listed), key, name, "registered", "", ""))
        return len(self.listed)

    def unregister(self, node: int) -> None:
        self.listed = [replace(n, status="unregistered") if n.id == node else n for n in self.listed]

    def runs(self) -> list[FlowerRun]:
        return self.running[::-1]

    def start(self, bundle: bytes, run_config: Mapping[str, str | int]) -> int:
        self.submitted.append((bundle, run_config))
        self.running.append(FlowerRun(len(self.submitted), "running", "", "", hashlib.sha256(bundle).hexdigest()))
        return len(self.submitted)

    def stop(self, run: int) -> None:
        self.end("stopped", run)

    def end(self, how: str, run: int = 0) -> None:
        ended = [replace(r, status="finished", ended=how, details="gone") for r in self.running]
        self.running = [new if run in (0, old.id) else old for old, new in zip(self.running, ended, strict=True)]


@pytest.fixture
def kept(study: Path) -> tuple[Keeper, SuperLink]:
    link = SuperLink()
    return Keeper(study, link, lambda _: None), link  # type: ignore[arg-type]


def tick(keeper: Keeper) -> dict[str, Any]:
    keeper.asked = keeper.next_try = float("-inf")
    keeper.tick()
    return json.loads((keeper.state / status.FILE).read_text())


def test_the_keeper_lets_in_who_is_approved_and_nobody_else(kept: tuple[Keeper, SuperLink]) -> None:
    keeper, link = kept
    link.listed = [Node(7, b"a stranger's", "x", "online", "", "")]
    tick(keeper)
    facts = tick(keeper)
    assert {(n.name, n.status) for n in link.listed if n.status != "unregistered"} == {
        ("a", "registered"),
        ("b", "registered"),
    }
    assert {site["name"]: site["state"] for site in facts["sites"]} == dict.fromkeys("ab", "never connected")
    lead.revoke(keeper.folder, "a", "")
    (keeper.folder / "sites" / "b" / "request.json").write_text("{}")  # being written at this instant, say
    tick(keeper)
    facts = tick(keeper)
    assert {n.name for n in link.listed if n.status == "registered"} == {"b"}
    assert {site["name"]: site["state"] for site in facts["sites"]} == {"a": "revoked", "b": "damaged"}
    link.down = True
    assert "does not answer" in tick(keeper)["link"]


def test_the_keeper_resumes_a_killed_run_and_no_other(kept: tuple[Keeper, SuperLink]) -> None:
    keeper, link = kept
    invitation = wishes.invitation_of(keeper.folder)
    wishes.ask_run(keeper.folder, "")
    assert tick(keeper)["run"]["state"] == "running"
    bundle, asked = link.submitted[0]
    assert (bundle, asked["study"], asked["root"]) == (invitation.app, invitation.config, str(keeper.folder))
    link.end("failed")  # no outcome.json: it was killed
    again = Keeper(keeper.folder, link, lambda _: None)  # type: ignore[arg-type]  # as was the keeper
    assert tick(again)["run"]["count"] == 2
    assert tick(again)["run"]["count"] == 2
    link.running.append(FlowerRun(99, "running", "", "", "another bundle"))
    tick(again)
    assert [run.id for run in link.running if run.lives] == [2]
    (keeper.folder / "run" / "attempt.lock").write_text("2")  # nobody holds it: the ServerApp is gone
    tick(again)
    assert tick(again)["run"]["count"] == 3
    (keeper.folder / "run" / "outcome.json").write_text('{"state": "failed", "error": "diverged", "code": 50}')
    link.end("failed")
    facts = tick(again)["run"]
    assert (facts["state"], facts["error"], facts["code"], facts["count"]) == ("failed", "diverged", 50, 3)
    tick(again)
    assert len(link.submitted) == 3


def test_the_keeper_gives_up_only_without_progress(kept: tuple[Keeper, SuperLink]) -> None:
    keeper, link = kept
    wishes.ask_run(keeper.folder, "")
    for number in range(FRUITLESS + 3):
        assert tick(keeper)["run"]["state"] == "running"
        place = keeper.folder / "run" / "checkpoints" / f"round-{number:04d}"
        place.mkdir(parents=True)
        (place / "state.json").write_text("{}")
        link.end("failed")
    for _ in range(FRUITLESS):
        assert tick(keeper)["run"]["state"] == "running"
        link.end("failed")
    facts = tick(keeper)["run"]
    assert facts["state"] == "gave up"
    assert "without a new checkpoint (gone)" in facts["error"]
    assert not (keeper.state / wishes.REQUEST).exists()


@pytest.mark.parametrize("code", [20, 30])
def test_the_keeper_tries_again_where_sites_or_disk_may_be_back(kept: tuple[Keeper, SuperLink], code: int) -> None:
    keeper, link = kept
    wishes.ask_run(keeper.folder, "")
    for attempt in range(1, FRUITLESS + 1):
        assert tick(keeper)["run"]["count"] == attempt
        (keeper.folder / "run").mkdir(exist_ok=True)
        told = {"state": "failed", "error": "no sites", "code": code}
        (keeper.folder / "run" / "outcome.json").write_text(json.dumps(told))
        link.end("failed")
        facts = tick(keeper)["run"]
        assert (facts["state"], facts["error"], facts["count"]) == ("requested", "no sites", attempt)
        before, keeper.asked = keeper.next_try, float("-inf")
        keeper.tick()
        assert len(link.submitted) == attempt  # it waits first
        assert before > 0
    facts = tick(keeper)["run"]
    assert (facts["state"], facts["code"]) == ("gave up", code)
    assert "(no sites)" in facts["error"]


def test_the_keeper_stops_a_run_when_asked(kept: tuple[Keeper, SuperLink]) -> None:
    keeper, link = kept
    wishes.ask_run(keeper.folder, "pretrain")
    tick(keeper)
    wishes.ask_stop(keeper.folder)
    assert tick(keeper)["run"]["state"] == "stopped"
    assert not (keeper.state / wishes.STOP).exists()
    tick(keeper)
    assert len(link.submitted) == 1
    assert not any(run.lives for run in link.running)
