"""Few labels: AUC of DiSSECT, BYOL, SimCLR and the untrained encoder at 1, 5, 10 and 100 % of each site's labels.

    python benchmarks/label_efficiency.py --data DIR [--seeds 0 1 2] [--sets breast pneumonia] [--runs runs/labels]
        [--jobs 2] [--json FILE]

Each encoder is pretrained by one `medfl simulate` (the preset `hospital`; the same weights to start from, equal numbers
of samples), exported, and evaluated at each site on the site's own data:

- LP, linear probe: the product's own, on frozen features, its C chosen on the site's whole validation split, the labels
  of which are not limited.
- FT, fine-tuning: encoder and a linear head, a fixed number of steps of AdamW on class-balanced batches of one view
  each, the last weights. A loop of this file alone, the same for all encoders and tuned for none; from the untrained
  encoder it is supervised training from scratch.

The labels given are those of a share of the patients of each class in the site's training split, at least 2 patients
(so at least 2 images) of each class; the same for every method, those of a smaller share being among those of a larger
one. Sites share no labels. Figures are test AUC, mean over the sites with both classes in the test split, ± standard
deviation over seeds; differences are paired by seed, with 95 % t intervals over the seeds, bold where 0 is outside.

DIR holds medmnist/ and medmnist_rebuilt/. Sets and seeds are run --jobs at a time, with one thread each. A finished
pretraining or evaluation is not repeated, an interrupted pretraining goes on. What stands after the options is added to
every command, as `rounds.count=8`.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from harness import machine, write
from studies import difference, options, simulate, spread
from studies import words_of as words_of_set
from torch import Tensor, nn
from torch.nn import functional as F

from medfl import config, seeding
from medfl.data.fractions import rows_with_labels
from medfl.data.sample import SiteData, Split
from medfl.evaluation.metrics import auc, point
from medfl.evaluation.probe import Features, linear_probe
from medfl.export import load_encoder
from medfl.files import write_bytes
from medfl.methods.base import balanced_probabilities
from medfl.optimizers import adamw, learning_rate
from medfl.run_folder import RunFolder
from medfl.study import Study
from medfl.workshop import sites_of

BUDGET = (
    "encoder=tiny", "rounds.count=5", "rounds.on_collapse=warn", "training.steps=30", "training.batch_size=32",
    "training.threads=1", "stages=[pretrain]",
)  # fmt: skip
MOMENTUM = "method.momentum=0.96"  # at the start; over 150 steps, 0.996 would leave the target near where it began
METHODS: Mapping[str, tuple[str, ...]] = {
    "dissect": ("method=dissect", "method.codes=[128,64,16]", MOMENTUM, "arms=[random,federated]"),
    "byol": ("method=byol", MOMENTUM, "arms=[federated]"),
    "simclr": ("method=simclr", "arms=[federated]"),
}
RANDOM, OURS = "random", "dissect"
FRACTIONS = (0.01, 0.05, 0.1, 1.0)
LEAST = 2  # labelled patients of each class
TUNING = {"steps": 100, "batch": 32, "lr": 1e-3, "weight_decay": 1e-4, "warmup": 0.1}
CHUNK = 128  # images at once, without gradient

Place = tuple[str, int]  # set, seed
Scores = dict[str, dict[str, float | None]]  # site -> "LP 1%", ... -> AUC, None where undefined
COLUMNS = [f"{kind} {fraction:.0%}" for fraction in FRACTIONS for kind in ("LP", "FT")]


def main() -> None:
    given = options(__doc__ or "", sets=["breast", "pneumonia"], runs="runs/labels").parse_intermixed_args()
    places = list(itertools.product(given.sets, given.seeds))
    with ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = dict(zip(places, pool.map(measured, itertools.repeat(given), places), strict=True))
    found = {name: [rows[name, seed] for seed in given.seeds] for name in given.sets}
    for name in given.sets:
        print(f"\n{name}; at seed {given.seeds[0]}, {labelled_images(study_of(given, name, given.seeds[0]))}")
        table(found[name])
    if given.json:
        what = {"budget": [*BUDGET, *given.overrides], "tuning": TUNING, "seeds": given.seeds}
        write(given.json, {"machine": machine(), "what": what, "sets": found})


def measured(given: argparse.Namespace, place: Place) -> dict[str, Scores]:
    """All methods' figures, on one set and seed."""
    study, found = study_of(given, *place), {}
    torch.set_num_threads(study.training.threads)
    for method, folder in pretrained(given, place).items():
        began = time.perf_counter()
        found[method] = scores(folder, study)
        print(f"{'-'.join(map(str, place))}-{method}: evaluated in {time.perf_counter() - began:.1f} s", flush=True)
    return found


def words_of(given: argparse.Namespace, name: str, seed: int, method: str) -> list[str]:
    """The overrides of one pretraining."""
    return [*words_of_set(name, given.data), *BUDGET, *METHODS[method], f"seed={seed}", *given.overrides]


def study_of(given: argparse.Namespace, name: str, seed: int) -> Study:
    """What all methods share: data, sites, views and evaluation."""
    return config.compose(words_of(given, name, seed, OURS))


