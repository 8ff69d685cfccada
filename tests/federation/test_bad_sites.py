"""A federation with one bad site: what it sends is flagged or left out, and the others still learn."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from client.app import app as client
from medfl.carriers import InProcessGrid
from medfl.checkpoint import newest
from medfl.conduct import of_tensors
from medfl.errors import ConfigError
from medfl.layout import Flat
from medfl.messages import PRETRAIN, Broadcast, from_array, to_array
from medfl.run_folder import RunFolder
from server.app import app as server
from tests.federation.small import run, small_study

pytestmark = pytest.mark.federation
GROUP = "parameter/all/float32"
START = math.log(2 * 32 - 1)  # loss of embeddings that know nothing
LENGTH = ("sites.count=5", "arms=[federated]", "method=simclr", "views=light", "data.count=300", "encoder.base_width=8",
          "training.optimizer.lr=5e-3", "training.steps=10", "rounds.count=3")  # fmt: skip


class OneBad(InProcessGrid):
    """`answer` makes what site-2 sends of (its own weights, the broadcast, what it was told earlier)."""

    answer: Callable[[np.ndarray, np.ndarray, list[np.ndarray]], np.ndarray]

    def __init__(self, nodes: int) -> None:
        super().__init__(client, nodes)
        self.seen: list[np.ndarray] = []  # weights that the sites sent, as they were

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        if message.metadata.message_type == PRETRAIN:
            old: Flat = Broadcast.from_record(message.content).flat
            records = reply.content.array_records["parameter"]
            weights = from_array(records["all/float32"]).copy()
            if reply.content.config_records["identity"]["site"] == "site-2":
                records["all/float32"] = to_array(type(self).answer(weights, old[GROUP], self.seen))
            self.seen.append(weights)
        return reply


def federate(folder: Path, answer: Callable[..., np.ndarray], *overrides: str) -> RunFolder:
    study = small_study(folder, *LENGTH, *overrides)
    made = RunFolder.create(Path(study.run_dir), study.source, resume=True)
    asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": 6}
    grid = type("Grid", (OneBad,), {"answer": staticmethod(answer)})(6)
    server(grid, Context(1, 1, {}, RecordDict(), dict(asked)))
    return made


def flipped(weights: np.ndarray, old: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
    return old - 3 * (weights - old)


def loss(folder: RunFolder) -> float:
    return [e["value"] for e in folder.events() if e["name"] == "loss/nt_xent" and not e["site"]][-1]


@pytest.fixture(scope="module")
def gained(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """Nats without a bad site, and with one and the plain mean."""
    place = tmp_path_factory.mktemp("gained")
    return START - loss(run(small_study(place / "clean", *LENGTH), nodes=6)), START - loss(
        federate(place / "open", flipped)
    )


@pytest.mark.parametrize("defence", ["rule=median", "rounds.inspect=exclude"])
def test_a_flipped_site_does_not_stop_the_others(defence: str, gained: tuple[float, float], tmp_path: Path) -> None:
    clean, undefended = gained
    defended = START - loss(federate(tmp_path, flipped, defence))
    assert clean > 1.0
    assert defended > max(0.75 * clean, undefended)


def test_flag_names_the_bad_site_alone_and_exclude_leaves_it_out(tmp_path: Path) -> None:
    flagged = federate(tmp_path / "flag", flipped, "rounds.inspect=flag").events()
    remarks = [event["reason"] for event in flagged if event["name"] == "remark"]
    assert len(remarks) == 3
    assert all("'site-2' sticks out" in remark for remark in remarks)
    assert len([e for e in flagged if e["name"] == "round/influence"]) == 3 * 5
    worst = {e["round"]: e["site"] for e in sorted((e for e in flagged if e["name"] == "round/influence"),
                                                   key=lambda e: e["value"])}  # fmt: skip
    assert set(worst.values()) == {"site-2"}  # and it moves the aggregate most
    excluded = federate(tmp_path / "exclude", flipped, "rounds.inspect=exclude").events()
    assert [e["site"] for e in excluded if e["name"] == "refused"] == ["site-2"] * 3
    assert {e["site"] for e in excluded if e["name"] == "round/weight"} == {f"site-{n}" for n in (1, 3, 4, 5)}


FREE = {
    "unchanged": (lambda weights, old, seen: old, "'site-2' sent the broadcast back unchanged", 3),
    "copied": (lambda weights, old, seen: seen[-1] if len(seen) % 5 == 1 else weights, "'site-1' and 'site-2'", 3),
    "replayed": (lambda weights, old, seen: seen[1] if len(seen) > 5 else weights, "'site-2' sent an update of an", 2),
}


@pytest.mark.parametrize("kind", FREE)
def test_free_riders_and_copies_are_named(kind: str, tmp_path: Path) -> None:
    """Copied: site-1 answers first, so its weights are the last seen."""
    answer, text, times = FREE[kind]
    events = federate(tmp_path, answer, "rounds.inspect=none").events()
    remarks = [event["reason"] for event in events if event["name"] == "remark"]
    assert len(remarks) == times
    assert all(text in remark for remark in remarks)


def test_an_answer_that_is_refused_does_not_end_a_study_that_withstands_a_bad_site(tmp_path: Path) -> None:
    short = ("rounds.count=2", "training.steps=2")
    words = ("rule=krum", "rule.bad=1", *short)
    events = federate(tmp_path / "nan", lambda weights, old, seen: weights * np.nan, *words).events()
    assert [e["site"] for e in events if e["name"] == "refused"] == ["site-2"] * 2
    assert len([e for e in events if e["name"] == "round/sites"]) == 2
    with pytest.raises(ConfigError, match="krum: got 5 sites, need 7 to withstand"):
        federate(tmp_path / "few", flipped, "rule=krum", "rule.bad=2", *short)
    stages = {row.rpartition(",")[2] for row in (tmp_path / "few" / "wire.csv").read_text().splitlines()}
    assert "enrol" in stages
    assert "pretrain" not in stages  # nobody trained for it


def test_what_is_known_of_earlier_updates_is_in_the_checkpoint(tmp_path: Path) -> None:
    federate(tmp_path, lambda weights, old, seen: weights, "rounds.count=2")
    saved, _ = newest(tmp_path / "checkpoints")
    assert saved is not None
    assert {name: len(kept) for name, kept in of_tensors(saved.tensors).items()} == {
        f"site-{n}": 2 for n in range(1, 6)
    }
