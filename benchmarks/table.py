"""The table of arms on real images: linear-probe AUC of the frozen encoder, mean over sites, over seeds.

    python benchmarks/table.py --data DIR [--seeds 0 1 2] [--sets breast adrenal3d ...] [--runs runs/table] [--jobs 2]

DIR holds medmnist/, medmnist_rebuilt/ and covid_cxr/. Each run is one `medfl simulate` of one thread whose command is
printed, --jobs at a time; a finished run is not repeated, an interrupted one goes on. All arms of a run see equal numbers of samples. A mean is over
the sites where every arm has a value.
"""

import argparse
import csv
import itertools
import shlex
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

BUDGET = ("method=medcss", "encoder=tiny", "rounds.count=5", "training.steps=30", "training.batch_size=64",
          "training.threads=1")  # fmt: skip
SETS: Mapping[str, tuple[str, ...]] = {
    "breast": ("data=medmnist", "data.name=breastmnist", "data.root={data}/medmnist", "sites=hospital"),
    "pneumonia": ("data=medmnist", "data.name=pneumoniamnist", "data.root={data}/medmnist_rebuilt",
                  "sites=hospital"),
    "adrenal3d": ("data=medmnist", "data.name=adrenalmnist3d", "data.root={data}/medmnist", "sites=hospital",
                  "rounds.count=4", "training.steps=6", "training.batch_size=32"),
    "chest-xray": (
        "data=folder", "data.root={data}/covid_cxr", "data.datalist=metadata.csv", "data.image=file", "data.label=sex",
        "data.patient=patientid", "data.site=site", "data.size=64", "sites=natural", "training.steps=20",
    ),
}  # fmt: skip
ARMS = ("random", "local", "federated", "central")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    options.add_argument("--runs", type=Path, default=Path("runs/table"))
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("overrides", nargs="*")
    given = options.parse_intermixed_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = itertools.product(given.sets, given.seeds)
        list(pool.map(lambda run: simulate(*run, given.data, given.runs, given.overrides), runs))
    print("| set | sites | " + " | ".join(ARMS) + " |\n|---|---|" + "---|" * len(ARMS))
    for name in given.sets:
        print(row(name, [given.runs / f"{name}-{seed}" for seed in given.seeds]))


def simulate(name: str, seed: int, data: Path, runs: Path, overrides: list[str]) -> None:
    """One run through all stages; nothing to do if its report is there."""
    folder = runs / f"{name}-{seed}"
    if (folder / "report.html").exists():
        return
    words = [*BUDGET, *(word.format(data=data) for word in SETS[name]), f"seed={seed}", f"run.dir={folder}", *overrides]
    words += ["resume=true"] if (folder / "config.yaml").exists() else []
    print(f"medfl simulate {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "medfl.cli.main", "simulate", *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)


def row(name: str, folders: list[Path]) -> str:
    """Mean and standard deviation over seeds of each arm's mean over sites."""
    tables = [scores(folder) for folder in folders]
    shared = [[s for s in table["random"] if all(s in table[arm] for arm in ARMS)] for table in tables]
    cells = []
    for arm in ARMS:
        means = [mean(table[arm][site] for site in sites) for table, sites in zip(tables, shared, strict=True)]
        spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
        cells.append(f"{mean(means):.3f}{spread}")
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