def pretrained(given: argparse.Namespace, place: Place) -> dict[str, Path]:
    """Folder of each method's exported encoder, pretrained if it was not."""
    (name, seed), found = place, {}
    for method in METHODS:
        folder = given.runs / f"{name}-{seed}-{method}"
        done = (folder / "model.safetensors").exists()  # the federated arm is the last one
        simulate(folder, words_of(given, name, seed, method), finished=done)
        found[method] = folder
    return found | {RANDOM: RunFolder(found[OURS]).arm(RANDOM)}


def scores(folder: Path, study: Study) -> Scores:
    """All figures of one encoder at all sites; kept in its folder, for as long as encoder and settings are the same."""
    encoder, digest = load_encoder(folder), json.loads((folder / "encoder.json").read_text())["sha256"]
    what = {"encoder": digest, "columns": COLUMNS, "least": LEAST, "tuning": TUNING, "study": study.source}
    file = folder / "label_efficiency.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("what") != what:
        kept = {"what": what, "scores": {site.name: at_site(encoder, site, study) for site in sites_of(study)}}
        write_bytes(file, json.dumps(kept, indent=1).encode())
    found: Scores = kept["scores"]
    return found


def at_site(encoder: nn.Module, site: SiteData, study: Study) -> dict[str, float | None]:
    """AUC by column, at one site."""
    train, val, test = (
        Features(outputs(encoder, split.images), split.labels, split.patients)
        for split in (site.train, site.val, site.test)
    )
    classes, grid, found = len(site.classes), study.evaluation.regularization, {}
    for fraction in FRACTIONS:
        rows = labelled(site.train, fraction, seeding.key(study.seed, "labels", site.name))
        few = Features(train.features[rows], train.labels[rows], tuple(train.patients[row] for row in rows.tolist()))
        probed = linear_probe(few, val, test, classes=classes, grid=grid, seed=study.seed)
        found[f"LP {fraction:.0%}"] = point(auc, probed.probabilities, probed.labels)
        known = site.test.labels >= 0
        tuned = outputs(fine_tuned(encoder, site, rows, study), site.test.images[known]).double().softmax(dim=1)
        found[f"FT {fraction:.0%}"] = point(auc, tuned.numpy().astype(np.float64), site.test.labels[known].numpy())
    return found


def labelled(split: Split, fraction: float, key: int) -> Tensor:
    """Rows of the patients whose labels are given: the first of each class in an order that only the key decides."""
    return rows_with_labels(split, fraction, least=LEAST, key=key)


def fine_tuned(encoder: nn.Module, site: SiteData, rows: Tensor, study: Study) -> nn.Module:
    """A copy of the encoder with a linear head, trained on the given rows; all draws are the same for every encoder."""
    views, labels = config.build(study.views), site.train.labels[rows]
    head = nn.Linear(int(encoder.width), len(site.classes))  # type: ignore[arg-type]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    network = nn.Sequential(copy.deepcopy(encoder), head).train()
    peak, probabilities = TUNING["lr"], balanced_probabilities(labels)
    optimizer = adamw(list(network.parameters()), lr=peak, weight_decay=TUNING["weight_decay"])
    for step in range(int(TUNING["steps"])):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step + 1) / TUNING["steps"], peak=peak, warmup=TUNING["warmup"])
        draw = seeding.generator(study.seed, "fine-tuning", site.name, step)
        chosen = torch.multinomial(probabilities, int(TUNING["batch"]), replacement=True, generator=draw)
        key = seeding.key(study.seed, "fine-tuning views", site.name, step)
        view = views(site.train.images[rows[chosen]], key=key)[0]
        loss = F.cross_entropy(network(view), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([network(part) for part in torch.split(images, CHUNK)])


def labelled_images(study: Study) -> str:
    """How many labelled images each site has at each fraction."""
    texts = []
    for fraction in FRACTIONS:
        counts = [
            str(len(labelled(site.train, fraction, seeding.key(study.seed, "labels", site.name))))
            for site in sites_of(study)
        ]
        texts.append(f"{fraction:.0%}: {'/'.join(counts)}")
    return f"labelled images of the sites at {', '.join(texts)}"


def over_sites(row: Mapping[str, Scores], column: str) -> dict[str, float]:
    """Mean over the sites where every method has every value, by method."""
    sites = [site for site in row[OURS] if all(None not in found[site].values() for found in row.values())]
    return {method: mean(float(found[site][column] or 0.0) for site in sites) for method, found in row.items()}


def table(rows: Sequence[Mapping[str, Scores]]) -> None:
    """The figures of every method over seeds, then our differences to the others."""
    means = {column: [over_sites(row, column) for row in rows] for column in COLUMNS}
    line = f"| {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}"
    print(f"| method {line}")
    for method in rows[0]:
        print(f"| {method} | {' | '.join(spread([m[method] for m in means[c]]) for c in COLUMNS)} |")
    print(f"\n| {OURS} - {line}")
    for other in itertools.islice(rows[0], 1, None):
        cells = [difference([m[OURS] - m[other] for m in means[c]]) for c in COLUMNS]
        print(f"| {other} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
