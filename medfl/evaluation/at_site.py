"""Frozen-encoder evaluation at one site: features, probes, scores. Labels and features stay; named numbers leave."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medfl import seeding
from medfl.data.sample import SiteData, Split
from medfl.errors import ConfigError
from medfl.evaluation.knn import knn
from medfl.evaluation.probe import Features, Scores, linear_probe
from medfl.evaluation.statistics import Interval, measure
from medfl.evaluation.volumes import Table, fusion, segmentation
from medfl.methods.base import Method
from medfl.study import Evaluation

VOLUMES = {"fusion": "fuse", "segmentation": "segment"}  # protocol -> what the encoder must be able to do
TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al. 2018)


def probe(method: Method, data: SiteData, plan: Evaluation, device: torch.device, *, seed: int) -> dict[str, float]:
    """Every protocol's metrics as {"linear/auc/value": …, "linear/auc/low": …}; what is undefined is left out.

    The protocol "fusion" gives "average" too, the same metrics of the plain mean of the modalities.

    Args:
        method: in eval mode; only `classifier` looks at more than its encoder.
        seed: of the resamples; together with the site's name it pairs all arms at this site.

    Raises:
        ConfigError: a protocol that this method cannot take part in.
    """
    draw = seeding.key(seed, "bootstrap", data.name)
    tables: dict[str, Mapping[str, Interval]] = {}
    for protocol in [name for name in plan.protocols if name in VOLUMES]:
        scored = _volumes(protocol, method.encoder, data, plan, device)
        tables |= {name: table.averages(resamples=plan.resamples, seed=draw) for name, table in scored.items()}
    for protocol, scores in _classes(method, data, plan, device, seed=seed).items():
        tables[protocol] = measure(
            scores.probabilities, scores.labels, scores.patients, resamples=plan.resamples, seed=draw
        )
    return {name: value for protocol, table in tables.items() for name, value in _named(protocol, table).items()}


def _volumes(protocol: str, net: Any, data: SiteData, plan: Evaluation, device: torch.device) -> dict[str, Table]:
    """The scores of each fused or segmented test image.

    Raises:
        ConfigError: the encoder does not fuse or segment.
    """
    task = VOLUMES[protocol]
    if not hasattr(net, task):
        raise ConfigError(
            f"evaluation.protocols has {protocol!r}, but this method's encoder cannot {task} images. "
            "Take [linear, knn], or method=nslf."
        )
    if protocol == "fusion":
        return fusion(net, data.test, plan, device)
    return {protocol: segmentation(net, data.test, plan, device, spacing=data.spacing)}


def _classes(method: Method, data: SiteData, plan: Evaluation, device: torch.device, *, seed: int) -> dict[str, Scores]:
    """The class probabilities of the test split by each protocol that gives some; {} where there are no classes."""
    asked = [protocol for protocol in plan.protocols if protocol not in VOLUMES]
    if not asked or not data.classes:
        return {}
    classes = len(data.classes)
    train, val, test = (
        _features(method.encoder, s, device, plan.batch_size) for s in (data.train, data.val, data.test)
    )
    protocols: Mapping[str, Callable[[], Scores]] = {
        "linear": lambda: linear_probe(train, val, test, classes=classes, grid=plan.regularization, seed=seed),
        "knn": lambda: knn(train, test, classes=classes, neighbors=plan.neighbours, temperature=TEMPERATURE),
        "classifier": lambda: _classified(method, data, device, plan.batch_size),
    }
    return {protocol: protocols[protocol]() for protocol in asked}


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


def _features(encoder: nn.Module, split: Split, device: torch.device, batch: int) -> Features:
    """Representations (N, F) of one split; an empty split has none."""
    if not len(split):
        return Features(torch.empty(0, 1), split.labels, split.patients)
    return Features(_outputs(encoder, split.images, device, batch), split.labels, split.patients)


def _classified(method: Method, data: SiteData, device: torch.device, batch: int) -> Scores:
    """The trained classifier's own probabilities on the test split (supervised methods)."""
    classify = getattr(method, "classify", None)
    if classify is None or not method.labelled:
        raise ConfigError("evaluation.protocols has 'classifier', but this method trains none. Take [linear, knn].")
    logits = _outputs(classify, data.test.images, device, batch)
    ones = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)[:, 1:]
    known = Features(torch.cat([1 - ones.sum(dim=1, keepdim=True), ones], dim=1), data.test.labels, data.test.patients)
    known = known.labelled()
    return Scores(known.features.double().numpy(), known.labels.numpy(), known.patients)
