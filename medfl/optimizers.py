"""Optimizers, for the sites and for the server, and the learning-rate schedule as a function of progress."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def adamw(parameters: Sequence[Tensor], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), fused; decay on weight matrices only, not on biases and norms."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def sgd(parameters: Sequence[Tensor], *, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum, fused; as a server optimizer with lr = 1 it is FedAvgM (Hsu et al. 2019)."""
    return torch.optim.SGD(list(parameters), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)


def adam(parameters: Sequence[Tensor], *, lr: float, betas: Sequence[float], eps: float) -> torch.optim.Optimizer:
    """Adam; as a server optimizer it is FedAdam (Reddi et al. 2021)."""
    return torch.optim.Adam(list(parameters), lr=lr, betas=(betas[0], betas[1]), eps=eps)


def no_server_optimizer(parameters: Sequence[Tensor]) -> None:
    """The aggregate replaces the weights: plain federated averaging."""


def learning_rate(progress: float, *, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` of the schedule, then cosine to zero.

    Args:
        progress: position in the whole schedule, in [0, 1]; equal at all sites whatever their step counts.
    """
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
