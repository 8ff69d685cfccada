"""kill -9 at any round, then the same command with resume=true: the same encoder, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medfl import checkpoint
from medfl.errors import ConfigError, DataError
from medfl.run_folder import WIRE, Evaluated, Event, RunFolder
from medfl.state import SiteState
from tests.federation.small import SMALL, digest, run, small_study

pytestmark = pytest.mark.federation
ROUNDS = 4


def test_a_line_that_a_crash_cut_short_goes_before_the_next_is_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write([Event("pretrain", "federated", 1, "", "loss/total", 0.5)])
    folder.wire([dict.fromkeys(WIRE, "1")])
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "wire.csv")}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content + content[:20])
    folder.write([Event("pretrain", "federated", 2, "", "loss/total", 0.4)])
    folder.wire([dict.fromkeys(WIRE, "2")])
    assert [event["round"] for event in folder.events()] == [1, 2]
    assert [row["site"] for row in folder.wire_rows()] == ["1", "2"]
    assert all((tmp_path / name).read_bytes().startswith(content) for name, content in whole.items())


def command(folder: Path, *extra: str) -> list[str]:
    overrides = [
        f"run.dir={folder}",
        f"rounds.count={ROUNDS}",
        "arms=[federated]",
        "stages=[pretrain]",
        "training.steps=6",
    ]
    return [sys.executable, "-m", "medfl.cli.main", "simulate", *SMALL, *overrides, *extra]


def kill_when(words: list[str], ready: Callable[[], bool]) -> None:
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not ready():
            assert started.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(started.pid, signal.SIGKILL)
        started.wait()


def test_killed_runs_end_with_the_same_encoder(tmp_path: Path) -> None:
    reference, broken = tmp_path / "reference", tmp_path / "broken"
    subprocess.run(command(reference), check=True, stdout=subprocess.DEVNULL)
    moments = [
        lambda: (broken / "wire.csv").exists(),  # round 1 is on its way, nothing is saved
        lambda: (broken / "checkpoints" / "round-0001").exists(),
        lambda: (
            (broken / "checkpoints" / ".round-0003.draft").exists() or (broken / "checkpoints" / "round-0003").exists()
        ),
    ]
    for index, moment in enumerate(moments):
        kill_when(command(broken, *(["resume=true"] if index else [])), moment)
    assert not (broken / "encoder.safetensors").exists()
    subprocess.run(command(broken, "resume=true"), check=True, stdout=subprocess.DEVNULL)
    assert digest(broken / "encoder.safetensors") == digest(reference / "encoder.safetensors")
    rounds = [e["round"] for e in RunFolder(broken).events() if e["name"] == "round/seconds"]
    assert rounds == list(range(1, ROUNDS + 1))  # none lost, none twice


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    study = small_study(tmp_path / "run")
    RunFolder.create(tmp_path / "run", study.source, resume=False)
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder.create(tmp_path / "run", study.source, resume=False)
    with pytest.raises(ConfigError, match="holds another study"):
        RunFolder.create(tmp_path / "run", small_study(tmp_path / "run", "seed=1").source, resume=True)


def saved(folder: Path, rounds: int) -> None:
    for number in range(1, rounds + 1):
        tensors = {"parameter/all/float32": torch.full((1000,), float(number))}
        checkpoint.save(folder, number, checkpoint.Checkpoint(tensors, {"arm": "federated"}), keep=2)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(name: str, share: float, tmp_path: Path) -> None:
    saved(tmp_path, 3)
    file = tmp_path / "round-0003" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    found, lines = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.facts["round"] == 2
    assert "round-0003 is damaged" in lines[0]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_thousand_flipped_bits_and_every_truncation_are_noticed(name: str, tmp_path: Path) -> None:
    saved(tmp_path, 2)
    file, whole = tmp_path / "round-0002" / name, checkpoint.newest(tmp_path)[0]
    content, draw = file.read_bytes(), random.Random(0)
    damaged = [content[: len(content) * share // 100] for share in range(100)]
    for _ in range(1000):
        spoiled = bytearray(content)
        spoiled[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(spoiled))
    for spoiled in damaged:
        file.write_bytes(spoiled)
        found, lines = checkpoint.newest(tmp_path)
        if spoiled.translate(None, b" \n\t\r") == content.translate(None, b" \n\t\r"):  # JSON may be spaced otherwise
            assert found is not None
            assert whole is not None
            assert found.facts == whole.facts
            continue
        assert found is not None
        assert found.facts["round"] == 1
        assert "round-0002 is damaged" in lines[0]


def test_without_a_whole_checkpoint_the_run_says_so(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "round-0001" / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"no checkpoint under .* is whole: .*Remove the folder"):
        checkpoint.newest(tmp_path)


def test_a_damaged_state_of_a_site_is_never_gone_on_from(tmp_path: Path) -> None:
    state = SiteState(tmp_path, "line", "site-1")
    for number in (1, 2, 2):
        state.save(number, {"queue": torch.full((100,), float(number))})
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert state.before(2)["queue"][0] == 1
    (file,) = tmp_path.rglob("round-0002-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"round-0002-.* is damaged: its hash differs\. Remove it"):
        state.before(3)


def test_scores_of_a_site_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that has one row is not asked again."""
    folder = RunFolder(tmp_path)
    folder.evaluated([Evaluated("federated", "site-1", "linear", "auc", "0.5")])
    before = (tmp_path / "evaluation.csv").read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.evaluated([Evaluated("federated", "site-2", "linear", m, "0.6") for m in ("auc", "accuracy")])
    assert (tmp_path / "evaluation.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.csv"]


def test_only_the_last_checkpoints_stay(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0004", "round-0005"]


def test_stages_can_be_run_alone_on_a_finished_run(tmp_path: Path) -> None:
    study = small_study(tmp_path, "arms=[random,local,federated]", "rounds.count=1")
    run(study, stages="pretrain")
    before = digest(tmp_path / "encoder.safetensors")
    folder = run(study, stages="evaluate,transfer,report")
    pairs = {(row["arm"], row["site"]) for row in folder.evaluations()}
    arms = ("random", "federated", "local:site-1", "local:site-2")
    assert pairs == {(arm, site) for arm in arms for site in ("site-1", "site-2")}
    assert digest(tmp_path / "encoder.safetensors") == before
    assert (tmp_path / "report.html").stat().st_size > 1000
