"""Which state of DiSSECT to federate: the momentum encoder's mode x the norms' mode, by linear-probe AUC.

    python benchmarks/state_ablation.py --data DIR [--seeds 0 1 2] [--sets breast pneumonia] [--runs runs/state]
        [--jobs 2] [--json FILE]

Targets are those of `rounds.target`. Norms: `pooled` and `local` are `rounds.norm`, `none` is an encoder without batch
norm (`encoder.norm=group`; the heads keep theirs, pooled). The sites are the preset `hospital`. All runs of a seed draw
the same batches, views and test images, and runs of one norm start from the same weights. So differences to the shipped
default, average x pooled, are paired by seed.

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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, mean

from harness import machine, write
from studies import difference, evaluated, linear, options, simulate, spread, words_of

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
    given = options(__doc__ or "", sets=["breast", "pneumonia"], runs="runs/state").parse_intermixed_args()
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
        cell = [f"rounds.target={target}", *NORMS[norm], f"arms=[{','.join(arms)}]", f"seed={seed}"]
        folder = given.runs / f"{name}-{seed}-{target}-{norm}"
        found[target, norm] = Run(folder, (*words_of(name, given.data), *BUDGET, *cell, *given.overrides), arms)
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


def last_spread(run: RunFolder) -> float:
    """Mean over the sites of the predictions' spread in the last round."""
    events = [e for e in run.events() if (e.get("arm"), e["name"], e["site"]) == ("federated", "loss/std", "")]
    return float(max(events, key=lambda event: event["round"])["value"])


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
