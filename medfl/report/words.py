"""The words of the results: what arms, protocols and metrics are called.

Imports nothing of the project's, so that any command may use it.
"""

import re
from dataclasses import dataclass

TUNED = {  # fine-tuning protocol -> heading of its column
    "finetune": "Fine-tuned at each site",
    "head": "Head at each site",
    "federated_finetune": "Fine-tuned over all sites",
    "federated_head": "Head over all sites",
    "central_finetune": "Fine-tuned in one place",
}
FROZEN = {"linear": "Linear probe", "knn": "kNN", "classifier": "The method's own classifier"}
METRICS = {
    "auc": "AUC",
    "dice_wt": "Dice (whole tumour)",
    "dice": "Dice",
    "ssim": "SSIM",
    "iou": "IoU",
    "hd95": "HD95, mm (lower is better)",
    "pr_auc": "average precision",
    "f1": "F1",
    "brier": "Brier score (lower is better)",
    "ece": "calibration error (lower is better)",
    "balanced_accuracy": "balanced accuracy (macro recall)",
}
OF_FINDING = re.compile(r"(auc|pr_auc)_(.+)")
MAIN = ("auc", "dice_wt", "dice")  # metrics that lead a protocol, the first that was measured
HEADLINES = {  # (protocol, metric) -> title; a study's result is the first that was measured
    ("linear", "auc"): "linear-probe AUC on the frozen encoder",
    ("segmentation", "dice_wt"): "Dice of the whole tumour",
    **{
        (protocol, metric): f"{METRICS[metric]}, {title[0].lower()}{title[1:]}"
        for metric in MAIN
        for protocol, title in TUNED.items()
    },
    ("fusion", "ssim"): "SSIM of the fused image and its sources",
}
PROTOCOLS = {  # before the name of a metric
    "linear": "linear-probe",
    "knn": "kNN",
    "finetune": "fine-tuned",
    "head": "new-head",
    "federated_finetune": "jointly fine-tuned",
    "federated_head": "joint-head",
    "central_finetune": "centrally fine-tuned",
}
ARMS = {
    "random": "an untrained encoder",
    "local": "sites training alone",
    "federated": "federated pretraining",
    "central": "central training",
}
TITLES = {"random": "Untrained", "local": "Alone", "federated": "Federated", "central": "Central"}
REGIONS = {"wt": "Whole tumour", "tc": "Tumour core", "et": "Enhancing tumour"}  # others are called as in the data


@dataclass(frozen=True)
class Tuned:
    """The name of a fine-tuning's arm, taken apart; `encoder` is the kind of the encoder's arm, such as "local"."""

    protocol: str
    encoder: str
    fraction: str


def taken_apart(arm: str) -> Tuned | None:
    """From "<protocol>:<encoder's arm>[:<site>]:<fraction>"; None for another name."""
    protocol, _, rest = arm.partition(":")
    encoder, _, fraction = rest.rpartition(":")
    kind = encoder.partition(":")[0]
    known = protocol in TUNED and kind in ARMS and fraction.replace(".", "", 1).isdecimal()
    return Tuned(protocol, kind, fraction) if known else None


def arm_name(arm: str) -> str:
    """ "Federated", "Alone, site-1"."""
    kind, _, owner = arm.partition(":")
    return TITLES.get(kind, kind) + (f", {owner}" if owner else "")


def metric_name(metric: str) -> str:
    """ "AUC", "AUC of mass", "balanced accuracy (macro recall)", "recall at 5"."""
    if finding := OF_FINDING.fullmatch(metric):
        return f"{METRICS[finding[1]]} of {finding[2].replace('_', ' ')}"
    return METRICS.get(metric, metric.replace("_", " "))


def region_name(region: str) -> str:
    return REGIONS.get(region, region.replace("_", " "))


def percent(share: float) -> str:
    """ "0.5 %", "10 %"."""
    return f"{100 * share:.3g} %"
