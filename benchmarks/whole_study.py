"""Whole studies on real images: pretrain, fine-tune, evaluate, transfer and report, every arm, over seeds.

    python benchmarks/whole_study.py --data DIR [--seeds 0 1 2] [--sets adrenal3d chest-xray hippocampus]
        [--runs runs/whole] [--jobs 2] [--json FILE]

Each run is one `medfl simulate` of one thread whose command is printed; its folder holds the report. A finished run is
not repeated, an interrupted one goes on. Adrenal and hippocampus are divided by the preset `hospital` into four sites,
the chest X-rays have five natural ones. DIR holds medmnist/, covid_cxr/ and msd_hippocampus/.

Scores are means over the sites where every arm has a value, ± standard deviation over seeds; `local` is each site's own
encoder at that site. Differences are paired by seed, with 95 % t intervals, bold where 0 is outside (not corrected for
the number of cells). All networks of a column see equal numbers of images, so one trained at a single site takes the
steps of all. Fine-tuning the untrained encoder is supervised training from scratch.
"""

import argparse
import csv
import itertools
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from harness import machine, write
from studies import SETS, difference, options, simulate, spread

from medfl.run_folder import RunFolder

STAGES = "stages=[pretrain,finetune,evaluate,transfer,report]"
COMMON = ("method=medcss", "encoder=tiny", "training.threads=1", "finetune.warmup=0.1", STAGES)
HIPPOCAMPUS = (
    "data=folder", "data.root={runs}/hippocampus", "data.spatial_dims=3", "data.size=32", "data.spacing=1.5",
    "data.mask=mask", "data.regions={{anterior:[1],posterior:[2]}}", "data.patient=patient", "sites=hospital",
    "task=segmentation",
)  # fmt: skip
BUDGETS: Mapping[str, tuple[str, ...]] = {
    "adrenal3d": (*SETS["adrenal3d"], "finetune.rounds=3", "finetune.steps=6"),
    "chest-xray": (*SETS["chest-xray"], "rounds.count=5", "finetune.rounds=4", "finetune.steps=10"),
    "hippocampus": (*HIPPOCAMPUS, "rounds.count=4", "training.steps=6", "training.batch_size=32", "finetune.rounds=4",
                    "finetune.steps=8", "finetune.batch_size=4", "finetune.optimizer.lr=3e-3"),
}  # fmt: skip
ARMS = ("random", "local", "federated", "central")
PROTOCOLS = {"linear": "linear probe", "finetune": "fine-tuned at each site", "federated_finetune": "over all sites"}
METRICS = ("auc", "dice")  # what a protocol is told by: the first that it has

Cells = dict[str, dict[str, float]]  # arm -> site -> value


def main() -> None:
    given = options(__doc__ or "", sets=list(BUDGETS), runs="runs/whole", choices=list(BUDGETS)).parse_intermixed_args()
    if "hippocampus" in given.sets:
        prepare(given.data / "msd_hippocampus", given.runs / "hippocampus")
    runs = list(itertools.product(given.sets, given.seeds))
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda run: run_once(given, *run), runs))
    for name in given.sets:
        folders = [RunFolder(given.runs / f"{name}-{seed}") for seed in given.seeds]
        print(f"\n{name}\n")
        scores_table(folders)
        transfer_table(folders)
    if given.json:
        what = {name: [*COMMON, *BUDGETS[name], *given.overrides] for name in given.sets}
        found = {f"{name}-{seed}": RunFolder(given.runs / f"{name}-{seed}").evaluations() for name, seed in runs}
        write(given.json, {"machine": machine(), "what": what, "seeds": given.seeds, "evaluation": found})


def prepare(source: Path, target: Path) -> None:
    """The datalist of the hippocampus task, by the command that users have for it."""
    if not target.exists():
        command = ["prepare", "decathlon", f"from={source}", f"to={target}"]
        subprocess.run([sys.executable, "-m", "medfl.cli.main", *command], check=True)


