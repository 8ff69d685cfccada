"""A made-up run folder: four hospitals, five rounds, every arm, a site without AUC, a refused reply."""

import csv
import html
import json
import math
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import yaml

SITES = ("site-1", "site-2", "site-3", "site-4")
ROUNDS = 5
ARMS = ("random", "local", "federated", "central")
AUC = {"random": 0.68, "local": 0.74, "federated": 0.81, "central": 0.825}
SHIFT = {"site-1": 0.02, "site-2": -0.03, "site-3": 0.0, "site-4": 0.04}
EVALUATION = ("arm", "site", "task", "protocol", "label_fraction", "metric", "value", "low", "high")
TRANSFER = ("trained_on", "tested_on", "kind", "metric", "value", "low", "high")
WIRE = ("round", "site", "direction", "name", "role", "dtype", "shape", "bytes", "arm", "stage")
TENSORS = {  # name -> (role, shape, elements)
    "encoder.stem.weight": ("parameter", "16x1x3x3", 144),
    "encoder.layer1.0.conv1.weight": ("parameter", "16x16x3x3", 2304),
    "encoder.layer4.0.conv2.weight": ("parameter", "128x128x3x3", 147456),
    "projector.0.weight": ("parameter", "256x128", 32768),
    "encoder.layer1.0.bn1.sum": ("norm_moments", "16", 16),
    "encoder.layer1.0.bn1.square": ("norm_moments", "16", 16),
}
BOOKS = {"fine": 64, "coarse": 16}  # codes of each
CONFIG = {
    "seed": 0,
    "stages": ["pretrain", "evaluate", "transfer", "report"],
    "arms": list(ARMS),
    "data": {
        "_target_": "medfl.data.phantom.Phantom",
        "spatial_dims": 2,
        "channels": 1,
        "size": 28,
        "count": 2400,
    },
    "sites": {"_target_": "medfl.data.sites.Sites", "count": 4, "alpha": 0.5, "quantity": "lognormal", "severity": 3},
    "views": {"_target_": "medfl.views.compose.Views"},
    "encoder": {"_target_": "medfl.models.encoders.ResNet", "blocks": [1, 1, 1, 1], "base_width": 16, "se_ratio": 16},
    "method": {"_target_": "medfl.methods.medcss.MedCSS", "temperature": 0.2},
    "training": {"steps": 40, "batch_size": 64},
    "rounds": {"count": ROUNDS, "carrier": "inprocess", "norm": "pooled"},
    "rule": {"_target_": "medfl.rules.weighted_mean"},
    "server_optimizer": {"_target_": "medfl.optimizers.no_server_optimizer"},
    "evaluation": {"protocols": ["linear", "knn"], "resamples": 1000},
    "run": {"dir": "runs/medcss-phantom-hospital-seed0"},
    "provenance": {
        "medfl": "0.1.0",
        "torch": "2.13.0",
        "flwr": "1.41.0",
        "python": "3.11.7",
        "command": "medfl simulate sites=hospital",
        "started": "2026-03-02T08:00:00+00:00",
    },
}


def draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures empty, which take most of a page's time."""
    for drawing in ("panels.curves", "scores.intervals", "charts.square", "charts.shares", "charts.violins"):
        monkeypatch.setattr(f"medfl.report.{drawing}", lambda *_, **__: "<svg></svg>")


def write_run(folder: Path, *, rename: Mapping[str, str] | None = None) -> Path:
    """Write the folder.

    Args:
        rename: other names of sites, such as hostile ones.
    """
    names = {site: (rename or {}).get(site, site) for site in SITES}
    draw = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in _events(names, draw)))
    write_table(folder / "evaluation.csv", EVALUATION, _scores(names))
    write_table(folder / "transfer.csv", TRANSFER, _transfers(names))
    write_table(folder / "wire.csv", WIRE, _crossings(names))
    (folder / "sites.json").write_text(json.dumps(_sites(names)))
    (folder / "encoder.json").write_text(json.dumps(_encoder()))
    return folder


