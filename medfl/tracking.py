"""A run for TensorBoard while it goes on, and for MLflow when it ends. Nothing is sent anywhere.

TensorBoard: a run of its own for each arm and for each site of it, so that a chart shows them beside each other. Losses
are drawn over the rounds, scores over the share of the labels in per cent. MLflow: one run, in a SQLite file.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from medfl.errors import ConfigError
from medfl.overrides import flat
from medfl.run_folder import TRAININGS, Event, RunFolder
from medfl.study import Study

BOARD = "tensorboard"  # in the run folder
SCORES = "scores"  # in there
DATABASE, ARTIFACTS = "mlflow.db", "artifacts"  # in the MLflow folder
EXPERIMENT, OWNER = "medfl", "medfl.run"  # of a tag: the run folder
FILES = ("report.html", "config.yaml", "evaluation.csv", "transfer.csv", "encoder.json")
LONGEST = 6000  # characters of an MLflow parameter
PARAMETERS, VALUES = 100, 1000  # in one write to MLflow
OFFLINE = {"MLFLOW_DISABLE_TELEMETRY": "true"}
log = logging.getLogger(__name__)


@contextmanager
def tracked(folder: RunFolder, study: Study, *, tensorboard: bool, mlflow: str | None) -> Iterator[None]:
    """Follow what is written to the run folder inside of the `with`.

    Args:
        tensorboard: write <run>/tensorboard; without its package this is said once, and the study goes on.
        mlflow: a folder for MLflow's database and files, or None.

    Raises:
        ConfigError: MLflow is asked for and cannot be written; before anything starts.
    """
    with ExitStack() as open_:
        if mlflow is not None:
            open_.enter_context(_in_mlflow(folder, study, mlflow))
        if tensorboard and _has_tensorboard():
            open_.enter_context(_in_tensorboard(folder))
        yield


def _has_tensorboard() -> bool:
    if found := find_spec("tensorboard") is not None:
        return found
    log.warning(
        "no curves for TensorBoard: its package is absent. Run pip install 'medfl[tracking]', or set tensorboard=false."
    )
    return found


@contextmanager
def _in_tensorboard(folder: RunFolder) -> Iterator[None]:
    board = Board(folder.path / BOARD)
    try:
        with RunFolder.watched(board.add):
            yield
    finally:
        board.close()
    board.write_scores(folder.evaluations())


class Board:
    """TensorBoard's files of one run. Each event is on disk before the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arm = ""
        self.writers: dict[str, Any] = {}  # of the arm that trains

    def add(self, event: Event) -> None:
        """One value of a round. What an earlier process wrote of this and later rounds is hidden: they are repeated."""
        if event.stage not in TRAININGS or not event.arm or event.reason:
            return
        if event.arm != self.arm:  # arms train one after another, and each writer is a thread
            self.close()
            self.arm = event.arm
            earlier = [place.name for place in (self.path / _name(event.arm, "")).glob("*") if place.is_dir()]
            self.writers = {site: self._writer(event, site) for site in ("", *earlier)}
        if event.site not in self.writers:
            self.writers[event.site] = self._writer(event, event.site)
        self.writers[event.site].add_scalar(event.name, event.value, event.round)
        self.writers[event.site].flush()

    def _writer(self, event: Event, site: str) -> Any:
        return _writer(self.path / _name(event.arm, site), since=event.round)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}

    def write_scores(self, rows: list[dict[str, str]]) -> None:
        """All of evaluation.csv, anew."""
        shutil.rmtree(self.path / SCORES, ignore_errors=True)
        writers: dict[str, Any] = {}
        for row in rows:
            if row["value"]:
                name = _name(row["arm"], row["site"])
                writer = writers.get(name) or writers.setdefault(name, _writer(self.path / SCORES / name))
                percent = round(100 * float(row["label_fraction"]))
                writer.add_scalar(f"{row['protocol']}/{row['metric']}", float(row["value"]), percent)
        for writer in writers.values():
            writer.close()


