"""Peers that the benchmarks race against: which of them are here, and how those that need help are imported."""

import importlib.util

import torch

SHIMMED: list[torch.library.Library] = []  # definitions last as long as their library


def installed(*modules: str) -> bool:
    """Whether all of them can be found; nothing is imported."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def allow_torchvision() -> None:
    """Let `import torchvision` pass beside the CPU build of torch, which lacks two operators that its wheel names."""
    if SHIMMED or hasattr(torch.ops.torchvision, "nms"):
        return
    SHIMMED.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        SHIMMED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