def write_table(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def add_rows(path: Path, *rows: tuple[object, ...]) -> None:
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def tell(folder: Path, events: Iterable[Mapping[str, object]]) -> None:
    """Add lines to metrics.jsonl."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f"{json.dumps(event)}\n" for event in events)


def discrete_events(alarm: float = 0.0) -> list[dict[str, object]]:
    """What DiSSECT's federation adds to metrics.jsonl; site-4 does not answer in the last round.

    Args:
        alarm: index alarm of site-2 in the fine codebook, in rounds 2 and 3.
    """
    found: list[dict[str, object]] = []
    for at in range(1, ROUNDS + 1):
        told = {("", "features/coding_rate"): 20.0 + at, ("", "features/site_separability"): 3.0 / at}
        told |= {(site, "features/coding_rate"): 18.0 + at for site in SITES}
        for name in BOOKS:
            book = f"codebook/scales.{name}.quantizer"
            told |= {("", f"{book}/{kind}"): 1 / (at + i) for i, kind in enumerate(("dead", "rare", "drift"))}
            told |= {("", f"{book}/perplexity"): BOOKS[name] * 0.5, ("", f"{book}/revived"): 1.0}
            for i, site in enumerate(SITES[: 3 if at == ROUNDS else 4]):
                wrong = alarm if (name, site) == ("fine", "site-2") and at in (2, 3) else 0.0
                values = {"js": 0.1 * i + 0.01 * at, "exclusive": 0.2, "error": 0.3, "index_alarm": wrong}
                told |= {(site, f"{book}/{kind}"): value for kind, value in values.items()}
        found += [
            {"t": "", "stage": "pretrain", "arm": "federated", "round": at, "site": site, "name": name, "value": value}
            for (site, name), value in told.items()
        ]
    return found


def discrete_crossings() -> list[tuple[object, ...]]:
    """The rows of wire.csv of one round at one site that only DiSSECT has."""
    rows = [(f"scales.{name}.quantizer.counts", "codebook", f"{codes}", codes) for name, codes in BOOKS.items()]
    rows += [("target_encoder.stem.weight", "target", "16x1x3x3", 144), ("features.gram", "statistics", "8x8", 64)]
    return [
        (1, "site-1", "up", name, role, "float64", shape, 8 * elements, "federated", "pretrain")
        for name, role, shape, elements in rows
    ]


MODALITIES = {  # site -> training images of each modality
    "site-1": {"flair": 24, "t1ce": 24, "t1": 24, "t2": 24},
    "site-2": {"flair": 20, "t1ce": 0, "t1": 0, "t2": 20},
    "site-3": {"flair": 0, "t1ce": 16, "t1": 16, "t2": 0},
    "site-4": {"flair": 0, "t1ce": 12, "t1": 0, "t2": 0},
}
PHASES = {"features": 1, "fusion": 3, "segmentation": 5}  # name -> first round
DICE = {"random": 0.05, "local": 0.61, "federated": 0.72, "central": 0.74}
LACK = {"dice_et": 0.12, "dice_tc": 0.06, "dice_wt": 0.0}  # below DICE, by metric


def write_volumes(folder: Path, *, pictures: Mapping[str, bytes] | None = None) -> Path:
    """A run of a method that fuses and segments: site-4 has one modality, site-3 no test image with a mask.

    Args:
        pictures: path below `sites/pictures` -> content.
    """
    write_run(folder)
    write_table(folder / "evaluation.csv", EVALUATION, _volume_scores())
    (folder / "transfer.csv").unlink()
    tree = json.loads((folder / "sites.json").read_text())
    for site in tree["sites"]:
        site |= {
            "classes": {},
            "modalities": MODALITIES[site["name"]],
            "labelled": 0 if site["name"] == "site-3" else 9,
        }
    (folder / "sites.json").write_text(json.dumps(tree))
    with (folder / "metrics.jsonl").open("a") as file:
        for arm in ("federated", "central", *(f"local:{site}" for site in SITES)):
            common = {"t": "", "stage": "pretrain", "arm": arm, "site": "", "name": "phase", "value": 1.0}
            file.writelines(f"{json.dumps(common | {'round': at, 'reason': name})}\n" for name, at in PHASES.items())
    for path, content in (pictures or {}).items():
        file_of = folder / "sites" / "pictures" / path
        file_of.parent.mkdir(parents=True, exist_ok=True)
        file_of.write_bytes(content)
    return folder


def dice(arm: str, site: str, metric: str) -> float:
    """Dice of an arm at a site, as written by `write_volumes`."""
    return DICE[arm] - LACK[metric] * (arm != "random") + SHIFT[site]


def _volume_scores() -> Iterable[tuple[object, ...]]:
    for kind in ARMS:
        for site in SITES:
            rows: dict[tuple[str, str], tuple[float, ...]] = {}
            if site != "site-3":
                for metric in LACK:
                    value, region = dice(kind, site, metric), metric.removeprefix("dice_")
                    rows["segmentation", metric] = (value, value - 0.04, value + 0.03)
                    rows["segmentation", f"{metric}_present"] = (value - 0.01, value - 0.05, value + 0.02)
                    for name, other in {"sensitivity": value + 0.02, "specificity": 0.99, "accuracy": 0.98}.items():
                        rows["segmentation", f"{name}_{region}"] = (other, other - 0.02, min(1.0, other + 0.01))
                    rows["segmentation", f"hd95_{region}"] = (20 * (1 - value), 12 * (1 - value), 30 * (1 - value))
                rows["segmentation", "n_test"] = (9,)
            if site != "site-4":
                better = DICE[kind] / 5
                for protocol, gain in (("fusion", better), ("average", 0.02)):
                    rows[protocol, "ssim"] = (0.78 + gain, 0.76 + gain, 0.79 + gain)
                    rows[protocol, "psnr"] = (20 + 30 * gain, 19 + 30 * gain, 21 + 30 * gain)
                    rows[protocol, "rsfe"] = (gain - 0.3, gain - 0.35, gain - 0.25)
                    rows[protocol, "n_test"] = (12,)
            arm = f"local:{site}" if kind == "local" else kind
            for (protocol, metric), cell in rows.items():
                yield (arm, site, "classification", protocol, "1.0", metric, *_cells(cell))


def _events(names: Mapping[str, str], draw: random.Random) -> Iterable[dict[str, object]]:
    arms = {"federated": list(names.values()), "central": ["central"]}
    arms |= {f"local:{name}": [name] for name in names.values()}
    for arm, sites in arms.items():
        for at in range(1, ROUNDS + 1):
            common = {
                "t": f"2026-03-02T08:{at:02d}:00.000+00:00",
                "stage": "pretrain",
                "arm": arm,
                "round": at,
            }
            answered = [s for s in sites if not (arm == "federated" and at == 3 and s == names["site-2"])]
            for site in answered:
                for name, value in _measured(arm, SITES.index(_key(names, site)), at, draw).items():
                    yield common | {"site": site, "name": name, "value": value}
                yield common | {"site": site, "name": "round/weight", "value": 1 / len(answered)}
            for name, value in _measured(arm, 1, at, draw).items():
                if name.startswith(("loss/", "monitor/")):
                    yield common | {"site": "", "name": name, "value": value}
            yield common | {
                "site": "",
                "name": "round/seconds",
                "value": 6.5 + draw.random() + 0.2 * len(sites),
            }
            yield common | {"site": "", "name": "round/sites", "value": float(len(answered))}
    yield {"t": "2026-03-02T08:03:00.000+00:00", "stage": "pretrain", "arm": "federated", "round": 3,
           "site": names["site-2"], "name": "refused", "value": 1.0,
           "reason": f"site '{names['site-2']}': 'encoder.stem.weight' has NaN or infinity."}  # fmt: skip


def _measured(arm: str, index: int, at: int, draw: random.Random) -> dict[str, float]:
    better = {"federated": 0.3, "central": 0.45}.get(arm, 0.0)
    contrast = 3.4 - better + 0.15 * index + 1.1 * math.exp(-0.6 * at) + 0.03 * draw.random()
    alignment = 0.34 - 0.1 * better + 0.2 * math.exp(-0.5 * at) + 0.01 * index
    return {
        "loss/total": contrast + alignment,
        "loss/contrast": contrast,
        "loss/alignment": alignment,
        "monitor/rankme": 18 + 20 * better + 3.1 * at - 1.5 * index + draw.random(),
        "monitor/embedding_std": 0.052 + 0.004 * at - 0.002 * index,
        "monitor/alignment": 0.4 + 0.3 * math.exp(-0.4 * at) + 0.02 * index,
        "monitor/uniformity": -1.8 - 0.2 * at + 0.06 * index,
        "site/seconds": 1.4 + 0.2 * index + 0.1 * draw.random(),
        "site/volumes": 600.0 - 100 * index,
        "site/steps": 40.0 if arm == "federated" else 160.0,
        "round/update_norm": 4.0 / math.sqrt(at) + 0.2 * index,
    }


def auc(origin: str, site: str) -> float | None:
    """Of the encoder of `origin` (an arm or a site) at `site`; None at site-4: one class in its test split."""
    if site == "site-4":
        return None
    level = AUC.get(origin) or (AUC["local"] if origin == site else AUC["local"] - 0.03)
    return level + SHIFT[site] + 0.02 * random.Random(f"{origin} {site}").random()


def _scores(names: Mapping[str, str]) -> Iterable[tuple[object, ...]]:
    """Every arm at every site; what cannot be computed is empty (AUC) or absent (balanced accuracy)."""
    for kind in ARMS:
        for key, site in names.items():
            arm = f"local:{site}" if kind == "local" else kind
            area = auc(key if kind == "local" else kind, key)
            level = AUC[kind] - 0.12
            rows: dict[tuple[str, str], tuple[float, ...]] = {
                ("linear", "auc"): () if area is None else (area, area - 0.041, area + 0.037),
                ("linear", "accuracy"): (level, level - 0.05, level + 0.04),
                ("linear", "constant_accuracy"): (0.58 if key != "site-3" else 0.7,),
                ("linear", "n_test"): (120 - 20 * SITES.index(key),),
            }
            if area is not None:
                rows["linear", "balanced_accuracy"] = (area - 0.14, area - 0.2, area - 0.09)
            if kind != "random" and area is not None:
                rows["knn", "auc"] = (area - 0.02, area - 0.07, area + 0.03)
            for (protocol, metric), cell in rows.items():
                yield (arm, site, "classification", protocol, "1.0", metric, *_cells(cell))


def _transfers(names: Mapping[str, str]) -> Iterable[tuple[object, ...]]:
    for origin in (*SITES, "federated", "central", "random"):
        for key, site in names.items():
            area = auc(origin, key)
            cell = () if area is None else (area, area - 0.041, area + 0.037)
            yield (names.get(origin, origin), site, "representation", "auc", *_cells(cell))


def _cells(numbers: tuple[float, ...]) -> list[str]:
    return [f"{number:.6g}" for number in numbers] + [""] * (3 - len(numbers))


def _crossings(names: Mapping[str, str]) -> Iterable[tuple[object, ...]]:
    for at in range(1, ROUNDS + 1):
        for site in names.values():
            for name, (role, shape, elements) in TENSORS.items():
                dtype, width = ("float64", 8) if role == "norm_moments" else ("float32", 4)
                for direction in ("down", "up"):
                    yield (
                        at,
                        site,
                        direction,
                        name,
                        role,
                        dtype,
                        shape,
                        elements * width,
                        "federated",
                        "pretrain",
                    )
            yield (at, site, "down", "study", "order", "text", "2100", 2100, "federated", "pretrain")
            for name in ("loss/total", "loss/contrast", "monitor/rankme", "site/volumes"):
                yield (at, site, "up", name, "metric", "float64", "1", 8, "federated", "pretrain")
    for site in names.values():
        yield (ROUNDS, site, "up", "linear/auc", "metric", "float64", "1", 8, "federated", "probe")
        yield (ROUNDS, site, "up", "linear/auc", "metric", "float64", "1", 8, "central", "probe")


def _sites(names: Mapping[str, str]) -> dict[str, object]:
    classes = (
        {"normal": 300, "lesion": 120},
        {"normal": 90, "lesion": 260},
        {"normal": 200, "lesion": 60},
        {"normal": 130},
    )
    profiles = ("reference", "contrast", "noisy, low dose", "soft kernel")
    sites = [
        {"name": name, "train": sum(mix.values()), "val": 40, "test": 120 - 20 * i, "classes": mix,
         "profile": profile, "held_out": False}
        for i, (name, mix, profile) in enumerate(zip(names.values(), classes, profiles, strict=True))
    ]  # fmt: skip
    calibration = {
        "site_accuracy": 0.871,
        "chance": 0.25,
        "label_variation": 0.31,
        "effective_sites": 3.42,
    }
    return {"sites": sites, "calibration": calibration}


def _encoder() -> dict[str, object]:
    return {
        "architecture": {"name": "ResNet", "layers": [1, 1, 1, 1], "width": 128},
        "input": {"spatial_dims": 2, "channels": 1, "size": 28},
        "roles": [{"name": n, "role": role, "shape": shape} for n, (role, shape, _) in TENSORS.items()],
        "provenance": {"medfl": "0.1.0"},
        "sha256": "9f2c" * 16,
    }


def _key(names: Mapping[str, str], site: str) -> str:
    return next((key for key, name in names.items() if name == site), "site-1")


def section(text, name):
    """The words of one section, tags taken off."""
    part = re.search(rf'<(section|header) id="{name}".*?</\1>', text, re.DOTALL)
    return words(part[0])


def words(markup):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())
