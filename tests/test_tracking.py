"""Curves for TensorBoard and MLflow hold what the run folder holds, once, and nothing is sent anywhere."""

import logging
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medfl import tracking
from medfl.errors import ConfigError
from medfl.overrides import flat
from medfl.run_folder import Event, RunFolder
from medfl.tracking import tracked
from tests.run_folder import CONFIG, write_run

SITES = ("", "site-1", "site-2")


@pytest.fixture
def study(tmp_path: Path) -> Any:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    return SimpleNamespace(source=(tmp_path / "run" / "config.yaml").read_text())


@pytest.fixture
def folder(study: Any, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses that a connection was tried to."""
    tried: list[object] = []

    def refuse(_: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


def rounds(folder: RunFolder, first: int, last: int, sites: tuple[str, ...] = SITES) -> None:
    for at in range(first, last + 1):
        folder.write([Event("pretrain", "federated", at, site, "loss/total", 1 / at + len(site)) for site in sites])


def drawn(folder: RunFolder) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """TensorBoard's run -> tag -> (step, value), as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    board = EventMultiplexer().AddRunsFromDirectory(str(folder.path / tracking.BOARD))
    board.Reload()
    return {
        run: {tag: [(e.step, e.value) for e in board.Scalars(run, tag)] for tag in tags["scalars"]}
        for run, tags in board.Runs().items()
    }


def test_a_resumed_run_is_drawn_once_in_each_round(folder: RunFolder, study: Any) -> None:
    with tracked(folder, study, tensorboard=True, mlflow=None):
        rounds(folder, 1, 5)
        folder.write([Event("pretrain", "local:site-1", 1, "site-1", "loss/total", 2.0)])
        folder.write([Event("pretrain", "federated", 5, "site-2", "refused", 1.0, "a text is no curve")])
        folder.write([Event("enrol", "", 0, "site-1", "site/train", 40.0)])
    folder.forget_after("federated", 3)
    with tracked(folder, study, tensorboard=True, mlflow=None):
        rounds(folder, 4, 4, ("", "site-1"))  # this time site-2 misses round 4
        rounds(folder, 5, 7)
    curves = drawn(folder)
    for site in SITES:
        steps = [1, 2, 3, 5, 6, 7] if site == "site-2" else [1, 2, 3, 4, 5, 6, 7]
        name = f"federated/{site}" if site else "federated"
        assert curves[name] == {"loss/total": [(at, pytest.approx(1 / at + len(site))) for at in steps]}
    assert curves["local-site-1/site-1"] == {"loss/total": [(1, 2.0)]}
    for row in (row for row in folder.evaluations() if row["value"]):
        curve = curves[f"scores/{row['arm'].replace(':', '-')}/{row['site']}"][f"{row['protocol']}/{row['metric']}"]
        assert curve == [(100, pytest.approx(float(row["value"])))]


def test_without_tensorboard_the_study_goes_on(
    folder: RunFolder, study: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING), tracked(folder, study, tensorboard=True, mlflow=None):
        rounds(folder, 1, 2)
    assert [record.message for record in caplog.records] == [
        "no curves for TensorBoard: its package is absent. Run pip install 'medfl[tracking]', or set tensorboard=false."
    ]
    assert not (folder.path / tracking.BOARD).exists()
    with pytest.raises(ConfigError, match=r"medfl\[tracking\]"), tracked(folder, study, tensorboard=False, mlflow="x"):
        pytest.fail("it must be refused before anything starts")


def test_mlflow_needs_a_folder(folder: RunFolder, study: Any) -> None:
    with (
        pytest.raises(ConfigError, match="need a folder on this machine"),
        tracked(folder, study, tensorboard=False, mlflow="https://mlflow.example"),
    ):
        pytest.fail("it must be refused before anything starts")


def test_mlflow_holds_one_whole_run_and_sends_nothing(
    folder: RunFolder, study: Any, tmp_path: Path, offline: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.telemetry import client as telemetry

    monkeypatch.setattr(telemetry, "_MLFLOW_TELEMETRY_CLIENT", SimpleNamespace())  # MONAI had imported MLflow before
    place = tmp_path / "mlflow"
    rounds(folder, 1, 2)
    with pytest.raises(KeyboardInterrupt), tracked(folder, study, tensorboard=False, mlflow=str(place)):
        raise KeyboardInterrupt
    (folder.path / "report.html").write_text("<p>")
    with tracked(folder, study, tensorboard=False, mlflow=str(place)):
        rounds(folder, 3, 4)
    from mlflow import MlflowClient
    from mlflow.entities import ViewType

    client = MlflowClient(tracking_uri=f"sqlite:///{place / tracking.DATABASE}")
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    (stopped,) = client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY)
    (run,) = client.search_runs([experiment])
    assert [stopped.info.status, run.info.status] == ["KILLED", "FINISHED"]
    assert run.data.params == flat(CONFIG)
    history = client.get_metric_history(run.info.run_id, "federated/loss/total")
    assert sorted((m.step, m.value) for m in history) == [(at, pytest.approx(1 / at)) for at in (1, 2, 3, 4)]
    final = {f"{row['arm'].replace(':', '-')}/{row['protocol']}/{row['metric']}/{row['site']}": float(row["value"])
             for row in folder.evaluations() if row["value"]}  # fmt: skip
    assert {name: value for name, value in run.data.metrics.items() if name in final} == pytest.approx(final)
    assert "report.html" in {file.path for file in client.list_artifacts(run.info.run_id)}
    assert str(place) in run.info.artifact_uri
    assert offline == []
    assert telemetry.get_telemetry_client() is None
