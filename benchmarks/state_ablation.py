"""Which state of DiSSECT to federate: the momentum encoder's mode x the norms' mode, by linear-probe AUC.

    python benchmarks/state_ablation.py --data DIR [--seeds 0 1 2] [--sets breast pneumonia] [--runs runs/state]
        [--jobs 2] [--json FILE]

Targets are those of `rounds.target`. Norms: `pooled` and `local` are `rounds.norm`, `none` is an encoder without batch
norm (`encoder.norm=group`; the heads keep theirs, pooled). The sites are the preset `hospital`. All runs of a seed draw the same batches, views and test images, and runs of one norm start from
the same weights. So differences to the shipped default, average x pooled, are paired by seed.

AUC is the mean over the sites, ± standard deviation over seeds. The columns `all` take every pair of set and seed, the
second one with sites weighted by their test images, since the smallest have a dozen. Intervals of differences are 95 %
Student's t over the seeds (`all`: the pairs), bold where 0 is outside. They are not corrected for the number of cells:
of noise alone, one in twenty would be bold. `std` is the least spread of the predictions in a last round (1 isotropic,
below 0.05 collapsed).

The momentum starts at 0.9, not 0.996: over the 80 steps of this budget the target would otherwise stay near where it
began, and how it is federated could not matter.

DIR holds medmnist/ and medmnist_rebuilt/. Each run is one `medfl simulate` of one thread whose command is printed,
--jobs at a time; a finished run is not repeated, an interrupted one goes on. What stands after the options is added to
every command, as `rounds.count=8`.
"""

import argparse
import itertools
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, mean, stdev

import yaml
from harness import machine, write
from scipy import stats
from table import SETS

from medfl.run_folder import RunFolder

BUDGET = (
    "method=dissect", "method.codes=[128,64,16]", "method.momentum=0.9", "encoder=tiny", "rounds.count=4",
    "rounds.on_collapse=warn", "training.steps=20", "training.batch_size=32", "training.threads=1",
    "evaluation.protocols=[linear]", "evaluation.resamples=100", "stages=[pretrain,evaluate]",
)  # fmt: skip
TARGETS = ("average", "shift", "reset", "local")
NORMS: Mapping[str, tuple[str, ...]] = {
    "pooled": ("rounds.norm=pooled",),
    "local": ("rounds.norm=local",),
    "none": ("rounds.norm=pooled", "encoder.norm=group"),
}
RANDOM, DEFAULT = "random", ("average", "pooled")

Cell = tuple[str, str]  # target (or RANDOM), norm
Place = tuple[str, int]  # set, seed
Found = Mapping[Place, Mapping[Cell, Mapping[str, float]]]


@dataclass(frozen=True)
class Run:
    """One command. The arm `random`, which does not know of targets, is in the runs of one target only."""

    folder: Path
    words: tuple[str, ...]
    arms: tuple[str, ...]

    def simulate(self) -> None:
        simulate(self.folder, self.words, finished=evaluated(self.folder, self.arms))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--sets", nargs="+", choices=list(SETS), default=["breast", "pneumonia"])
    options.add_argument("--runs", type=Path, default=Path("runs/state"))
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--json", type=Path)
    options.add_argument("overrides", nargs="*")
    given = options.parse_intermixed_args()
    runs = {place: runs_of(given, place) for place in itertools.product(given.sets, given.seeds)}
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(Run.simulate, [run for cells in runs.values() for run in cells.values()]))
    found = {place: measured(cells) for place, cells in runs.items()}
    table(found, given.sets)
    if given.json:
        what = {"budget": [*BUDGET, *given.overrides], "sets": given.sets, "seeds": given.seeds}
        rows = [
            {"set": name, "seed": seed, "target": target, "norm": norm, **values}
            for (name, seed), cells in found.items()
            for (target, norm), values in cells.items()
        ]
        write(given.json, {"machine": machine(), "what": what, "rows": rows})


def runs_of(given: argparse.Namespace, place: Place) -> dict[Cell, Run]:
    """The commands of one set and seed."""
    (name, seed), found = place, {}
    for target, norm in itertools.product(TARGETS, NORMS):
        arms = (RANDOM, "federated") if target == TARGETS[0] else ("federated",)
        data = [word.format(data=given.data) for word in SETS[name]]
        cell = [f"rounds.target={target}", *NORMS[norm], f"arms=[{','.join(arms)}]", f"seed={seed}"]
        folder = given.runs / f"{name}-{seed}-{target}-{norm}"
        found[target, norm] = Run(folder, (*data, *BUDGET, *cell, *given.overrides), arms)
    return found


