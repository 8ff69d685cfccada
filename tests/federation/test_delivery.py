"""However replies come, each site counts once: delivered twice, in any order, or of a site that was away at first."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Context, Error, Message, RecordDict

from client.app import app as client
from medfl.carriers import FIRST_NODE, InProcessGrid
from medfl.messages import DESCRIBE
from medfl.run_folder import RunFolder
from server.app import app as server
from tests.federation.small import digest, small_study

pytestmark = pytest.mark.federation


class Twice(InProcessGrid):
    """Every reply is there twice."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [reply for reply in super().pull_messages(message_ids) for _ in range(2)]


class Backwards(InProcessGrid):
    """The reply to the last message comes first."""

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        last = next(reversed(self._waiting), "")
        return super().pull_messages(name for name in message_ids if name == last)


class Away(InProcessGrid):
    """The first site is not reached when it is asked for its name the first time."""

    missed = False

    def deliver(self, message: Message) -> Message:
        if message.metadata.message_type == DESCRIBE and message.metadata.dst_node_id == FIRST_NODE and not self.missed:
            self.missed = True
            return Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
        return super().deliver(message)


def carried(grid: type[InProcessGrid], place: Path) -> RunFolder:
    study = small_study(place, "arms=[federated]", "stages=[pretrain]", "sites.count=3")
    folder = RunFolder.create(place, study.source, resume=True)
    asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": 4}
    server(grid(client, 4), Context(1, 1, {}, RecordDict(), dict(asked)))
    return folder


def test_replies_count_once_and_in_any_order(tmp_path: Path) -> None:
    plain = carried(InProcessGrid, tmp_path / "plain")
    for grid in (Twice, Backwards):
        other = carried(grid, tmp_path / grid.__name__)
        assert digest(other.path / "encoder.safetensors") == digest(plain.path / "encoder.safetensors")
        assert len(other.wire_rows()) == len(plain.wire_rows())
        assert [e["site"] for e in other.events() if e["name"] == "round/weight"] == ["site-1", "site-2", "site-3"] * 2


def test_a_site_that_was_away_when_names_were_asked_for_joins_the_rounds(tmp_path: Path) -> None:
    events = carried(Away, tmp_path / "away").events()
    assert "Node Unavailable" in next(e["reason"] for e in events if e["name"] == "refused")
    weighed = {(e["site"], e["round"]) for e in events if e["name"] == "round/weight"}
    assert ("site-1", 1) in weighed
    assert [e["site"] for e in events if e["name"] == "joined"] == ["site-1"]
