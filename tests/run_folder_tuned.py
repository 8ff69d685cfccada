"""The made-up run folder of a study that fine-tunes: label shares, counts, end-to-end transfer, synthetic images."""

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import yaml

from medfl.evaluation.counts import LEAST, count
from tests.run_folder import ARMS, AUC, CONFIG, SHIFT, SITES, add_rows, auc, tell, write_run

FRACTIONS = {
    "finetune": (0.01, 0.1, 0.4, 1.0),
    "federated_finetune": (0.1, 1.0),
    "linear": (0.1,),
}  # linear: 1 is there
GAIN = {"finetune": 0.03, "federated_finetune": 0.05, "central_finetune": 0.055, "linear": 0.0}
ENCODERS = {
    "finetune": ARMS,
    "federated_finetune": ("random", "federated", "central"),
    "central_finetune": ("central",),
}
ROUNDS, STEPS, BATCH = 2, 10, 32  # of a fine-tuning, per site
CLASSES = ("normal", "lesion")
FEW = "site-3"  # holds so few lesions that cells of its confusion matrix are withheld
SYNTHETIC = {"kept": 200, "sanity": 90, "realism": 40, "copy_features": 3, "copy_ratio": 2, "copy_pixels": 0,
             "duplicate": 5, "budget": 60, "copy_share/value": 0.0175, "copy_share/low": 0.01,
             "copy_share/high": 0.028, "exportable": 1}  # fmt: skip


def write_tuned(folder: Path, *, rename: Mapping[str, str] | None = None, segments: bool = False) -> Path:
    """`write_run`, and what fine-tuning and the full evaluation add to it.

    Args:
        rename: other names of sites, such as hostile ones.
        segments: the task has masks of the regions liver and spleen in place of classes.
    """
    write_run(folder, rename=rename)
    names = {site: (rename or {}).get(site, site) for site in SITES}
    add_rows(folder / "evaluation.csv", *(_masks(names) if segments else _tuned(names)))
    add_rows(folder / "transfer.csv", *_end_to_end(names, "dice" if segments else "auc"))
    add_rows(folder / "wire.csv", *_crossings(names))
    tell(folder, [*_rounds(names), *_synthetic(names)])
    if not segments:
        (folder / "counts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in _counts(names)))
    finetune = {"protocols": list(ENCODERS), "fractions": [0.01, 0.1, 0.4, 1.0], "rounds": ROUNDS, "batch_size": BATCH}
    more = {"stages": ["synthesize", "pretrain", "finetune", "evaluate", "transfer", "report"], "finetune": finetune,
            "training": CONFIG["training"] | {"synthetic": 0.5}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | more, sort_keys=False))
    return folder


def score(protocol: str, arm: str, site: str, fraction: float) -> float | None:
    """AUC of an arm fine-tuned with a share of the labels; None at site-4: one class in its test split."""
    known = auc(site if arm == "local" else arm, site)
    return None if known is None else known + GAIN[protocol] + 0.03 * math.log10(fraction)


def liver(protocol: str, arm: str, site: str) -> float:
    """Dice of the liver; the spleen's is 0.1 lower, the mean over both 0.0524."""
    return AUC[arm] + GAIN[protocol] + SHIFT[site]


