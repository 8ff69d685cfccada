"""What privacy costs: AUC at ε = ∞, 16, 8 and 4 per patient, for self-supervised pretraining and fine-tuning.

    python benchmarks/privacy.py --data DIR [--seeds 0 1 2] [--sets pneumonia adrenal3d] [--runs runs/privacy]
        [--jobs 2] [--json FILE]

Two sites that hold a random half of the set each. The network is the same in all rows: group norm in a thin ResNet-10.

- SSL + FT: BYOL over both sites, then encoder and head over both sites; ε is of both together, at one σ.
- FT: encoder and head over both sites from the untrained encoder; the whole ε goes there.
- untrained: a linear probe on the untrained encoder's features, without any privacy: the floor.

All training under ε is at the patient level (privacy=patient), with clipping at C = 1. σ is the least, to 1 %, whose
releases cost at most ε at the smaller site, δ = 1 / (10 patients), found by the product's own accountants; ε = ∞ is
plain training. Each row is one `medfl simulate`. Figures are test AUC, mean over the sites, ± deviation over the seeds.
DIR holds medmnist/ and medmnist_rebuilt/. A finished run is not repeated. What stands after the options is added to
every command.
"""

import argparse
import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

from harness import machine, write
from studies import options, simulate, spread
from studies import words_of as words_of_set

from medfl import config
from medfl.privacy.accounting import noise_for
from medfl.privacy.forecast import forecast
from medfl.run_folder import RunFolder
from medfl.workshop import sites_of

EPSILONS = (None, 16.0, 8.0, 4.0)  # None: ∞
SETS = ("pneumonia", "adrenal3d")
COMMON = (
    "sites=iid", "sites.count=2", "encoder=tiny", "encoder.base_width=8", "encoder.norm=group", "training.threads=1",
    "evaluation.resamples=20", "evaluation.protocols=[linear]", "run.tensorboard=false", "rounds.on_collapse=warn",
    "finetune.protocols=[federated_finetune]", "finetune.rounds=5", "finetune.steps=20", "finetune.batch_size=128",
    "method=byol", "method.hidden=128", "method.width=64", "method.norm=layer", "method.momentum=0.96",
    "rounds.count=5", "training.steps=20", "training.batch_size=128", "rounds.max_update=100",
)  # fmt: skip
SMALLER: Mapping[str, tuple[str, ...]] = {  # volumes cost more
    "adrenal3d": (
        "rounds.count=3", "training.steps=8", "training.batch_size=32", "finetune.rounds=4", "finetune.steps=15",
        "finetune.batch_size=32",
    ),
}  # fmt: skip
KINDS: Mapping[str, tuple[str, ...]] = {
    "SSL + FT": ("arms=[federated]", "stages=[pretrain,finetune,evaluate]"),
    "FT": ("arms=[random]", "stages=[pretrain,finetune,evaluate]"),
}
Case = tuple[str, str, float | None, int]  # set, kind, ε, seed


def main() -> None:
    given = options(__doc__ or "", sets=SETS, runs="runs/privacy", choices=SETS).parse_intermixed_args()
    cases = list(itertools.product(given.sets, KINDS, EPSILONS, given.seeds))
    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(cases, pool.map(lambda case: measured(given, case), cases), strict=True))
    for name in given.sets:
        table(name, found, given.seeds)
    if given.json:
        rows = [{"set": s, "kind": k, "epsilon": e, "seed": n, **value} for (s, k, e, n), value in found.items()]
        write(given.json, {"machine": machine(), "common": COMMON, "overrides": given.overrides, "rows": rows})


def measured(given: argparse.Namespace, case: Case) -> dict[str, float]:
    """AUC after fine-tuning and of the probe, and what it cost at the smaller site."""
    name, kind, epsilon, seed = case
    words = [*words_of_set(name, given.data), *COMMON, *SMALLER.get(name, ()), *KINDS[kind]]
    words += [f"seed={seed}", *given.overrides]
    noise = 0.0
    if epsilon is not None:
        words += ["privacy=patient"]
        study = config.compose(words)
        patients = min(len(set(site.train.patients)) for site in sites_of(study) if not site.held_out)
        delta = 1 / (10 * patients)
        noise = noise_for(epsilon, delta, forecast(study, patients, sites=2, books=False))
        words += [f"privacy.noise={noise:.4f}", f"privacy.max_epsilon={1.02 * epsilon}"]
    folder = given.runs / f"{name}-{kind.replace(' + ', '-')}-{epsilon or 'inf'}-{seed}"
    simulate(folder, words, finished=(folder / "evaluation.csv").exists())
    run = RunFolder(folder)
    told = [event["value"] for event in run.events() if event["name"] == "site/epsilon"]
    return {"noise": noise, "spent": max(told, default=0.0)} | {
        p: auc(run, p) for p in ("federated_finetune", "linear")
    }


def auc(run: RunFolder, protocol: str) -> float:
    """The mean over the sites."""
    rows = [row for row in run.evaluations() if (row["protocol"], row["metric"]) == (protocol, "auc") and row["value"]]
    return mean(float(row["value"]) for row in rows)


def table(name: str, found: Mapping[Case, Mapping[str, float]], seeds: list[int]) -> None:
    def shown(kind: str, epsilon: float | None, what: str) -> str:
        return spread([found[name, kind, epsilon, seed][what] for seed in seeds])

    print(f"\n{name}; untrained encoder, linear probe: {shown('FT', None, 'linear')}\n")
    print("| ε per patient | SSL + FT | σ | FT | σ | probe after SSL |\n|---|---|---|---|---|---|")
    for epsilon in EPSILONS:
        cells = [f"{epsilon:g}" if epsilon else "∞"]
        for kind in KINDS:
            cells += [shown(kind, epsilon, "federated_finetune"), shown(kind, epsilon, "noise") if epsilon else "–"]
        print("| " + " | ".join([*cells, shown("SSL + FT", epsilon, "linear")]) + " |")


if __name__ == "__main__":
    main()
