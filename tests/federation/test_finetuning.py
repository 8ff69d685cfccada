"""Fine-tuning: the same rounds with a head and labels, over whole federations with the real apps."""

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medfl import config
from medfl.checkpoint import newest
from medfl.data.fractions import rows_with_labels
from medfl.evaluation.counts import BINS, check
from medfl.finetuning import Task, derive
from medfl.run_folder import RunFolder
from medfl.site import open_site
from medfl.state import SiteState
from medfl.workshop import new_method, sites_of
from tests.federation.small import digest, run, small_study

pytestmark = pytest.mark.federation
SMALL = ("finetune.rounds=2", "finetune.steps=2", "finetune.batch_size=16")
STAGES = "pretrain,finetune,evaluate,transfer"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two sites, every protocol."""
    protocols = "[finetune,head,federated_finetune,federated_head,central_finetune]"
    words = (f"finetune.protocols={protocols}", "evaluation.fractions=[0.1,1.0]", "arms=[local,federated]")
    study = small_study(tmp_path_factory.mktemp("tuned"), *SMALL, *words)
    return run(study, stages=STAGES)


def wire(folder: RunFolder) -> list[dict[str, str]]:
    with (folder.path / "wire.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_with_one_site_federated_finetuning_is_local_bit_for_bit(tmp_path: Path) -> None:
    words = ("sites.count=1", "arms=[federated]", "training.optimizer_state=keep")
    folder = run(small_study(tmp_path, *SMALL, *words), stages=STAGES, nodes=2)
    one, all_sites = (folder.arm(name) for name in ("finetune:federated:site-1:1", "federated_finetune:federated:1"))
    assert digest(one / "model.safetensors") == digest(all_sites / "model.safetensors")
    assert digest(one / "encoder.safetensors") != digest(folder.path / "encoder.safetensors")
    scores = {row["protocol"]: row["value"] for row in folder.evaluations() if row["metric"] == "auc"}
    assert scores["finetune"] == scores["federated_finetune"]


def test_a_head_alone_leaves_the_encoder_as_it_was_and_never_sends_it(tuned: RunFolder) -> None:
    given = load_file(tuned.path / "encoder.safetensors")
    for name in ("federated_head:federated:1", "head:federated:site-1:1"):
        after = load_file(tuned.arm(name) / "encoder.safetensors")
        assert after.keys() == given.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in given.items())
        rows = [row for row in wire(tuned) if row["arm"] == name and row["role"] in ("parameter", "norm_moments")]
        assert any(row["name"].startswith("encoder.") for row in rows if row["direction"] == "down")
        assert {row["name"] for row in rows if row["direction"] == "up"} == {"head.weight", "head.bias"}


def test_every_protocol_is_scored_where_it_belongs(tuned: RunFolder) -> None:
    found = {
        (row["arm"], row["site"], row["protocol"], row["label_fraction"])
        for row in tuned.evaluations()
        if row["metric"] == "accuracy"
    }
    sites = ("site-1", "site-2")
    shared = {("federated", site) for site in sites}
    own = shared | {(f"local:{site}", site) for site in sites}
    for protocol in ("finetune", "head"):
        assert {(arm, site) for arm, site, kind, _ in found if kind == protocol} == own
    for protocol in ("federated_finetune", "federated_head", "central_finetune"):
        assert {(arm, site) for arm, site, kind, _ in found if kind == protocol} == shared
    for protocol, fractions in {"linear": {"0.1", "1"}, "knn": {"0.1", "1"}, "finetune": {"1"}}.items():
        assert {fraction for *_, kind, fraction in found if kind == protocol} == fractions
    everywhere = {(f"local:{one}", other) for one in sites for other in sites}
    assert everywhere <= {(arm, site) for arm, site, kind, _ in found if kind == "linear"}
    with (tuned.path / "transfer.csv").open(newline="") as lines:
        cells = {(row["kind"], row["trained_on"], row["tested_on"]) for row in csv.DictReader(lines)}
    for kind in ("representation", "end_to_end"):
        for origin in (*sites, "federated"):
            assert {(kind, origin, site) for site in sites} <= cells


def test_counts_leave_as_sums_over_enough_patients_and_nothing_else_of_a_prediction(tuned: RunFolder) -> None:
    lines = [json.loads(line) for line in (tuned.path / "counts.jsonl").read_text().splitlines()]
    found = {(line["arm"], line["site"], line["protocol"]) for line in lines}
    assert {("federated", site, kind) for site in ("site-1", "site-2") for kind in ("linear", "finetune")} <= found
    for line in lines:
        histogram, confusion = np.array(line["histogram"]), np.array(line["confusion"])
        check(histogram.astype(float), confusion.astype(float), least=line["least"])
        tested = next(
            float(row["value"])
            for row in tuned.evaluations()
            if (row["arm"], row["site"], row["metric"]) == (line["arm"], line["site"], "n_test")
        )
        assert histogram[1].sum() in (0, tested)
    probes = [row for row in wire(tuned) if row["stage"] == "probe" and row["direction"] == "up"]
    assert {row["role"] for row in probes} == {"metric", "statistics"}
    shapes = {row["shape"] for row in probes if row["role"] == "statistics"}
    assert shapes == {f"2x2x{BINS}", "2x2"}


def test_finished_finetunings_and_scores_are_not_repeated(tuned: RunFolder) -> None:
    model = tuned.arm("federated_finetune:federated:1") / "model.safetensors"
    before = (model.stat().st_mtime_ns, len(tuned.evaluations()), len(wire(tuned)))
    run(config.parse(tuned.config()), stages=STAGES)
    crossed = [row for row in wire(tuned)[before[2] :] if row["stage"] != "enrol" and row["role"] != "order"]
    assert (model.stat().st_mtime_ns, len(tuned.evaluations())) == before[:2]
    assert not crossed


def test_labels_are_given_by_patient_and_a_smaller_share_is_part_of_a_larger(tuned: RunFolder) -> None:
    study = config.parse(tuned.config())
    split = sites_of(study)[0].train
    shares = [set(rows_with_labels(split, f, least=2, key=7).tolist()) for f in (0.01, 0.1, 0.4, 1.0)]
    assert len(shares[0]) < len(shares[-1])
    assert all(few <= more for few, more in pairwise(shares))
    assert shares[-1] == set(torch.nonzero(split.labels >= 0)[:, 0].tolist())
    for share in shares:
        patients = {split.patients[row] for row in share}
        assert share == {row for row, patient in enumerate(split.patients) if patient in patients}
        assert {int(split.labels[row]) for row in share} == {0, 1}
    task = Task(("smooth", "textured"), 0)
    few = derive(study, task, protocol="finetune", fraction=0.1)
    other = derive(study, task, protocol="federated_head", fraction=0.1)
    taught = [open_site(each.source, 0).task for each in (few, other)]
    assert len(taught[0].images) == len(taught[1].images) < len(split)
    assert torch.equal(taught[0].images, taught[1].images)


@pytest.mark.parametrize("words", [(), ("privacy=patient", "privacy.delta=1e-3")])
def test_one_place_with_all_data_reads_the_labels_that_the_sites_read(tmp_path: Path, words: tuple[str, ...]) -> None:
    study = small_study(tmp_path, *SMALL, *words)
    few = derive(study, Task(("smooth", "textured"), 0), protocol="central_finetune", fraction=0.1)
    east, west, central = (open_site(few.source, place).task for place in range(3))
    assert min(len(east.images), len(west.images)) > 0
    assert torch.equal(central.images, torch.cat([east.images, west.images]))
    assert torch.equal(central.labels, torch.cat([east.labels, west.labels]))


def test_norms_that_stay_at_a_site_are_those_of_the_encoder_it_had(tmp_path: Path) -> None:
    words = ("rounds.norm=local", "arms=[federated]", "finetune.protocols=[head]", "stages=[pretrain]")
    folder = run(small_study(tmp_path, *SMALL, *words), stages="pretrain,finetune")
    kept = {}
    for arm in ("federated", "head:federated:site-1:1"):
        saved, _ = newest(folder.arm(arm) / "checkpoints")
        assert saved is not None
        kept[arm] = SiteState(tmp_path / "sites", str(saved.facts["lineage"]), "site-1").before(100)
    before, after = kept.values()
    norms = [name for name in before if name.startswith("encoder.") and name.endswith("running_mean")]
    assert norms
    assert all(torch.equal(before[name], after[name]) for name in norms)
    initial = new_method(config.parse(folder.config())).state_dict()
    assert not any(torch.equal(before[name], initial[name]) for name in norms)
