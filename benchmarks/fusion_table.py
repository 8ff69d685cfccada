"""NSLF over sites that lack modalities: fused images and tumour segmentation of every arm, on real MRI and phantoms.

    python benchmarks/fusion_table.py --data DIR [--seeds 0] [--sets mri] [--runs runs/fusion] [--jobs 1] [--json FILE]
    python benchmarks/fusion_table.py --data DIR --seeds 0 1 2 --sets phantom

mri: three natural sites: the two hospitals of TCGA-LGG, one patient with four contrasts each, and four patients of
BraTS 2013 with FLAIR and T1c. Every brain is cut into eight slabs along its axis: five for training, one for
validation, two for test. So the same patients are in training and test: the scores hold for new slabs of them alone.
The masks of TCGA-LGG are automatic.

phantom: 240 drawn heads at four sites (`experiment=brains`): all four contrasts; FLAIR and T2; T1c and T1; T2 and T1c.

All arms see equal numbers of images; a local arm takes all steps of all sites. Scores are of test images: mean over the
sites that have a value; "mean of sources" is the plain mean of an image's modalities. Per site: Dice of the federated
and of the site's own net. Several seeds: mean ± standard deviation over them, and differences to `local` paired by seed
with 95 % t intervals. Finished runs are not repeated. What stands after the options is added to every command.
"""

import argparse
import csv
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from harness import machine, write
from studies import difference, evaluated, options, simulate, spread

from medfl.run_folder import RunFolder

CONTRASTS = {
    "brats2013_deepmedic": {"flair": "Flair_subtrMeanDivStd", "t1ce": "T1c_subtrMeanDivStd", "mask": "OTMultiClass"},
    "tcga_lgg": {"flair": "flair", "t1ce": "t1c", "t1": "t1", "t2": "t2", "mask": "seg_auto_fused"},
}
HOSPITALS = {"TCGA-DU-7294": "henry-ford", "TCGA-FG-6692": "case-western"}  # data/README.md of the images
COLUMNS = ("patient", "site", "flair", "t1ce", "t1", "t2", "mask", "brain", "convention")
COMMON = ("training.threads=1", "stages=[pretrain,evaluate,report]")
SETS: Mapping[str, tuple[str, ...]] = {
    "mri": (
        "method=nslf", "data=multimodal", "data.datalist={datalist}", "data.root={data}", "data.mask=mask",
        "data.brain=brain", "data.convention=convention", "data.patient=patient", "data.site=site",
        "data.spacing=2.0", "data.size=80", "data.depth=8", "data.slabs=8",
        "data.slab_splits=[train,val,train,train,test,train,test,train]", "sites=natural", "sites.min_images=1",
        "views.size=48", "views.depth=8", "method.base_width=8", "method.levels=3", "training.batch_size=2",
        "training.steps=16", "rounds.count=15",
    ),
    "phantom": ("experiment=brains",),
}  # fmt: skip
ARMS = ("random", "local", "federated", "central")
FUSION, REGIONS = ("ssim", "psnr", "nmi"), ("dice_et", "dice_tc", "dice_wt", "dice_wt_present")
Row = Mapping[str, str]


def main() -> None:
    given = options(__doc__ or "", sets=["mri"], runs="runs/fusion", choices=list(SETS)).parse_intermixed_args()
    runs = list(itertools.product(given.sets, given.seeds))
    with ThreadPoolExecutor(given.jobs) as pool:
        folders = dict(zip(runs, pool.map(lambda run: simulated(given, *run), runs), strict=True))
    found = {name: [RunFolder(folders[name, seed]).evaluations() for seed in given.seeds] for name in given.sets}
    for name in given.sets:
        print(f"\n{name}\n")
        over_sites(found[name])
        by_site(found[name])
    if given.json:
        write(given.json, {"machine": machine(), "seeds": given.seeds, "sets": found})


