"""The stage synthesize with the real apps: images stay at their site, and pretraining takes the share it is told."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medfl import site_synthesis
from medfl.cli.main import main
from medfl.errors import MedflError
from medfl.files import write_bytes, write_tensors
from medfl.site import Site, open_site
from medfl.study import Study
from tests.federation.small import run, small_study

pytestmark = pytest.mark.federation
OWN = ("data.count=320", "synthesis=tiny", "arms=[federated,central]", "training.synthetic=0.25")


def made(study: Study) -> dict[str, dict[str, float]]:
    """site -> what the copy of the record on its own disk says."""
    folders = sorted((Path(study.state_dir) / "synthetic").iterdir())
    return {folder.name: site_synthesis.read_record(folder)["counts"] for folder in folders}


def enough(study: Study) -> None:
    """Images as a longer training might make, under the record that the stage wrote: a tiny model makes only noise."""
    for folder in (Path(study.state_dir) / "synthetic").iterdir():
        images = 0.1 * torch.randn(80, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        record = site_synthesis.read_record(folder) | {
            "sha256": write_tensors(folder / "images.safetensors", {"images": images})
        }
        write_bytes(folder / "curation.json", json.dumps(record).encode())


def test_images_are_made_once_and_only_counts_leave(tmp_path: Path) -> None:
    study = small_study(tmp_path, *OWN)
    folder = run(study, stages="synthesize")
    found = made(study)
    assert found.keys() == {"site-1", "site-2"}
    for site, counts in found.items():
        own = site_synthesis.folder_of(study.state_dir, site)
        assert len(load_file(own / "images.safetensors").get("images", [])) == counts["kept"]
        assert (own / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    with (folder.path / "wire.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "synthesize"]
    assert {row["role"] for row in rows if row["direction"] == "up"} == {"metric"}
    told = {event["site"]: event["value"] for event in folder.events() if event["name"] == "synthesis/kept"}
    assert told == {site: counts["kept"] for site, counts in found.items()}
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "sites").rglob("*.*"))]
    run(study, stages="synthesize")
    assert times == [path.stat().st_mtime_ns for path in sorted((tmp_path / "sites").rglob("*.*"))]


def test_pretraining_takes_its_share_at_each_site_and_in_the_central_arm(tmp_path: Path) -> None:
    study = small_study(tmp_path, *OWN)
    with pytest.raises(MedflError, match="Run the stage synthesize first"):
        open_site(study.source, 0).task  # noqa: B018
    run(study, stages="synthesize")
    enough(study)
    folder = run(study, stages="pretrain")
    assert (folder.path / "encoder.safetensors").exists()
    sites: list[Site] = [open_site(study.source, index) for index in range(3)]
    real = [len(site.images) for site in sites]
    assert [len(site.task.images) - len(site.images) for site in sites[:2]] == [round(0.25 * n) for n in real[:2]]
    assert len(sites[2].task.images) == real[2] + sum(round(0.25 * n) for n in real[:2])
    for site in sites:
        assert site.task.labels is not None
        assert site.task.patients is not None
        assert set(site.task.labels[len(site.images) :].tolist()) == {-1}
        added = site.task.patients[len(site.images) :]
        assert len(added.unique()) == len(added)
        assert not torch.isin(added, site.patients).any()


def test_a_queue_is_begun_with_synthetic_images_too(tmp_path: Path) -> None:
    study = small_study(tmp_path, *OWN, "method=dcl", "arms=[federated]")
    run(study, stages="synthesize")
    enough(study)
    assert (run(study, stages="pretrain").path / "encoder.safetensors").exists()


def test_a_damaged_or_short_set_is_refused_by_name(tmp_path: Path) -> None:
    study = small_study(tmp_path, *OWN)
    run(study, stages="synthesize")
    enough(study)
    with pytest.raises(MedflError, match=r"'site-1': training\.synthetic asks for 81 images, the curation kept 80"):
        site_synthesis.load(study.state_dir, "site-1", 81)
    path = site_synthesis.folder_of(study.state_dir, "site-1") / "images.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(MedflError, match=r"images\.safetensors is damaged"):
        site_synthesis.load(study.state_dir, "site-1", 10)


def test_sharing_is_a_decision_with_the_copy_test_in_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, target = tmp_path / "site-1", tmp_path / "given"
    digest = write_tensors(own / "images.safetensors", {"images": torch.zeros(3, 1, 4, 4)})
    record = {
        "site": "site-1", "counts": {"kept": 3, "copy: pixels": 1}, "sha256": digest, "exportable": False,
        "reasons": ["at least 12.0% of the candidates are copies."],
        "copies": {"share": 0.02, "share_low": 0.005, "share_high": 0.06},
    }  # fmt: skip
    (own / "curation.json").write_text(json.dumps(record))
    words = ["share", str(own), f"to={target}"]
    assert main([*words, "by=A. Reader"]) == 11
    assert "may not be shared: at least 12.0%" in capsys.readouterr().err
    (own / "curation.json").write_text(json.dumps(record | {"exportable": True, "reasons": []}))
    assert main(words) == 0
    assert "2.0% (0.5%–6.0%)" in capsys.readouterr().out
    assert not target.exists()
    assert main([*words, "by=A. Reader"]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["curation.json", "images.safetensors"]
    assert json.loads((target / "curation.json").read_text())["shared"]["by"] == "A. Reader"
    assert main([*words, "by=A. Reader"]) == 3  # never overwritten
