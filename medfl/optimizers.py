"""Optimizers, for the sites and for the server, and the learning-rate schedule as a function of progress."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

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


def lars(
    parameters: Sequence[Tensor], *, lr: float, momentum: float, weight_decay: float, trust: float, eps: float
) -> torch.optim.Optimizer:
    """LARS (You et al. 2017); weight matrices only: biases and norms take plain SGD without decay.

    Args:
        lr: γ; the published runs take 0.3 times the batch size over 256.
        momentum: μ.
        weight_decay: β.
        trust: η.
        eps: ε of the denominator, in the unit of a gradient's norm.
    """
    weights, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]
    return LARS([group for group in groups if group["params"]], lr=lr, momentum=momentum, trust=trust, eps=eps)


class LARS(torch.optim.Optimizer):
    """v <- μ v + γ λ (g + β w), w <- w - v, with λ = η |w| / (|g| + β |w| + ε) for each tensor (Algorithm 1).

    λ is 1 in groups without `adapt`, and for a tensor of zeros, which could never move else. The learning rate
    enters v: what a step added keeps the rate of that step.

    Args:
        groups: each with its "params", "weight_decay" β, and "adapt".
        lr, momentum, trust, eps: as in `lars`.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, trust: float, eps: float
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; nothing is read back from the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                scaled = (weight.grad + group["weight_decay"] * weight) * self._trust(weight, group)
                weight.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(scaled, alpha=group["lr"]))
        return loss

    def _trust(self, weight: Tensor, group: dict[str, Any]) -> Tensor | float:
        if not group["adapt"] or weight.grad is None:
            return 1.0
        size, slope = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(weight.grad)
        ratio: Tensor = group["trust"] * size / (slope + group["weight_decay"] * size + group["eps"])
        return ratio.where(size > 0, 1.0)


def scale_rates(optimizer: torch.optim.Optimizer, rate: Callable[[Tensor], float]) -> None:
    """Multiply the learning rate of each parameter by its `rate`: groups are split where it differs inside them.

    Args:
        optimizer: new; a state would be lost.
    """
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        rates = [rate(parameter) for parameter in group["params"]]
        for factor in dict.fromkeys(rates):
            members = [p for p, own in zip(group["params"], rates, strict=True) if own == factor]
            optimizer.add_param_group({**group, "params": members, "lr": group["lr"] * factor})


def no_server_optimizer(parameters: Sequence[Tensor]) -> None:
    """The aggregate replaces the weights: plain federated averaging."""


MILESTONES = (0.6, 0.8)  # of the schedule "steps": 120 and 160 of MoCo's 200 epochs


def learning_rate(progress: float, *, peak: float, warmup: float, schedule: str = "cosine") -> float:
    """Linear warm-up over the first `warmup` of the schedule; then cosine to zero, or a tenth at each milestone.

    Args:
        progress: position in the whole schedule, in [0, 1]; equal at all sites whatever their step counts.
    """
    if progress < warmup:
        return peak * progress / warmup
    if schedule == "steps":
        return peak * 0.1 ** sum(progress > milestone for milestone in MILESTONES)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
