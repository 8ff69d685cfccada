"""DCL-CsTP against its baselines, and its ablations: linear probe and fine-tuning of federated encoders.

    python benchmarks/contrast_table.py --data DIR [--seeds 0 1 2] [--sets pneumonia chest-xray] [--runs runs/contrast]
        [--jobs 2] [--json FILE]

Every encoder is pretrained by one `medfl simulate` (PneumoniaMNIST: preset `hospital`; the chest X-rays: their natural
sites) from the same weights, with equal numbers of images, steps and rounds and the same views (`views=eight`), and
evaluated at each site on the site's own data and labels:

- linear: the product's own probe on frozen features, C chosen on the validation split;
- fine-tuned: encoder and a linear head, 100 steps of AdamW on class-balanced batches of one view each, the last
  weights; the loop of label_efficiency.py, tuned for no method. From the untrained encoder it is supervised training.

Accuracy, recall and precision (both macro) and AUC in percent: mean over the sites with both classes in the test
split, ± standard deviation over seeds; differences of AUC to `dcl` are paired by seed, with 95 % t intervals. The
ablations are those of the paper's Table 3 (stream left out, head replaced) and the KL term.

DIR holds medmnist_rebuilt/ and covid_cxr/. --jobs seeds and sets at a time, one thread each. Finished pretrainings and
evaluations are not repeated. What stands after the options is added to every command.
"""

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from harness import machine, write
from label_efficiency import TUNING, fine_tuned, outputs
from numpy.typing import NDArray
from studies import difference, options, simulate, spread, words_of

from medfl import config
from medfl.data.sample import SiteData, Split
from medfl.evaluation.metrics import METRICS, point
from medfl.evaluation.probe import Features, linear_probe
from medfl.export import load_encoder
from medfl.files import write_bytes
from medfl.run_folder import RunFolder
from medfl.study import Study
from medfl.workshop import sites_of

BUDGET = (
    "encoder=tiny", "views=eight", "rounds.count=5", "rounds.on_collapse=warn", "training.steps=30",
    "training.batch_size=64", "training.threads=1", "stages=[pretrain]",
)  # fmt: skip
RANDOM, OURS = "random", "dcl"
METHODS: Mapping[str, tuple[str, ...]] = {
    OURS: ("method=dcl", "arms=[random,federated]"),
    "moco": ("method=moco", "arms=[federated]"),
    "simsiam": ("method=simsiam", "arms=[federated]"),
    "simclr": ("method=simclr", "arms=[federated]"),
    "dcl, no global stream": ("method=dcl", "method.use_global=false", "arms=[federated]"),
    "dcl, no local stream": ("method=dcl", "method.use_local=false", "arms=[federated]"),
    "dcl, no KL": ("method=dcl", "method.use_kl=false", "arms=[federated]"),
    "dcl, MLP head": ("method=dcl", "method.head=mlp", "arms=[federated]"),
    "dcl, plain attention": ("method=dcl", "method.head=self_attention", "arms=[federated]"),
}
SHOWN = ("accuracy", "balanced_accuracy", "precision", "auc")
COLUMNS = [f"{kind} {name}" for kind in ("linear", "tuned") for name in SHOWN]
HEADS = [f"{kind} {name}" for kind in ("LP", "FT") for name in ("accuracy", "recall", "precision", "AUC")]

Scores = dict[str, dict[str, float | None]]  # site -> column -> value, None where undefined
Place = tuple[str, int]  # set, seed


def main() -> None:
    given = options(__doc__ or "", sets=["pneumonia", "chest-xray"], runs="runs/contrast").parse_intermixed_args()
    places = list(itertools.product(given.sets, given.seeds))
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = dict(zip(places, pool.map(measured, itertools.repeat(given), places), strict=True))
    found = {name: [rows[name, seed] for seed in given.seeds] for name in given.sets}
    for name in given.sets:
        print(f"\n{name}")
        table(found[name])
    if given.json:
        what = {"budget": [*BUDGET, *given.overrides], "tuning": TUNING, "seeds": given.seeds}
        write(given.json, {"machine": machine(), "what": what, "sets": found})


def measured(given: argparse.Namespace, place: Place) -> dict[str, Scores]:
    """All methods' figures, on one set and seed."""
    (name, seed), found = place, {}
    torch.set_num_threads(1)
    for method, words in METHODS.items():
        folder = given.runs / f"{name}-{seed}-{method.replace(', ', '-').replace(' ', '-')}"
        command = [*words_of(name, given.data), *BUDGET, *words, f"seed={seed}", *given.overrides]
        simulate(folder, command, finished=(folder / "model.safetensors").exists())
        found[method] = scores(folder, config.compose([*command, "views=light"]))
        if method == OURS:
            found[RANDOM] = scores(RunFolder(folder).arm(RANDOM), config.compose([*command, "views=light"]))
    return found


def scores(folder: Path, study: Study) -> Scores:
    """All figures of one encoder at all sites; kept in its folder for as long as encoder and settings are the same."""
    encoder, digest = load_encoder(folder), json.loads((folder / "encoder.json").read_text())["sha256"]
    what = {"encoder": digest, "columns": COLUMNS, "tuning": TUNING, "study": study.source}
    file = folder / "contrast_table.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("what") != what:
        kept = {"what": what, "scores": {site.name: at_site(encoder, site, study) for site in sites_of(study)}}
        write_bytes(file, json.dumps(kept, indent=1).encode())
    found: Scores = kept["scores"]
    return found


def at_site(encoder: torch.nn.Module, site: SiteData, study: Study) -> dict[str, float | None]:
    """Every column at one site; none of them where a split is missing a class."""

    def features(split: Split) -> Features:
        return Features(outputs(encoder, split.images), split.labels, split.patients)

    known, classes = site.test.labels >= 0, len(site.classes)
    rows = torch.nonzero(site.train.labels >= 0).flatten()
    if len(site.train.labels[rows].unique()) < classes or len(site.test.labels[known].unique()) < classes:
        return dict.fromkeys(COLUMNS)
    parts = (features(split) for split in (site.train, site.val, site.test))
    probed = linear_probe(*parts, classes=classes, grid=study.evaluation.regularization, seed=study.seed)
    tuned = outputs(fine_tuned(encoder, site, rows, study), site.test.images[known]).double().softmax(dim=1)
    both: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]] = {
        "linear": (probed.probabilities, probed.labels),
        "tuned": (tuned.numpy().astype(np.float64), site.test.labels[known].numpy()),
    }
    return {f"{kind} {name}": point(METRICS[name], *both[kind]) for kind in both for name in SHOWN}


def over_sites(row: Mapping[str, Scores], column: str) -> dict[str, float]:
    """Mean in percent over the sites where every method has every value, by method."""
    sites = [site for site in row[OURS] if all(None not in found[site].values() for found in row.values())]
    return {method: 100 * mean(float(found[site][column] or 0.0) for site in sites) for method, found in row.items()}


def table(rows: Sequence[Mapping[str, Scores]]) -> None:
    """The figures of every method over seeds, and what its AUC is above that of `dcl`."""
    means = {column: [over_sites(row, column) for row in rows] for column in COLUMNS}
    heads = ["method", *HEADS, "LP AUC - dcl", "FT AUC - dcl"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for method in rows[0]:
        cells = [spread([m[method] for m in means[column]], digits=1) for column in COLUMNS]
        for column in ("linear auc", "tuned auc"):
            pairs = [m[method] - m[OURS] for m in means[column]]
            cells.append("0" if method == OURS else difference(pairs, digits=1))
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
