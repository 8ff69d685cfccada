"""Differential privacy over whole federations with the real apps: what leaves, what is booked, when it ends."""

import csv
from pathlib import Path

import pytest
import yaml

from medfl.errors import PrivacyError
from medfl.privacy.accounting import BUCKET, PATIENT, spent
from medfl.privacy.ledger import Ledger
from medfl.report.page import write
from medfl.run_folder import RunFolder
from tests.federation.small import run, small_study

pytestmark = pytest.mark.federation
TUNED = ("finetune.protocols=[federated_head]", "finetune.rounds=1", "finetune.steps=2")
ALONE = ("arms=[federated]", "privacy.noise=3", "privacy.codes_noise=4")


def wire(folder: RunFolder) -> list[dict[str, str]]:
    with (folder.path / "wire.csv").open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["direction"] == "up"]


def test_nothing_but_noised_weights_leaves_and_every_release_is_booked(tmp_path: Path) -> None:
    study = small_study(tmp_path, "method=medcss", "privacy=group", *ALONE, *TUNED)
    folder = run(study, stages="pretrain,finetune,evaluate,report")
    rows = [row for row in wire(folder) if row["stage"] in ("pretrain", "finetune", "refresh")]
    assert {row["role"] for row in rows} == {"parameter", "metric"}
    numbers = {row["name"] for row in rows if row["role"] == "metric"}
    assert numbers <= {"site/volumes", "site/steps", "site/seconds", "site/delta", "site/epsilon", "site/epsilon_rdp"}
    for site in ("site-1", "site-2"):
        releases = Ledger.of(Path(study.state_dir), site).releases()
        assert [(one.unit, one.steps, one.noise) for one in releases] == [(BUCKET, 2, 3.0)] * 3
        told = {e["name"]: e["value"] for e in folder.events() if e["site"] == site and "site/" in e["name"]}
        assert told["site/epsilon"] == spent(releases, told["site/delta"]).epsilon
    page = write(folder.path).read_text()
    assert "Differential privacy" in page
    assert f"{told['site/epsilon']:.3g}" in page


def test_codebooks_leave_as_noised_sums_from_public_beginnings(tmp_path: Path) -> None:
    study = small_study(tmp_path, "method=dissect", "method.codes=8", "privacy=patient", *ALONE)
    folder = run(study)
    rows = wire(folder)
    assert {row["role"] for row in rows} == {"parameter", "target", "codebook", "metric"}
    assert not [row for row in rows if row["stage"] == "codebook"]
    releases = Ledger.of(Path(study.state_dir), "site-1").releases()
    # the target network is an average of noised weights
    trained, books = ([one for one in releases if one.steps == steps] for steps in (2, 1))
    assert len(trained) == 2
    assert [(one.unit, one.noise) for one in books] == [(PATIENT, 4.0)] * 3
    assert not [event for event in folder.events() if event["name"].endswith("index_alarm")]


def test_a_spent_budget_ends_the_part_of_a_site_and_then_the_run(tmp_path: Path) -> None:
    once = run(small_study(tmp_path / "once", "method=byol", "privacy=patient", *ALONE, "rounds.count=1"))
    first = max(e["value"] for e in once.events() if e["name"] == "site/epsilon_rdp")
    limit = f"privacy.max_epsilon={first * 1.01}"
    study = small_study(tmp_path / "more", "method=byol", "privacy=patient", *ALONE, "rounds.count=3", limit)
    with pytest.raises(PrivacyError) as error:
        run(study)
    assert error.value.exit_code == 60
    folder = RunFolder(Path(study.run_dir))
    rounds = [event["round"] for event in folder.events() if event["name"] == "round/sites"]
    assert rounds == [1]
    refused = [event["reason"] for event in folder.events() if event["name"] == "refused"]
    assert len(refused) == 2
    assert all("budget" in reason for reason in refused)
    assert len(Ledger.of(Path(study.state_dir), "site-1").releases()) == 1
    assert yaml.safe_load(study.source)["privacy"]["max_epsilon"] == pytest.approx(first * 1.01)