def measured(runs: Mapping[Cell, Run]) -> dict[Cell, dict[str, float]]:
    """Figures of every cell, on one set and seed, over the sites where all have an AUC."""
    aucs: dict[Cell, dict[str, float]] = {}
    stds: dict[Cell, dict[str, float]] = {}
    for (target, norm), run in runs.items():
        folder = RunFolder.open(run.folder)
        aucs |= {(RANDOM if arm == RANDOM else target, norm): linear(folder, arm, "auc") for arm in run.arms}
        stds[target, norm] = {"std": last_spread(folder)}
    sites = sorted(set.intersection(*(set(scores) for scores in aucs.values())))
    images = linear(folder, "federated", "n_test")
    weights = [images[site] for site in sites]
    return {
        cell: {
            "auc": mean(scores[site] for site in sites),
            "auc_by_images": fmean([scores[site] for site in sites], weights),
            **stds.get(cell, {}),
        }
        for cell, scores in aucs.items()
    }


def simulate(folder: Path, words: Sequence[str], *, finished: bool) -> None:
    """One run in a process of its own; nothing to do if it is finished.

    Raises:
        SystemExit: the command failed, or the folder holds the run of another command.
    """
    command = f"medfl simulate {shlex.join([*words, f'run.dir={folder}'])}"
    begun = (folder / "config.yaml").exists()
    if begun and yaml.safe_load((folder / "config.yaml").read_text())["provenance"]["command"] != command:
        raise SystemExit(f"{folder} holds the run of another command than\n  {command}\nName another --runs.")
    if finished:
        return
    command += " resume=true" * begun
    print(command, flush=True)
    began = time.perf_counter()
    call = [sys.executable, "-m", "medfl.cli.main", *shlex.split(command)[1:]]
    if code := subprocess.run(call, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)
    print(f"{folder.name}: {time.perf_counter() - began:.1f} s", flush=True)


def evaluated(folder: Path, arms: Sequence[str]) -> bool:
    """Whether every site has evaluated every arm."""
    if not (folder / "sites.json").exists():
        return False
    sites = [site["name"] for site in json.loads((folder / "sites.json").read_text())["sites"]]
    done = {(row["arm"], row["site"]) for row in RunFolder(folder).evaluations()}
    return done >= set(itertools.product(arms, sites))


def linear(run: RunFolder, arm: str, metric: str) -> dict[str, float]:
    """Site -> a metric of an arm's linear probe, where it has a value: AUC needs both classes in the test split."""
    rows = [row for row in run.evaluations() if (row["arm"], row["protocol"], row["metric"]) == (arm, "linear", metric)]
    return {row["site"]: float(row["value"]) for row in rows if row["value"]}


def last_spread(run: RunFolder) -> float:
    """Mean over the sites of the predictions' spread in the last round."""
    events = [e for e in run.events() if (e.get("arm"), e["name"], e["site"]) == ("federated", "loss/std", "")]
    return float(max(events, key=lambda event: event["round"])["value"])


def difference(pairs: Sequence[float]) -> str:
    """Mean of paired differences with its 95 % t interval; bold where 0 is outside."""
    if len(pairs) < 2:
        return f"{mean(pairs):+.3f}"
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs))
    text = f"{mean(pairs):+.3f} ({mean(pairs) - half:+.3f} to {mean(pairs) + half:+.3f})"
    return f"**{text}**" if abs(mean(pairs)) > half else text


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(found: Found, sets: Sequence[str]) -> None:
    """One line for each cell, the untrained encoders last."""
    heads = [part for name in sets for part in (name, f"{name} - default")]
    heads = ["target", "norm", *heads, "all - default", "all, by images", "std"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for cell in itertools.product((*TARGETS, RANDOM), NORMS):
        cells = []
        for name in sets:
            rows = [values for (of, _), values in found.items() if of == name]
            cells += [spread([row[cell]["auc"] for row in rows]), to_default(rows, cell, "auc")]
        every = list(found.values())
        cells += [to_default(every, cell, kind) for kind in ("auc", "auc_by_images")]
        std = "" if cell[0] == RANDOM else f"{min(row[cell]['std'] for row in every):.2f}"
        print(f"| {' | '.join((*cell, *cells, std))} |")


def to_default(rows: Sequence[Mapping[Cell, Mapping[str, float]]], cell: Cell, kind: str) -> str:
    if cell == DEFAULT:
        return "0"
    return difference([row[cell][kind] - row[DEFAULT][kind] for row in rows])


if __name__ == "__main__":
    main()
