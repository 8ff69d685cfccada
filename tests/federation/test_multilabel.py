"""Several findings in one image, over whole federations with the real apps: from a data list to the report."""

import csv
import re
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image

from medfl import config
from medfl.enrolment import Enrolled
from medfl.errors import ConfigError
from medfl.finetuning import Task, derive
from medfl.run_folder import RunFolder
from medfl.site import open_site
from medfl.study import Study
from tests.federation.small import SMALL, run
from tests.test_multilabel import films

pytestmark = pytest.mark.federation
FINDINGS = ("Mass", "Pleural Effusion", "Enlarged Cardiomediastinum (mild)")  # the last as long as a name may be
NAMES = ("mass", "pleural_effusion", "enlarged_cardiomediastinum__mild_")
SITES = ("site-1", "site-2")
DATA = ("data=folder", f"data.labels={list(FINDINGS)}", "data.patient=who", "data.size=16", "task=multilabel")


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 films of 80 patients; every seventh cell is empty, and nothing is known of every twentieth film."""
    root = tmp_path_factory.mktemp("chest")
    images, findings = films(160, 0)
    with (root / "datalist.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", *FINDINGS, "who"])
        for n, (image, row) in enumerate(zip(images, findings.tolist(), strict=True)):
            Image.fromarray((110 + 60 * image[0]).clamp(0, 255).byte().numpy()).save(root / f"{n}.png")
            cells = ["" if n % 20 == 0 or (3 * n + k) % 7 == 0 else cell for k, cell in enumerate(row)]
            rows.writerow([f"{n}.png", *cells, f"p{n // 2}"])
    return root


def study(chest: Path, folder: Path, *words: str) -> Study:
    small = [word for word in SMALL if not word.startswith("data.")]
    return config.compose([*small, *DATA, f"data.root={chest}", f"run.dir={folder}", *words])


@pytest.fixture(scope="module")
def studied(chest: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    words = ("rounds.count=1", "arms=[local,federated]", "evaluation.fractions=[0.3,1.0]", "evaluation.pictures=none",
             "finetune.protocols=[finetune,federated_finetune]", "finetune.rounds=2", "finetune.steps=8",
             "finetune.optimizer.lr=0.02")  # fmt: skip
    whole = study(chest, tmp_path_factory.mktemp("findings"), *words)
    return run(whole, stages="pretrain,finetune,evaluate,transfer,report")


def test_every_finding_is_scored_and_their_mean_leads(studied: RunFolder) -> None:
    keys = ("arm", "site", "protocol", "label_fraction", "metric")
    found = {tuple(row[key] for key in keys): float(row["value"]) for row in studied.evaluations()}
    shared = [("federated", site) for site in SITES]
    owns = [*shared, *((f"local:{site}", site) for site in SITES)]
    for protocol, cells in {"linear": owns, "knn": owns, "finetune": owns, "federated_finetune": shared}.items():
        for cell in cells:
            for metric in ("auc", "pr_auc"):
                each = [found[*cell, protocol, "1", f"{metric}_{name}"] for name in NAMES]
                assert found[*cell, protocol, "1", metric] == pytest.approx(fmean(each), abs=1e-5)
    assert {key[-1] for key in found if key[2:4] == ("linear", "0.3")} == {"auc", "pr_auc", "n_test"}
    learned = [found["federated", site, "finetune", "1", f"auc_{name}"] for site in SITES for name in NAMES]
    assert min(learned) > 0.8


def test_findings_transfer_and_are_reported(studied: RunFolder) -> None:
    with (studied.path / "transfer.csv").open(newline="") as lines:
        cells = {(row["kind"], row["trained_on"], row["tested_on"], row["metric"]) for row in csv.DictReader(lines)}
    for kind in ("representation", "end_to_end"):
        assert {(kind, origin, site, "auc") for origin in (*SITES, "federated") for site in SITES} <= cells
    assert {metric for *_, metric in cells} == {"auc"}
    page = re.sub(r"<[^>]+>", " ", (studied.path / "report.html").read_text())
    assert "mean linear-probe AUC of" in page
    assert "linear-probe AUC of pleural effusion" in page
    assert "scores are means over the findings" in page
    assert "Label efficiency" in page
    assert "counts.jsonl" not in page


def test_a_site_enrols_with_the_names_of_its_findings_and_no_counts_leave_it(studied: RunFolder) -> None:
    with (studied.path / "wire.csv").open(newline="") as lines:
        up = [row for row in csv.DictReader(lines) if row["direction"] == "up"]
    assert {row["site"] for row in up if (row["stage"], row["name"]) == ("enrol", "findings")} >= set(SITES)
    assert {row["role"] for row in up if row["stage"] == "probe"} == {"metric"}
    assert not (studied.path / "counts.jsonl").exists()


def test_sites_and_tasks_that_do_not_fit_are_refused(chest: Path, tmp_path: Path) -> None:
    one, other, classes = (
        Enrolled(n, f"site-{n}", 10, held_out=False, classes=names, findings=findings)
        for n, (names, findings) in enumerate([((), ("Mass", "Edema")), ((), ("Edema", "Mass")), (("no", "yes"), ())])
    )
    task = Task.of([one, one])
    assert task == Task((), 0, ("Mass", "Edema"))
    with pytest.raises(ConfigError, match="'site-0' has the findings Mass, Edema, site 'site-1' the findings Edema, M"):
        Task.of([one, other])
    with pytest.raises(ConfigError, match="'site-0' has the findings Mass, Edema, site 'site-2' the classes no, yes; "):
        Task.of([one, classes])
    with pytest.raises(ConfigError, match=r"sites have findings \(data\.labels\), and .* Take task=multilabel"):
        derive(study(chest, tmp_path, "task=classification"), task, protocol="finetune", fraction=1.0)
    supervised = study(chest, tmp_path, "method=medcss_supervised")
    with pytest.raises(ConfigError, match=r"MedCSS learns one class for each image.* Take task=multilabel, or data\."):
        open_site(supervised.source, 0).task  # noqa: B018
    phantom = config.compose([*SMALL, f"run.dir={tmp_path}", "task=multilabel"])
    with pytest.raises(ConfigError, match=r"MultiLabel learns findings, and there are none\. Name their columns in d"):
        open_site(derive(phantom, task, protocol="finetune", fraction=1.0).source, 0).task  # noqa: B018


def test_a_share_of_the_labels_is_of_patients_with_all_that_is_known_of_them(chest: Path, tmp_path: Path) -> None:
    asked = study(chest, tmp_path)
    shares = [derive(asked, Task((), 0, FINDINGS), protocol="head", fraction=share) for share in (0.3, 1.0)]
    few, every = (open_site(each.source, 0).task for each in shares)
    assert few.labels is not None
    assert 0 < len(few.labels) == len(few.images) < len(every.images)
    assert few.labels.shape[1] == len(FINDINGS)
    assert bool((few.labels >= 0).any(1).all())  # where nothing is known, nothing can be learned
