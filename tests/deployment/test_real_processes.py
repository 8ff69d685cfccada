"""A whole study as real processes: nginx, SuperLink, SuperNodes and their apps, through the commands people type."""

import shutil
from pathlib import Path

import pytest

from tests.deployment.real import SITES, Loopback
from tests.federation.small import digest

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.skipif(
        not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()), reason="nginx is not installed: see .ci/run"
    ),
]
STUDY = (
    "stages=[pretrain,finetune,evaluate,transfer,report]", "arms=[federated]", "rounds.count=2",
    "finetune.protocols=[federated_finetune]", "evaluation.pictures=none",
)  # fmt: skip


def test_a_whole_study_gives_the_simulations_files(tmp_path: Path) -> None:
    study = Loopback(tmp_path, STUDY)
    study.make()
    try:
        study.start()
        assert "finished" in study.medfl("study", "run", study.lead, "--wait")
        for name in SITES:
            assert "whole" in study.medfl("site", "audit", "verify", "--site", study.places[name])
    finally:
        study.stop()
    simulated = study.simulated(tmp_path / "simulated")
    for name in ("encoder.safetensors", "evaluation.csv", "transfer.csv"):
        assert digest(study.lead / "run" / name) == digest(simulated / name), name
    assert (study.lead / "run" / "report.html").stat().st_size > 10_000