def simulated(given: argparse.Namespace, name: str, seed: int) -> Path:
    """The folder of a finished run."""
    folder = given.runs / f"{name}-{seed}"
    words = [*COMMON, *SETS[name], f"seed={seed}", *given.overrides]
    places = {"data": given.data.resolve(), "datalist": ""}
    if name == "mri":
        places["datalist"] = datalist(given.data, given.runs / "brains.csv")
    command = [word.format(**places) for word in words]
    simulate(folder, command, finished=(folder / "report.html").exists() and evaluated(folder, ["federated"]))
    return folder


def datalist(data: Path, file: Path) -> Path:
    """A data list of the real brains, beside the runs: nothing is written to the images' folder."""
    rows = [row for folder, names in CONTRASTS.items() for row in subjects(data / folder, names)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({key: str(value) for key, value in row.items()} for row in rows)
    return file.resolve()


def subjects(folder: Path, names: Mapping[str, str]) -> list[dict[str, object]]:
    """A row for each subject's folder; paths are relative to the folder of all images."""
    brats, found = folder.name.startswith("brats"), []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = {
            column: place / f"{name if brats else f'{place.name}_{name}'}.nii.gz" for column, name in names.items()
        }
        if brats:
            files["brain"] = place / "brainmask.nii.gz"
        row: dict[str, object] = {column: path.relative_to(folder.parent) for column, path in files.items()}
        site, convention = ("brats-2013", "brats2013") if brats else (HOSPITALS[place.name], "brats2017")
        found.append(row | {"patient": place.name, "site": site, "convention": convention})
    return found


def over_sites(seeds: Sequence[Sequence[Row]]) -> None:
    """Arms by metrics, mean over sites."""
    columns = [("fusion", metric) for metric in FUSION] + [("segmentation", metric) for metric in REGIONS]
    print(f"| arm | {' | '.join(metric for _, metric in columns)} | dice_wt - local |\n|{'---|' * (len(columns) + 2)}")
    average = [spread(of([mean_of(rows, "average", m, "federated") for rows in seeds])) for m in FUSION]
    print(f"| mean of sources | {' | '.join(average)} | {'– | ' * (len(REGIONS) + 1)}".rstrip())
    for arm in ARMS:
        cells = [spread(of([mean_of(rows, protocol, metric, arm) for rows in seeds])) for protocol, metric in columns]
        pairs = [
            (mine, other)
            for rows in seeds
            if (mine := mean_of(rows, "segmentation", "dice_wt", arm)) is not None
            and (other := mean_of(rows, "segmentation", "dice_wt", "local")) is not None
        ]
        apart = "0" if arm == "local" else difference([mine - other for mine, other in pairs])
        print(f"| {arm} | {' | '.join(cells)} | {apart} |")


def by_site(seeds: Sequence[Sequence[Row]]) -> None:
    """Dice of the federated net and of a site's own, at each site."""
    print(f"\n| site | arm | {' | '.join(REGIONS)} |\n|{'---|' * (len(REGIONS) + 2)}")
    for site in sorted({row["site"] for row in seeds[0]}):
        for arm in ("federated", "local"):
            here = [[row for row in rows if row["site"] == site] for rows in seeds]
            cells = [spread(of([mean_of(rows, "segmentation", metric, arm) for rows in here])) for metric in REGIONS]
            print(f"| {site} | {arm} | {' | '.join(cells)} |")


def mean_of(rows: Sequence[Row], protocol: str, metric: str, arm: str) -> float | None:
    """Mean over the sites that have a value; a local arm at its own site alone."""
    values = [
        float(row["value"])
        for row in rows
        if (row["protocol"], row["metric"]) == (protocol, metric)
        and row["value"]
        and row["arm"] == (f"local:{row['site']}" if arm == "local" else arm)
    ]
    return mean(values) if values else None


def of(values: Sequence[float | None]) -> list[float]:
    """The known ones."""
    return [value for value in values if value is not None] or [float("nan")]


if __name__ == "__main__":
    main()
