"""The table of arms on real images: linear-probe AUC of the frozen encoder, mean over sites, over seeds.

    python benchmarks/table.py --data DIR [--seeds 0 1 2] [--sets breast adrenal3d ...] [--runs runs/table] [--jobs 2]

DIR holds medmnist/, medmnist_rebuilt/ and covid_cxr/. Each run is one `medfl simulate` of one thread whose command is
printed, --jobs at a time; a finished run is not repeated, an interrupted one goes on. All arms of a run see equal
numbers of samples. A mean is over the sites where every arm has a value.
"""

import argparse
import csv
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from harness import machine, write
from studies import SETS, options, simulate, spread, words_of

BUDGET = ("method=medcss", "encoder=tiny", "rounds.count=5", "training.steps=30", "training.batch_size=64",
          "training.threads=1")  # fmt: skip
ARMS = ("random", "local", "federated", "central")


def main() -> None:
    given = options(__doc__ or "", sets=list(SETS), runs="runs/table").parse_intermixed_args()
    runs = list(itertools.product(given.sets, given.seeds))
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda run: run_once(given, *run), runs))
    print("| set | sites | " + " | ".join(ARMS) + " |\n|---|---|" + "---|" * len(ARMS))
    for name in given.sets:
        print(row(name, [given.runs / f"{name}-{seed}" for seed in given.seeds]))
    if given.json:
        what = {"budget": [*BUDGET, *given.overrides], "sets": given.sets, "seeds": given.seeds}
        found = {f"{name}-{seed}": scores(given.runs / f"{name}-{seed}") for name, seed in runs}
        write(given.json, {"machine": machine(), "what": what, "auc": found})


def run_once(given: argparse.Namespace, name: str, seed: int) -> None:
    """One run through all stages; nothing to do if its report is there."""
    folder = given.runs / f"{name}-{seed}"
    words = [*BUDGET, *words_of(name, given.data), f"seed={seed}", *given.overrides]
    simulate(folder, words, finished=(folder / "report.html").exists())


def row(name: str, folders: list[Path]) -> str:
    """Mean and standard deviation over seeds of each arm's mean over sites."""
    tables = [scores(folder) for folder in folders]
    shared = [[s for s in table["random"] if all(s in table[arm] for arm in ARMS)] for table in tables]
    cells = []
    for arm in ARMS:
        means = [mean(table[arm][site] for site in sites) for table, sites in zip(tables, shared, strict=True)]
        cells.append(spread(means))
    return f"| {name} | {'/'.join(str(len(sites)) for sites in shared)} | " + " | ".join(cells) + " |"


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """arm → site → linear AUC; a site's own encoder at its own site is the arm `local`."""
    found: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    with (folder / "evaluation.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            arm, _, owner = line["arm"].partition(":")
            if (
                (line["protocol"], line["metric"]) == ("linear", "auc")
                and line["value"]
                and owner in ("", line["site"])
            ):
                found[arm][line["site"]] = float(line["value"])
    return found


if __name__ == "__main__":
    main()