def _writer(path: Path, *, since: int | None = None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(path), purge_step=since)


def _name(arm: str, site: str) -> str:
    """As the folders of arms are called (RunFolder.arm)."""
    return "/".join(filter(None, (arm.replace(":", "-"), site)))


@contextmanager
def _in_mlflow(folder: RunFolder, study: Study, place: str) -> Iterator[None]:
    """A run in MLflow, written when this one ends: whole, and in the place of an earlier one of the same run folder."""
    client, status = _client(place), "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _write_run(client, folder, study, status)


def _client(place: str) -> Any:
    """
    Raises:
        ConfigError: an address in the place of a folder, or no package.
    """
    if "://" in place:
        raise ConfigError(f"mlflow: got {place!r}, need a folder on this machine. Nothing is sent over a network.")
    if find_spec("mlflow") is None:
        raise ConfigError("mlflow: its package is absent. Run pip install 'medfl[tracking]', or leave mlflow out.")
    os.environ.update(OFFLINE)
    root = Path(place).expanduser().resolve()
    (root / ARTIFACTS).mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient
    from mlflow.telemetry import set_telemetry_client

    renew: Callable[[], None] = set_telemetry_client
    renew()  # MONAI imports MLflow wherever it is installed, before this was said
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every table that they make
    client = MlflowClient(tracking_uri=f"sqlite:///{root / DATABASE}")
    if client.get_experiment_by_name(EXPERIMENT) is None:
        client.create_experiment(EXPERIMENT, artifact_location=(root / ARTIFACTS).as_uri())
    return client


def _write_run(client: Any, folder: RunFolder, study: Study, status: str) -> None:
    """Parameters, values and files of a run; an earlier form of it is deleted."""
    experiment, owner = client.get_experiment_by_name(EXPERIMENT).experiment_id, str(folder.path.resolve())
    for earlier in client.search_runs([experiment], f"tags.`{OWNER}` = '{owner}'"):
        client.delete_run(earlier.info.run_id)
    run = client.create_run(experiment, run_name=folder.path.name, tags={OWNER: owner}).info.run_id
    from mlflow.entities import Metric, Param

    told = [Param(name, value[:LONGEST]) for name, value in flat(yaml.safe_load(study.source)).items()]
    for start in range(0, len(told), PARAMETERS):
        client.log_batch(run, params=told[start : start + PARAMETERS])
    values = [Metric(*value) for value in (*_rounds(folder), *_scores(folder))]
    for start in range(0, len(values), VALUES):
        client.log_batch(run, metrics=values[start : start + VALUES])
    for name in FILES:
        if (folder.path / name).exists():
            client.log_artifact(run, str(folder.path / name))
    client.set_terminated(run, status)


def _rounds(folder: RunFolder) -> Iterator[tuple[str, float, int, int]]:
    """(name, value, ms since 1970, round) of the figures of whole arms; a repeated one counts once, the last."""
    events = [e for e in folder.events() if e["stage"] in TRAININGS and e.get("arm") and not e.get("reason")]
    events = [e for e in events if not e.get("site")]
    last = {(e["arm"], e["name"], e["round"]): e for e in events}
    for (arm, name, round_), event in last.items():
        yield _key(arm, name), float(event["value"]), _milliseconds(datetime.fromisoformat(event["t"])), round_


def _scores(folder: RunFolder) -> Iterator[tuple[str, float, int, int]]:
    """As `_rounds`, with the share of the labels, in per cent, in the place of the round."""
    now = _milliseconds(datetime.now(UTC))
    for row in folder.evaluations():
        if row["value"]:
            share = round(100 * float(row["label_fraction"]))
            yield _key(row["arm"], row["protocol"], row["metric"], row["site"]), float(row["value"]), now, share


def _milliseconds(time: datetime) -> int:
    return round(1000 * time.timestamp())


def _key(*parts: str) -> str:
    return "/".join(part.replace(":", "-") for part in parts)
