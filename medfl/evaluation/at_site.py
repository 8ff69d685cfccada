"""Evaluation at one site: features, probes, scores. Labels, features and predictions stay; numbers leave."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medfl import seeding
from medfl.data.findings import score_name
from medfl.data.fractions import labels_key, rows_with_labels
from medfl.data.sample import SiteData, Split
from medfl.errors import ConfigError
from medfl.evaluation.knn import knn
from medfl.evaluation.metrics import Array, Labels
from medfl.evaluation.probe import Features, Scores, linear_probe, nothing
from medfl.evaluation.statistics import OF_FINDINGS, Interval, measure, measure_findings
from medfl.evaluation.volumes import Table, fusion, segmentation
from medfl.methods.base import Method
from medfl.study import Evaluation

VOLUMES = {"fusion": "fuse", "segmentation": "segment"}  # protocol -> what the network must be able to do
TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al. 2018)


def probe(
    method: Method, data: SiteData, plan: Evaluation, device: torch.device, *, seed: int, least: int = 1
) -> tuple[dict[str, float], dict[str, Scores]]:
    """Every protocol's metrics as {"linear/auc/value": …, "linear/auc/low": …}, and the predictions behind them.

    What is undefined is left out. "linear@0.1" is the linear probe with a tenth of the labels. The protocol "fusion"
    gives "average" too, the same metrics of the plain mean of the modalities. Scores of single findings are given with
    all labels alone. Predictions are those of classes with all labels; they must not leave the site.

    Args:
        method: in eval mode; only `classifier` and `segmentation` look at more than its encoder.
        seed: of the resamples; together with the site's name it pairs all arms at this site.
        least: patients of each class that keep their labels, however small the share.

    Raises:
        ConfigError: a protocol that this method cannot take part in.
    """
    draw = seeding.key(seed, "bootstrap", data.name)
    tables: dict[str, Mapping[str, Interval]] = {}
    for protocol in [name for name in plan.protocols if name in VOLUMES]:
        scored = _volumes(protocol, method, data, plan, device)
        tables |= {name: table.averages(resamples=plan.resamples, seed=draw) for name, table in scored.items()}
    classified = _classes(method, data, plan, device, seed=seed, least=least)
    for protocol, scores in classified.items():
        tables[protocol] = measure(
            scores.probabilities, scores.labels, scores.patients, resamples=plan.resamples, seed=draw
        )
    names = [score_name(finding) for finding in data.findings]
    for protocol, rows in _findings(method, data, plan, device, seed=seed, least=least).items():
        table = measure_findings(
            rows, _findings_of(data.test), data.test.patients, names, resamples=plan.resamples, seed=draw
        )
        means = {name: table[name] for name in (*OF_FINDINGS, "n_test")}
        tables[protocol] = means if "@" in protocol else table
    metrics = {name: value for protocol, table in tables.items() for name, value in _named(protocol, table).items()}
    return metrics, {protocol: scores for protocol, scores in classified.items() if "@" not in protocol}


def _volumes(protocol: str, method: Method, data: SiteData, plan: Evaluation, device: torch.device) -> dict[str, Table]:
    """The scores of each fused or segmented test image.

    Raises:
        ConfigError: neither the method nor its encoder fuses or segments.
    """
    task = VOLUMES[protocol]
    net: Any = method if hasattr(method, task) else method.encoder
    if not hasattr(net, task):
        raise ConfigError(
            f"evaluation.protocols has {protocol!r}, but this method's encoder cannot {task} images. "
            "Take [linear, knn], or method=nslf."
        )
    if protocol == "fusion":
        return fusion(net, data.test, plan, device)
    return {protocol: segmentation(net, data.test, plan, device, spacing=data.spacing, regions=data.regions)}


def _classes(
    method: Method, data: SiteData, plan: Evaluation, device: torch.device, *, seed: int, least: int
) -> dict[str, Scores]:
    """The class probabilities of the test split by each protocol that gives some; {} where there are no classes."""
    if not data.exclusive:
        return {}
    found = {}
    if "classifier" in plan.protocols:
        found["classifier"] = _classified(method, data, device, plan.batch_size)
    features = _features(method.encoder, data, plan, device)
    return found | _probed(features, data, plan, classes=len(data.classes), seed=seed, least=least)


def _findings(
    method: Method, data: SiteData, plan: Evaluation, device: torch.device, *, seed: int, least: int
) -> dict[str, Array]:
    """The probability of each finding in each test image, (N, L), by the same protocols; {} where there are neither.

    Linear probe and kNN are fitted to each finding by itself; NaN where a finding could not be.
    """
    if not data.findings or not len(data.test):
        return {}
    found: dict[str, Array] = {}
    if "classifier" in plan.protocols:
        rows = _outputs(_probabilities(method, data), data.test.images, device, plan.batch_size)
        found["classifier"] = rows.double().numpy()
    features = _features(method.encoder, data, plan, device)
    for place in range(len(data.findings)):
        column = {
            name: replace(features[name], labels=torch.from_numpy(_findings_of(split)[:, place]))
            for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
            if name in features
        }
        for protocol, scores in _probed(column, data, plan, classes=2, seed=seed, least=least).items():
            table = found.setdefault(protocol, np.full((len(data.test), len(data.findings)), np.nan))
            if len(scores.labels):
                table[column["test"].labels.numpy() >= 0, place] = scores.probabilities[:, 1]
    return found


def _probed(
    features: Mapping[str, Features], data: SiteData, plan: Evaluation, *, classes: int, seed: int, least: int
) -> dict[str, Scores]:
    """Linear probe and kNN, whichever the plan asks for, with each of its shares of the labels."""
    if not features:
        return {}
    train, val, test = (features[name] for name in ("train", "val", "test"))
    protocols: Mapping[str, Callable[[Features], Scores]] = {
        "linear": lambda few: linear_probe(few, val, test, classes=classes, grid=plan.regularization, seed=seed),
        "knn": lambda few: knn(few, test, classes=classes, neighbors=plan.neighbours, temperature=TEMPERATURE),
    }
    found: dict[str, Scores] = {}
    for fraction in plan.fractions:
        few = train if fraction == 1 else _few(train, data, fraction, seed=seed, least=least)
        ending = "" if fraction == 1 else f"@{fraction:g}"
        found |= {f"{name}{ending}": protocols[name](few) for name in plan.protocols if name in protocols}
    return found


def _few(train: Features, data: SiteData, fraction: float, *, seed: int, least: int) -> Features:
    """The training rows of the patients whose labels may be read: the same as in fine-tuning."""
    rows = rows_with_labels(data.train, fraction, least=least, key=labels_key(seed, data.name))
    labels = torch.full_like(train.labels, -1)
    labels[rows] = train.labels[rows]
    return replace(train, labels=labels)


def _named(protocol: str, table: Mapping[str, Interval]) -> dict[str, float]:
    parts = {
        f"{protocol}/{metric}/{part}": getattr(interval, part)
        for metric, interval in table.items()
        for part in ("value", "low", "high")
    }
    return {name: float(value) for name, value in parts.items() if value is not None}


@torch.no_grad()
def _outputs(module: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, batch: int) -> Tensor:
    return torch.cat([module(part.to(device)).float().cpu() for part in torch.split(images, batch)])


def _features(encoder: nn.Module, data: SiteData, plan: Evaluation, device: torch.device) -> dict[str, Features]:
    """Representations (N, F) of each split, an empty one has none; {} where no protocol reads them."""
    if not {"linear", "knn"} & set(plan.protocols):
        return {}
    return {
        name: Features(
            _outputs(encoder, split.images, device, plan.batch_size) if len(split) else torch.empty(0, 1),
            split.labels,
            split.patients,
        )
        for name, split in (("train", data.train), ("val", data.val), ("test", data.test))
    }


def _findings_of(split: Split) -> Labels:
    """(N, L), 1, 0 or -1."""
    if split.findings is None:
        raise ValueError("_findings_of: got a split without findings.")
    found: Labels = split.findings.long().numpy()
    return found


def _classified(method: Method, data: SiteData, device: torch.device, batch: int) -> Scores:
    """The trained classifier's own probabilities on the test split (supervised methods)."""
    probabilities = _probabilities(method, data)
    if not len(data.test):
        return nothing("no test images", classes=len(data.classes))
    rows = _outputs(probabilities, data.test.images, device, batch)
    known = Features(rows, data.test.labels, data.test.patients).labelled()
    return Scores(known.features.double().numpy(), known.labels.numpy(), known.patients)


def _probabilities(method: Method, data: SiteData) -> Callable[[Tensor], Tensor]:
    """What the method learned to say of images (B, C, *S): classes (B, K), or findings (B, L).

    Raises:
        ConfigError: nothing of what these data have.
    """
    probabilities: Callable[[Tensor], Tensor] | None = getattr(method, "probabilities", None)
    if probabilities is None or not method.labelled or method.findings != bool(data.findings):
        raise ConfigError("evaluation.protocols has 'classifier', but this method trains none. Take [linear, knn].")
    return probabilities
