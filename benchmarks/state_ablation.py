"""Which state of DiSSECT to federate: the momentum encoder's mode x the norms' mode, by linear-probe AUC.

    python benchmarks/state_ablation.py --data DIR [--seeds 0 1 2] [--sets breast pneumonia] [--runs runs/state]
        [--json FILE]

Targets are those of `rounds.target`. Norms: `pooled` and `local` are `rounds.norm`, `none` is an encoder without batch
norm (`encoder.norm=group`; the heads keep theirs, pooled). The sites are the preset `hospital`. All runs of a seed draw
the same batches, views and test images, and runs of one norm start from the same weights. So differences to the shipped
default, average x pooled, are paired by seed. Their 95 % intervals are Student's t over the seeds, in the last column
over all pairs of set and seed; bold where 0 is outside. Cells are compared without a correction: of noise alone, one in
twenty would be bold. `std` is the least spread of the predictions in a last round (1 isotropic, below 0.05 collapsed).

The momentum starts at 0.9, not 0.996: over the 60 steps of this budget the target would otherwise stay near where it
began, and how it is federated could not matter.

DIR holds medmnist/ and medmnist_rebuilt/. Each run is one `medfl simulate` whose command is printed; a finished run is
not repeated, an interrupted one goes on. What stands after the options is added to every command, as `rounds.count=8`.
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
from pathlib import Path
from statistics import mean, stdev

import yaml
from harness import machine, write
from scipy import stats
from table import SETS

from medfl.run_folder import RunFolder

BUDGET = (
    "method=dissect", "method.codes=[128,64,16]", "method.momentum=0.9", "encoder=tiny", "rounds.count=4",
    "rounds.on_collapse=warn", "training.steps=15", "training.batch_size=32", "evaluation.protocols=[linear]",
    "evaluation.resamples=100", "stages=[pretrain,evaluate]",
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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--sets", nargs="+", choices=list(SETS), default=["breast", "pneumonia"])
    options.add_argument("--runs", type=Path, default=Path("runs/state"))
    options.add_argument("--json", type=Path)
    options.add_argument("overrides", nargs="*")
    given = options.parse_intermixed_args()
    places = list(itertools.product(given.sets, given.seeds))
    found = {place: measured(given, place) for place in places}
    table(found, given.sets)
    if given.json:
        what = {"budget": [*BUDGET, *given.overrides], "sets": given.sets, "seeds": given.seeds}
        rows = [
            {"set": name, "seed": seed, "target": target, "norm": norm, **values}
            for (name, seed), cells in found.items()
            for (target, norm), values in cells.items()
        ]
        write(given.json, {"machine": machine(), "what": what, "rows": rows})


def measured(given: argparse.Namespace, place: Place) -> dict[Cell, dict[str, float]]:
    """AUC (mean over sites) and last spread of every cell, on one set and seed."""
    name, seed = place
    aucs: dict[Cell, dict[str, float]] = {}
    stds: dict[Cell, float] = {}
    for target, norm in itertools.product(TARGETS, NORMS):
        folder = given.runs / f"{name}-{seed}-{target}-{norm}"
        arms = ["random", "federated"] if target == TARGETS[0] else ["federated"]  # the first does not know of targets
        data = [word.format(data=given.data) for word in SETS[name]]
        cell = [f"rounds.target={target}", *NORMS[norm], f"arms=[{','.join(arms)}]", f"seed={seed}"]
        simulate(folder, [*data, *BUDGET, *cell, *given.overrides], finished=evaluated(folder, arms))
        run = RunFolder.open(folder)
        aucs |= {(target if arm == "federated" else RANDOM, norm): linear(run, arm) for arm in arms}
        stds[target, norm] = last_spread(run)
    sites = set.intersection(*(set(scores) for scores in aucs.values()))
    return {
        cell: {"auc": mean(scores[site] for site in sorted(sites))} | ({"std": stds[cell]} if cell in stds else {})
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
    print(command + " resume=true" * begun, flush=True)
    began = time.perf_counter()
    resume = ["resume=true"] if begun else []
    call = [sys.executable, "-m", "medfl.cli.main", *shlex.split(command)[1:], *resume]
    if code := subprocess.run(call, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(code)
    print(f"  {time.perf_counter() - began:.1f} s", flush=True)


def evaluated(folder: Path, arms: Sequence[str]) -> bool:
    """Whether every site has evaluated every arm."""
    if not (folder / "sites.json").exists():
        return False
    sites = [site["name"] for site in json.loads((folder / "sites.json").read_text())["sites"]]
    done = {(row["arm"], row["site"]) for row in RunFolder(folder).evaluations()}
    return done >= set(itertools.product(arms, sites))


def linear(run: RunFolder, arm: str) -> dict[str, float]:
    """Site -> linear AUC of an arm; without the sites whose test split has one class only."""
    rows = [row for row in run.evaluations() if (row["arm"], row["protocol"], row["metric"]) == (arm, "linear", "auc")]
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


def table(found: Mapping[Place, Mapping[Cell, Mapping[str, float]]], sets: Sequence[str]) -> None:
    """One line for each cell, the untrained encoders last."""
    heads = [part for name in sets for part in (name, f"{name}: - default")]
    print(f"| target | norm | {' | '.join(heads)} | all: - default | std |\n|---|---|{'---|' * (len(heads) + 2)}")
    for cell in itertools.product((*TARGETS, RANDOM), NORMS):
        cells, every = [], []
        for name in sets:
            rows = [values for (of, _), values in found.items() if of == name]
            pairs = [row[cell]["auc"] - row[DEFAULT]["auc"] for row in rows]
            cells += [spread([row[cell]["auc"] for row in rows]), "default" if cell == DEFAULT else difference(pairs)]
            every += pairs
        std = "" if cell[0] == RANDOM else f"{min(values[cell]['std'] for values in found.values()):.2f}"
        cells += ["default" if cell == DEFAULT else difference(every), std]
        print(f"| {' | '.join(cell)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