def run_once(given: argparse.Namespace, name: str, seed: int) -> None:
    """One run through all stages; nothing to do if its report is there."""
    folder = given.runs / f"{name}-{seed}"
    words = [word.format(data=given.data, runs=given.runs.resolve()) for word in BUDGETS[name]]
    simulate(folder, [*COMMON, *words, f"seed={seed}", *given.overrides], finished=(folder / "report.html").exists())


def cells_of(folder: RunFolder, protocol: str) -> tuple[str, Cells]:
    """The main metric of a protocol, and its values; a site's own encoder at its own site is the arm `local`."""
    every = [row for row in folder.evaluations() if row["protocol"] == protocol and row["value"]]
    rows = [row for row in every if float(row["label_fraction"]) == 1]
    metric = next((m for m in METRICS if any(row["metric"] == m for row in rows)), "")
    found: Cells = {}
    for row in rows:
        arm, _, owner = row["arm"].partition(":")
        if row["metric"] == metric and owner in ("", row["site"]):
            found.setdefault(arm, {})[row["site"]] = float(row["value"])
    return metric, found


def scores_table(folders: Sequence[RunFolder]) -> None:
    """Protocols by arm, and what the federation adds to training alone and to no pretraining."""
    print(f"| {' | '.join(['', *ARMS, 'federated - local', 'federated - random'])} |\n|---|{'---|' * (len(ARMS) + 2)}")
    for protocol, title in PROTOCOLS.items():
        each = [cells_of(folder, protocol) for folder in folders]
        metric = each[0][0]
        if not metric:
            continue
        arms = [arm for arm in ARMS if all(arm in cells for _, cells in each)]
        means = {arm: [over_sites(cells, arms)[arm] for _, cells in each] for arm in arms}
        shown = [spread(means[arm]) if arm in means else "–" for arm in ARMS]
        gains = [
            difference([ours - theirs for ours, theirs in zip(means["federated"], means[other], strict=True)])
            if other in means else "–"
            for other in ("local", "random")
        ]  # fmt: skip
        print(f"| {title}, {metric} | {' | '.join([*shown, *gains])} |")


def over_sites(cells: Cells, arms: Iterable[str]) -> dict[str, float]:
    """Means over the sites where every arm has a value."""
    sites = set.intersection(*(set(cells[arm]) for arm in arms))
    return {arm: mean(cells[arm][site] for site in sorted(sites)) for arm in arms}


def transfer_table(folders: Sequence[RunFolder]) -> None:
    """Both matrices in four numbers: own site, other sites, federated, central."""
    print("\n| transfer | own site | other sites | worst cell | federated | central |\n|---|---|---|---|---|---|")
    for kind in ("representation", "end_to_end"):
        each = [summary(folder, kind) for folder in folders]
        if all(each):
            columns = ([row[place] for row in each] for place in range(len(each[0])))
            cells = ["–" if any(map(math.isnan, column)) else spread(column) for column in columns]
            print(f"| {kind} | {' | '.join(cells)} |")


def summary(folder: RunFolder, kind: str) -> list[float]:
    """Means of the matrix over the sites that were tested by every origin; [] without it."""
    with (folder.path / "transfer.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == kind and row["metric"] in METRICS]
    cells = {(row["trained_on"], row["tested_on"]): float(row["value"]) for row in rows if row["value"]}
    sites = sorted({tested for _, tested in cells})
    origins = [site for site in sites if any(trained == site for trained, _ in cells)]
    whole = [site for site in sites if all((origin, site) in cells for origin in (*origins, "federated"))]
    own = [cells[site, site] for site in whole if site in origins]
    others = [cells[origin, site] for origin in origins for site in whole if origin != site]
    if not own or not others:
        return []
    rest = [mean(cells.get((arm, site), float("nan")) for site in whole) for arm in ("federated", "central")]
    return [mean(own), mean(others), min(others), *rest]


if __name__ == "__main__":
    main()
