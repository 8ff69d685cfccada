"""What benchmarks of whole studies share: the real sets, the runs that are not repeated, and how figures are told."""

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
from scipy import stats

from medfl import config
from medfl.run_folder import RunFolder
from medfl.site import Site, open_site

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


def options(
    text: str, *, sets: Sequence[str], runs: str, choices: Sequence[str] = tuple(SETS)
) -> argparse.ArgumentParser:
    """The options that all of them take; what stands after them is added to every command."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, required=True)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--sets", nargs="+", choices=list(choices), default=list(sets))
    found.add_argument("--runs", type=Path, default=Path(runs))
    found.add_argument("--jobs", type=int, default=2)
    found.add_argument("--json", type=Path)
    found.add_argument("overrides", nargs="*")
    return found


def opened(words: Sequence[str]) -> Site:
    """The first site of a study, its codebooks set."""
    site = open_site(config.compose(words).source, 0)
    for name, book in site.shop.method.codebooks().items():
        found = site._seeds(least=1)
        book.set(found[f"{name}.counts"], found[f"{name}.sums"])
    return site


def words_of(name: str, data: Path) -> list[str]:
    """The overrides that choose a set and its sites."""
    return [word.format(data=data) for word in SETS[name]]


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


def difference(pairs: Sequence[float], *, digits: int = 3) -> str:
    """Mean of paired differences with its 95 % t interval; bold where 0 is outside."""
    if len(pairs) < 2:
        return f"{mean(pairs):+.{digits}f}"
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs))
    low, high = mean(pairs) - half, mean(pairs) + half
    text = f"{mean(pairs):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if abs(mean(pairs)) > half else text


def spread(values: Sequence[float], *, digits: int = 3) -> str:
    """Mean ± standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
