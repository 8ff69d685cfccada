"""kill -9 at any round, then the same command with resume=true: the same encoder, bit for bit."""

import os
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
from medfl.run_folder import Evaluated, Event, RunFolder
from tests.federation.small import SMALL, digest, run, small_study

pytestmark = pytest.mark.federation
ROUNDS = 4


def test_a_line_that_a_crash_cut_short_goes_before_the_next_is_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write([Event("pretrain", "federated", 1, "", "loss/total", 0.5)])
    folder.evaluated([Evaluated("federated", "site-1", "linear", "auc", "0.5")])
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "evaluation.csv")}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content + content[:20])
    folder.write([Event("pretrain", "federated", 2, "", "loss/total", 0.4)])
    folder.evaluated([Evaluated("federated", "site-2", "linear", "auc", "0.6")])
    assert [event["round"] for event in folder.events()] == [1, 2]
    assert [row["site"] for row in folder.evaluations()] == ["site-1", "site-2"]
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


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "round-0001" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"no checkpoint under .* is whole: .*SHA-256.*Remove the folder"):
        checkpoint.newest(tmp_path)


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
