"""What leaves a run folder for other programs: the same features, no code, and a card of what the folder holds."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medfl import config
from medfl.cli.exports import export
from medfl.errors import ConfigError, DataError
from medfl.export import load_encoder, read_facts, write_encoder
from medfl.exports import bundle, card, folder, onnx
from medfl.exports.verify import FILES, verify
from medfl.files import sha256
from medfl.run_folder import RunFolder
from medfl.server_state import Blueprint, Server
from tests.run_folder import EVALUATION, ROUNDS, SITES, write_run, write_table

TINY = ("encoder=tiny", "encoder.base_width=4", "data.size=16", "method=simclr", "training.threads=1")
NSLF = ("method=nslf", "data=brain", "data.size=16", "data.modalities=[flair,t1]", "data.channels=2")
NSLF += ("method.base_width=2", "method.levels=1")
BOTH = ("safetensors", "bundle")


def run_of(place: Path, *overrides: str, arm: str = "federated") -> RunFolder:
    """A made-up run folder with a real, untrained encoder that has seen some images."""
    write_run(place)
    study = config.compose([*TINY, *overrides])
    server = replace(Server.start(study, arm, Blueprint.of(study), None), round=ROUNDS)
    write_encoder(RunFolder(place).arm(arm), study, server)
    return RunFolder(place)


def apart(run: RunFolder, target: Path, formats: tuple[str, ...], arm: str = "federated") -> Mapping[str, float]:
    folder.write(run, arm, target, formats)
    return folder.check(run, arm, target, formats)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_of(tmp_path_factory.mktemp("runs") / "study")


@pytest.fixture(scope="module")
def exported(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exports") / "all"
    folder.write(run, "federated", target, tuple(FILES))
    return target


def test_every_format_gives_the_features_of_the_run(run: RunFolder, exported: Path) -> None:
    found = folder.check(run, "federated", exported, tuple(FILES))
    assert found["safetensors"] == found["bundle"] == 0
    assert found["onnx"] < 1e-5
    larger = torch.rand(2, 1, 24, 17)
    torch.testing.assert_close(onnx.load(exported / onnx.FILE)(larger), load_encoder(run.path)(larger).detach())


def test_onnx_of_volumes(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", "data.spatial_dims=3", "encoder.norm=group", "encoder.se_ratio=null")
    assert apart(run, tmp_path / "out", ("onnx",))["onnx"] < 1e-5
    assert not (tmp_path / "out" / bundle.FOLDER).exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.spatial_dims=3", "encoder.norm=instance", "encoder.stem=medmnist"),
        ("encoder=resnet50", "encoder.base_width=4", "encoder.norm=group", "encoder.stem=imagenet"),
        NSLF,
    ],
    ids=["3D, instance norm", "bottlenecks", "modalities"],
)
def test_every_encoder_has_a_bundle(overrides: tuple[str, ...], tmp_path: Path) -> None:
    assert apart(run_of(tmp_path / "run", *overrides), tmp_path / "out", BOTH) == dict.fromkeys(BOTH, 0.0)


def test_an_encoder_without_an_onnx_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", *NSLF)
    with pytest.raises(ConfigError, match=r"MultimodalNet cannot be written as ONNX.*formats=\[safetensors,bundle\]"):
        folder.write(run, "federated", tmp_path / "out", tuple(FILES))
    assert not (tmp_path / "out").exists()


def test_the_bundle_holds_no_code(exported: Path) -> None:
    root = exported / bundle.FOLDER
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    kept = ["LICENSE", "configs/inference.json", "configs/metadata.json", "docs/README.md", "models/model.safetensors"]
    assert files == kept
    for name in ("inference", "metadata"):
        tree = json.loads((root / "configs" / f"{name}.json").read_text())
        texts = re.findall(r'"([^"]*)"', json.dumps(tree))
        assert not [text for text in texts if text.startswith("$")]
        targets = [value for node in _nodes(tree) if (value := node.get("_target_"))]
        assert {target for target in targets if not target.startswith("medfl.")} <= {"SimpleInferer"}


def _nodes(tree: Any) -> list[dict[str, Any]]:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [*([tree] if isinstance(tree, dict) else []), *(node for part in inner for node in _nodes(part))]


def test_monai_takes_the_bundle_and_runs_it_on_files(run: RunFolder, exported: Path, tmp_path: Path) -> None:
    from monai.bundle.workflows import ConfigWorkflow

    pixels = np.random.default_rng(0).integers(0, 255, (3, 20, 30)).astype("uint8")
    for place, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{place}.png")
    (tmp_path / "datalist.csv").write_text("image\n0.png\n1.png\n2.png\n")
    root, output = exported / bundle.FOLDER, tmp_path / "features.csv"
    places = {"bundle_root": str(root), "dataset_dir": str(tmp_path), "output": str(output)}
    work = ConfigWorkflow(str(root / bundle.INFERENCE), str(root / bundle.META), None, workflow_type="infer", **places)
    work.initialize()
    assert work.check_properties() == []
    work.run()
    header, *rows = output.read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["0.png", "1.png", "2.png"]
    images = work.dataset.load().images
    expected = load_encoder(run.path)(images).detach()
    got = torch.tensor([[float(cell) for cell in row.split(",")[1:]] for row in rows])
    assert len(header.split(",")) == expected.shape[1] + 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert set(work.parser["_meta_"]) >= {  # required by MONAI's schema of 2024-07-25
        "schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task",
        "description", "authors", "copyright", "network_data_format",
    }  # fmt: skip


def test_other_weights_are_found_out(run: RunFolder, exported: Path, tmp_path: Path) -> None:
    import onnx as model_files
    from onnx import numpy_helper

    target = tmp_path / "out"
    folder.write(run, "federated", target, BOTH)
    reference, facts = load_encoder(run.path), read_facts(run.path)
    model = target / bundle.FOLDER / bundle.MODEL
    tensors = load_file(model)
    tensors["layer4.0.path.0.weight"] = tensors["layer4.0.path.0.weight"] * 1.01
    save_file(tensors, model)
    with pytest.raises(DataError, match="does not match the SHA-256"):
        verify(target, BOTH, reference, facts)
    settings = target / bundle.FOLDER / bundle.INFERENCE
    settings.write_text(settings.read_text().replace(facts["sha256"], sha256(model)))
    with pytest.raises(DataError, match=r"bundle in .* differ by .* delete"):
        verify(target, BOTH, reference, facts)
    graph = model_files.load(exported / onnx.FILE)
    largest = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(largest) * 1.01, largest.name))
    model_files.save(graph, target / onnx.FILE)
    with pytest.raises(DataError, match=r"onnx in .* differ by"):
        verify(target, ("onnx",), reference, facts)


def test_the_card_says_what_the_folder_holds_and_names_no_site(run: RunFolder, exported: Path) -> None:
    text = (exported / folder.CARD).read_text()
    rows = [row for row in run.evaluations() if row["arm"] == "federated" and row["value"]]
    for protocol, metric, title in (("linear", "auc", "Linear probe: AUC"), ("knn", "auc", "kNN: AUC")):
        values = [float(row["value"]) for row in rows if (row["protocol"], row["metric"]) == (protocol, metric)]
        assert f"| {title} | {fmean(values):.3f} (95 % " in text
        assert f"| {len(values)} | {min(values):.3f} to {max(values):.3f} |" in text
    with (run.path / "wire.csv").open() as file:
        sent = [line.split(",") for line in file if ",up," in line and ",parameter," in line and ",federated," in line]
    assert f"| parameter | weights | {sum(int(line[7]) for line in sent) / 1e6:.1f} MB |" in text
    assert "4, with 420, 350, 260, 130 training images" in text
    assert f"- Rounds: {ROUNDS}, each 40 steps of 64 images per site" in text
    assert sha256(exported / "encoder.safetensors") in text
    assert "torch 2.13.0" in text
    every = "".join(path.read_text() for path in exported.rglob("*") if path.suffix in (".md", ".json"))
    assert not [name for name in (*SITES, str(exported), str(run.path)) if name in every]


def test_a_fine_tuned_encoder_has_its_own_scores(tmp_path: Path) -> None:
    arm = "finetune:local:site-1:site-1:0.1"
    run = run_of(tmp_path / "run", arm=arm)
    values = {("site-1", "0.1"): "0.71", ("site-1", "1"): "0.82", ("site-2", "0.1"): "0.93"}
    rows = [("local:site-1", site, "classification", "finetune", share, "auc", value, "", "")
            for (site, share), value in values.items()]  # fmt: skip
    write_table(run.path / "evaluation.csv", EVALUATION, rows)
    assert apart(run, tmp_path / "out", ("safetensors",), arm) == {"safetensors": 0}
    text = (tmp_path / "out" / folder.CARD).read_text()
    assert "| Fine-tuned at each site: AUC | 0.710 | 1 | 0.710 to 0.710 | – |" in text
    assert "0.82" not in text
    assert "- Share of the labels: 0.1" in text
    assert "arm finetune:local:0.1" in text
    assert "Nothing had to leave a site" in text


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("federated", ("federated", "", "", 1.0)),
        ("local:a:b", ("local:a:b", "", "a:b", 1.0)),
        ("federated_finetune:random:1", ("random", "federated_finetune", "", 1.0)),
        ("finetune:federated:site-1:0.05", ("federated", "finetune", "site-1", 0.05)),
        ("head:local:site-1:site-1:0.1", ("local:site-1", "head", "site-1", 0.1)),
    ],
)
def test_the_name_of_an_arm_taken_apart(name: str, parts: tuple[str, str, str, float]) -> None:
    arm = card.Arm.of(name)
    assert (arm.encoder, arm.protocol, arm.site, arm.fraction) == parts


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["to={out}", "arm=central"], "arm=central: .* has no finished encoder of it, but of federated"),
        (
            ["to={out}", "formats=[bundle,torchscript]"],
            "formats: got 'torchscript', need one of safetensors, bundle, onnx",
        ),
        (["to={out}", "--verfy"], "usage: medfl export RUN to=FOLDER"),
        ([], "usage: medfl export RUN to=FOLDER"),
        (["to={done}"], "holds encoder.safetensors already"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    words: list[str], finding: str, run: RunFolder, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=finding) as caught:
        export([str(run.path), *(word.format(out=tmp_path / "out", done=exported) for word in words)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_verifies_and_says_so(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export([str(run.path), f"to={tmp_path / 'out'}", "--verify"])
    shown = capsys.readouterr().out
    assert "encoder.safetensors, bundle, model_card.md" in shown
    assert "[1, 16, 16] image → 32 features" in shown
    assert "safetensors 0.0e+00, bundle 0.0e+00" in shown
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx needs onnx and onnxscript\. Run pip install 'medfl\[export\]'"):
        export([str(run.path), f"to={tmp_path / 'other'}", "formats=onnx"])
