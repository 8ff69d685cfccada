"""Does pretraining gain from synthetic images? Table 4 of DCL-CsTP: shares of 0, 10, 50 and 100 %, by linear probe.

    python benchmarks/synthetic_share.py --data DIR [--seeds 0 1 2] [--sets breast] [--methods dcl simclr]
        [--shares 0 0.1 0.5 1] [--runs runs/synthetic] [--jobs 2] [--json FILE]

For every set and seed, each site makes synthetic images of its own training images once (the stage `synthesize`, up to
one for each real image after curation). All pretrainings of that seed read them there: `training.synthetic` of the
curated images, the most realistic first, join the site's own. The preset is `hospital` with two sites of equal size,
since a generator needs some hundred images. Methods and shares have equal numbers of steps, batches of one size and the
same first weights, so a larger share means fewer passes over each image, not more training. The synthetic images come
from the training split alone; probes are fitted and tested on real images.

AUC and accuracy of the federated encoder: mean over the sites that have every AUC, ± standard deviation over seeds;
differences to share 0 of the same method are paired by seed, with 95 % t intervals, bold where 0 is outside. `kept` is
the number of synthetic images after curation for each real one, at the site that has the fewest.

DIR holds medmnist/ and medmnist_rebuilt/. Each run is one `medfl simulate` of one thread whose command is printed,
--jobs seeds and sets at a time; a finished run is not repeated, an interrupted one goes on. A share for which a site
kept too few images is left out at that seed and in the table. What stands after the options is added to every command,
as `synthesis.candidates=12`.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from harness import machine, write
from studies import difference, evaluated, linear, options, simulate, spread, words_of

from medfl import config, site_synthesis
from medfl.run_folder import RunFolder
from medfl.workshop import sites_of

COMMON = ("sites.count=2", "sites.quantity=null", "encoder=tiny", "encoder.stem=none", "training.threads=1")
IMAGES = (
    "stages=[synthesize]", "synthesis.autoencoder_steps=800", "synthesis.denoiser_steps=2500",
    "synthesis.budget=1.0", "synthesis.candidates=8.0",
)  # fmt: skip
BUDGET = (
    "views=eight", "rounds.count=4", "rounds.on_collapse=warn", "training.steps=20", "training.batch_size=64",
    "evaluation.protocols=[linear]", "evaluation.resamples=100", "stages=[pretrain,evaluate]",
)  # fmt: skip
RANDOM, FEDERATED = "random", "federated"
METRICS = ("auc", "accuracy")
KEPT = "kept"

Place = tuple[str, int]  # set, seed
Cell = tuple[str, float]  # method (or RANDOM), share
Row = Mapping[Cell, Mapping[str, float]]  # of one set and seed


def main() -> None:
    parser = options(__doc__ or "", sets=["breast"], runs="runs/synthetic")
    parser.add_argument("--methods", nargs="+", default=["dcl", "simclr"])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.5, 1.0])
    given = parser.parse_intermixed_args()
    if 0.0 not in given.shares:
        parser.error("--shares: need 0 among them, which the others are compared with")
    places = list(itertools.product(given.sets, given.seeds))
    with ThreadPoolExecutor(given.jobs) as pool:
        found = dict(zip(places, pool.map(lambda place: measured(given, place), places), strict=True))
    for name in given.sets:
        print(f"\n{name}")
        table([found[name, seed] for seed in given.seeds])
    if given.json:
        rows = [
            {"set": name, "seed": seed, "method": method, "share": share, **values}
            for (name, seed), row in found.items()
            for (method, share), values in row.items()
        ]
        what = {"images": [*COMMON, *IMAGES], "budget": [*COMMON, *BUDGET], "overrides": given.overrides}
        write(given.json, {"machine": machine(), "what": what, "rows": rows})


def measured(given: argparse.Namespace, place: Place) -> Row:
    """Images, pretrainings and figures of one set and seed."""
    name, seed = place
    common = [*words_of(name, given.data), *COMMON, f"seed={seed}"]
    state = given.runs / f"{name}-{seed}-images" / "sites"
    kept = images_of(state, [*common, *IMAGES, *given.overrides])
    shares = [share for share in given.shares if share <= kept]
    if left_out := [f"{share:g}" for share in given.shares if share > kept]:
        print(f"{state}: a site kept {kept:.2f} images for each real one, share {', '.join(left_out)} is left out")
    scores: dict[Cell, dict[str, dict[str, float]]] = {}
    for method, share in itertools.product(given.methods, shares):
        folder, where = given.runs / f"{name}-{seed}-{method}-{share:g}", f"run.state_dir={state}"
        scores |= pretrained(folder, [*common, *BUDGET, where, *given.overrides], method, share)
    sites = sorted(set.intersection(*(set(values["auc"]) for values in scores.values())))
    means = {
        cell: {metric: mean(values[metric][site] for site in sites) for metric in METRICS}
        for cell, values in scores.items()
    }
    return {cell: {**values, KEPT: kept} for cell, values in means.items()}


def images_of(state: Path, words: Sequence[str]) -> float:
    """Make every site's images; the least number kept for each real one."""
    study = config.compose(words)
    real = {site.name: len(site.train.images) for site in sites_of(study)}
    records = {name: site_synthesis.folder_of(str(state), name) for name in real}
    done = all((folder / site_synthesis.RECORD).exists() for folder in records.values())
    simulate(state.parent, words, finished=done)
    counts = {name: site_synthesis.read_record(folder)["counts"]["kept"] for name, folder in records.items()}
    return min(float(counts[name]) / real[name] for name in real)


def pretrained(
    folder: Path, words: Sequence[str], method: str, share: float
) -> dict[Cell, dict[str, dict[str, float]]]:
    """Metric -> site -> value of the federated encoder, and at share 0 of the untrained one."""
    arms = (RANDOM, FEDERATED) if share == 0 else (FEDERATED,)
    own = (f"method={method}", f"training.synthetic={share:g}", f"arms=[{','.join(arms)}]")
    simulate(folder, [*words, *own], finished=evaluated(folder, arms))
    run = RunFolder.open(folder)
    return {
        (RANDOM if arm == RANDOM else method, share): {metric: linear(run, arm, metric) for metric in METRICS}
        for arm in arms
    }


def table(rows: Sequence[Row]) -> None:
    """One line for each method and each share that every seed has, the untrained encoder last."""
    heads = ["method", "synthetic", "AUC", "AUC - share 0", "accuracy", "accuracy - share 0"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    common = set.intersection(*(set(row) for row in rows))
    for method, share in sorted(common, key=lambda cell: (cell[0] == RANDOM, cell)):
        cells = [method, "–" if method == RANDOM else f"{share:.0%}"]
        for metric in METRICS:
            pairs = [row[method, share][metric] - row[method, 0.0][metric] for row in rows]
            cells += [spread([row[method, share][metric] for row in rows]), difference(pairs) if share else ""]
        print(f"| {' | '.join(cells)} |")
    print(f"kept: {', '.join(f'{next(iter(row.values()))[KEPT]:.2f}' for row in rows)}")


if __name__ == "__main__":
    main()
