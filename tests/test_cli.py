"""The command line as its users meet it: one line, the right exit code, nothing lost."""

import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console, RenderableType

from medfl.cli.main import main
from medfl.cli.progress import sites_table, summary
from medfl.run_folder import RunFolder
from tests.federation.small import SMALL, digest
from tests.run_folder import dice, write_run, write_volumes


def folder_of_images(root: Path, *, sites: int = 2, each: int = 26, mode: str = "L") -> list[str]:
    """Patients of two classes at natural sites, and the overrides that read them."""
    root.mkdir(parents=True, exist_ok=True)
    rows = ["file,finding,who,where"]
    draw = np.random.default_rng(0)
    for site in range(sites):
        for patient in range(each):
            name = f"s{site}p{patient}.png"
            pixels = draw.integers(0, 120, (20, 24, 3)[: 3 if mode == "RGB" else 2]).astype("uint8")
            pixels[5:12, 5:12] += np.uint8(100 * (patient % 2))
            Image.fromarray(pixels).save(root / name)
            rows.append(f"{name},{patient % 2},s{site}p{patient},site{site}")
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    columns = [
        "data.datalist=list.csv",
        "data.image=file",
        "data.label=finding",
        "data.patient=who",
        "data.site=where",
    ]
    return ["data=folder", f"data.root={root}", *columns, "data.size=16", "sites=natural"]


def small_overrides(root: Path, *extra: str) -> list[str]:
    own = [word for word in SMALL if not word.startswith(("data.", "sites"))]
    return [*own, *folder_of_images(root / "images"), f"run.dir={root / 'run'}", "stages=[pretrain]", *extra]


@pytest.mark.parametrize(
    ("spoil", "code", "finding"),
    [
        (lambda root: ["data.root=/nowhere/at/all"], 10, "/nowhere/at/all"),
        (lambda root: ["data.datalist=other.csv"], 10, "other.csv"),
        (lambda root: ["data.label=findings"], 10, "finding"),
        (lambda root: (root / "images/s0p3.png").write_bytes(b"\x89PNG broken") and [], 10, "s0p3.png"),
        (lambda root: folder_of_images(root / "images", mode="RGB")[:1], 10, "channel"),
        (lambda root: ["training.stps=3"], 3, "training.steps"),
        (lambda root: ["sites.min_images=500"], 10, "site"),
        (lambda root: ["training.device=cuda"], 30, "shows no CUDA device"),
    ],
    ids=["folder", "datalist", "column", "unreadable", "channels", "override", "few images", "device"],
)
def test_bad_input_is_one_line_and_an_exit_code(
    spoil: object, code: int, finding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if finding.startswith("shows") and __import__("torch").cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    words = small_overrides(tmp_path)
    got = main(["simulate", *words, *spoil(tmp_path)])  # type: ignore[operator]
    err = capsys.readouterr().err
    assert got == code, err
    assert finding in err
    assert "Traceback" not in err


def test_usage_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([]) == 2
    assert main(["simulat"]) == 2
    assert "unknown command 'simulat'" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 3
    assert "is no run folder" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "medfl simulate" in capsys.readouterr().out


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_afterwards(tmp_path: Path) -> None:
    images = tmp_path / "images"
    folder_of_images(images)
    done, full = tmp_path / "done", tmp_path / "full"

    def simulate(target: Path, *extra: str, limit: int = 0) -> subprocess.CompletedProcess[str]:
        words = small_overrides(tmp_path, f"run.dir={target}", "arms=[federated]", *extra)
        return subprocess.run(
            [sys.executable, "-m", "medfl.cli.main", "simulate", *words],
            capture_output=True,
            text=True,
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
        )

    assert simulate(done).returncode == 0
    stopped = simulate(full, limit=(done / "checkpoints/round-0001/state.safetensors").stat().st_size - 1)
    assert stopped.returncode == 30, stopped.stderr
    assert "resume=true" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not list(full.glob("**/state.safetensors"))  # no half file under a final name
    resumed = simulate(full, "resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert digest(full / "encoder.safetensors") == digest(done / "encoder.safetensors")


def test_the_whole_way_from_folder_to_exported_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = small_overrides(tmp_path, "stages=[pretrain,evaluate,transfer,report]", "rounds.count=1")
    assert main(["simulate", *words]) == 0
    shown = capsys.readouterr().out
    assert "linear-probe AUC" in shown
    assert "site0" in shown
    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "evaluation.csv", "transfer.csv", "wire.csv", "report.html"):
        assert (run / name).stat().st_size > 0, name
    before = digest(run / "evaluation.csv")
    run = run.rename(tmp_path / "moved")
    for command in ("evaluate", "transfer", "report"):  # on a finished run, wherever it lies: nothing is done twice
        assert main([command, str(run)]) == 0
    assert digest(run / "evaluation.csv") == before
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    assert main(["export", str(run), f"to={tmp_path / 'out'}"]) == 0
    assert "[1, 16, 16] image" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert facts["provenance"]["arm"] == "federated"
    assert {role["role"] for role in facts["roles"]} <= {"parameter", "norm_moments", "fixed"}
    broken = tmp_path / "out" / "encoder.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4] + b"\0\1\0\1")
    from medfl.errors import DataError
    from medfl.export import load_encoder

    with pytest.raises(DataError, match="does not match the SHA-256"):
        load_encoder(tmp_path / "out")


def shown(table: RenderableType) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def test_the_summary_shows_dice_where_there_is_no_auc(tmp_path: Path) -> None:
    assert "linear-probe AUC" in shown(summary(RunFolder(write_run(tmp_path / "classes"))))
    folder = write_volumes(tmp_path / "volumes", pictures={"site-1/federated/fusion.png": b""})
    text = shown(summary(RunFolder(folder)))
    assert "Dice of the whole tumour (95 % interval)" in text
    values = [dice("federated", site, "dice_wt") for site in ("site-1", "site-2", "site-4")]
    assert f"{sum(values) / 3:.3f}" in text
    assert f"{values[0]:.3f} ({values[0] - 0.04:.2f}–{values[0] + 0.03:.2f})" in text
    assert "sites/pictures" in text


def test_the_table_of_sites_shows_modalities_and_masks(tmp_path: Path) -> None:
    study = SimpleNamespace(run_dir="runs/x")
    facts = json.loads((write_volumes(tmp_path / "volumes") / "sites.json").read_text())
    text = shown(sites_table(study, facts))  # type: ignore[arg-type]
    assert "modalities in training" in text
    assert "flair 20, t2 20" in text
    assert "classes in training" not in text
    facts = json.loads((write_run(tmp_path / "classes") / "sites.json").read_text())
    text = shown(sites_table(study, facts))  # type: ignore[arg-type]
    assert "normal 300, lesion 120" in text
    assert "modalities" not in text