def told(site: str, arm: str, *, sharpness: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, 2) and labels (N,) behind the counts of one site."""
    draw = np.random.default_rng(SITES.index(site))
    labels = (draw.random(120) < (0.04 if site == FEW else 0.4)).astype(np.int64)
    logits = sharpness * (AUC[arm] - 0.6) * (2 * labels - 1) + draw.normal(size=120)
    high = 1 / (1 + np.exp(-logits))
    return np.stack([1 - high, high], axis=1), labels


def _tuned(names: Mapping[str, str]) -> Iterable[tuple[object, ...]]:
    for protocol, kinds in {**ENCODERS, "linear": ARMS}.items():
        for fraction in FRACTIONS.get(protocol, (1.0,)):
            for kind in kinds:
                for key, site in names.items():
                    value = score(protocol, kind, key, fraction)
                    rows = {"auc": () if value is None else (value, value - 0.03, value + 0.02),
                            "accuracy": (AUC[kind] - 0.1, AUC[kind] - 0.15, AUC[kind] - 0.05),
                            "constant_accuracy": (0.58 if key != "site-3" else 0.7,), "n_test": (100,),
                            "brier": (0.15, 0.1, 0.2)}  # fmt: skip
                    for metric, cell in rows.items():
                        yield _row(kind, site, "classification", protocol, fraction, metric, cell)


def _masks(names: Mapping[str, str]) -> Iterable[tuple[object, ...]]:
    for protocol, kinds in ENCODERS.items():
        for kind in kinds:
            for key, site in names.items():
                value = liver(protocol, kind, key)
                cells = {"dice": value - 0.0524, "dice_liver": value, "dice_spleen": value - 0.1,
                         "iou_liver": value - 0.2, "iou_spleen": value - 0.3, "hd95_liver": 12.5}  # fmt: skip
                for metric, known in cells.items():
                    ends = (known, known - 0.02, known + 0.02)
                    yield _row(kind, site, "segmentation", protocol, 1.0, metric, ends)


def _row(kind: str, site: str, *rest: object) -> tuple[object, ...]:
    task, protocol, fraction, metric, cell = rest
    numbers = [f"{number:.6g}" for number in cell] + [""] * (3 - len(cell))  # type: ignore[arg-type, attr-defined]
    return (f"local:{site}" if kind == "local" else kind, site, task, protocol, f"{fraction:g}", metric, *numbers)


def _end_to_end(names: Mapping[str, str], metric: str) -> Iterable[tuple[object, ...]]:
    for origin in (*SITES, "federated", "central", "random"):
        for key, site in names.items():
            area = auc(origin, key)
            ends = ["", "", ""] if area is None else [f"{area + part:.6g}" for part in (-0.05, -0.1, 0.01)]
            yield (names.get(origin, origin), site, "end_to_end", metric, *ends)


def _arms(names: Mapping[str, str]) -> Iterable[tuple[str, list[str], int]]:
    """Names of the fine-tunings, their sites, and steps of each site and round."""
    everybody = STEPS * len(SITES)
    for fraction in FRACTIONS["finetune"]:
        for kind in ARMS:
            for site in names.values():
                arm = f"local:{site}" if kind == "local" else kind
                yield f"finetune:{arm}:{site}:{fraction:g}", [site], everybody
    for fraction in FRACTIONS["federated_finetune"]:
        for kind in ENCODERS["federated_finetune"]:
            yield f"federated_finetune:{kind}:{fraction:g}", list(names.values()), STEPS
    yield "central_finetune:central:1", ["central"], everybody


def _rounds(names: Mapping[str, str]) -> Iterable[dict[str, object]]:
    draw = random.Random(3)
    for arm, sites, steps in _arms(names):
        for at in range(1, ROUNDS + 1):
            common = {"t": f"2026-03-02T09:{at:02d}:00.000+00:00", "stage": "finetune", "arm": arm, "round": at}
            for site in sites:
                told = {"site/steps": float(steps), "site/seconds": 2.0 + draw.random()}
                yield from (common | {"site": site, "name": name, "value": value} for name, value in told.items())
            yield common | {"site": "", "name": "round/seconds", "value": 5.0}
            yield common | {"site": "", "name": "loss/total", "value": draw.random() / at}


def _crossings(names: Mapping[str, str]) -> Iterable[tuple[object, ...]]:
    for arm, sites, _ in _arms(names):
        for site in sites:
            for direction in ("down", "up"):
                yield (1, site, direction, "head.weight", "parameter", "float32", "2x128", 1024, arm, "finetune")


def _counts(names: Mapping[str, str]) -> Iterable[dict[str, object]]:
    for kind in ARMS:
        for key, site in names.items():
            probabilities, labels = told(key, kind)
            histogram, confusion = count(probabilities, labels, [f"{i}" for i in range(len(labels))])
            yield {"arm": f"local:{site}" if kind == "local" else kind, "site": site, "protocol": "linear",
                   "label_fraction": "1", "classes": list(CLASSES), "least": LEAST,
                   "histogram": histogram.tolist(), "confusion": confusion.tolist()}  # fmt: skip


def _synthetic(names: Mapping[str, str]) -> Iterable[dict[str, object]]:
    for site in list(names.values())[:2]:
        for name, value in SYNTHETIC.items():
            yield {"t": "", "stage": "synthesize", "arm": "", "round": 0, "site": site, "name": f"synthesis/{name}",
                   "value": float(value)}  # fmt: skip
