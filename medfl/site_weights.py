"""Weights that a site keeps a part of: momentum encoders, and the blend of its own with the broadcast (FedEMA)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from medfl.layout import Tensors
from medfl.methods.base import Method, Role

OWN, LAMBDA, DRIFT = "blend/own/", "blend/lambda", "blend/drift"


def place_targets(method: Method, mode: str, kept: Mapping[str, Tensor]) -> None:
    """Set the momentum encoders after a broadcast, by `rounds.target`; average has been set by it.

    reset: the online net. shift: moved by as much as the online net moved, so that the lag of this site stays; the
    sites' mean target is then the mean of their targets, and nothing is sent. local: as this site left it. A site
    without a state of its own resets.
    """
    if mode == "average":
        return
    state = method.state_dict()
    for name, online in target_pairs(method).items():
        base = state[online] if mode != "local" or name not in kept else torch.zeros_like(state[online])
        own = kept[name].to(base) if mode != "reset" and name in kept else torch.zeros_like(base)
        state[name].copy_(base + own)


def keep_targets(method: Method, mode: str) -> Tensors:
    """What `place_targets` needs next time: the lag behind the online net (shift), or the target (local)."""
    if mode not in ("shift", "local"):
        return {}
    state = method.state_dict()
    pairs = target_pairs(method)
    return {
        name: state[name] - state[online] if mode == "shift" else state[name].clone() for name, online in pairs.items()
    }


def target_pairs(method: Method) -> dict[str, str]:
    """Name of each tensor with the role TARGET -> its online counterpart."""
    found = {}
    for name in method.tensors(Role.TARGET):
        prefix = next(p for p in method.targets if name.startswith(f"{p}."))
        found[name] = method.targets[prefix] + name.removeprefix(prefix)
    return found


class Blend:
    """FedEMA (Zhuang et al. 2022): θ_i ← μ θ_i + (1 - μ) θ̄ for every parameter that travels, μ = min(1, λ d).

    λ = τ / d is fixed in the first round for which the site has weights of its own. The distance d is, in form
    `paper`, ‖θ̄ - θ_i‖ over all of them (eq. 5); in form `code`, the mean over weight tensors of the L2 length that
    the site's last local training moved them, as the authors' program computes it.
    """

    def __init__(self, form: str, tau: float, names: list[str]) -> None:
        self.form, self.tau, self.names = form, tau, names

    def apply(self, method: Method, kept: Mapping[str, Tensor]) -> tuple[float, Tensors]:
        """Blend in place; returns μ and what to keep. Without own weights μ is 0."""
        state = method.state_dict()
        own = {name: kept[OWN + name].to(state[name]) for name in self.names if OWN + name in kept}
        if self.form == "none" or len(own) < len(self.names):
            return 0.0, {}
        distance = self._distance(state, own, kept)
        scale = float(kept[LAMBDA]) if LAMBDA in kept else self.tau / distance if distance > 0 else 0.0
        share = min(1.0, scale * distance)
        for name, tensor in own.items():
            state[name].lerp_(tensor, share)
        return share, {LAMBDA: torch.tensor(scale, dtype=torch.float64)}

    def keep(self, method: Method, before: Mapping[str, Tensor]) -> Tensors:
        """The site's own weights after training, and how far it went from `before`."""
        if self.form == "none":
            return {}
        state = method.state_dict()
        moved = [torch.dist(state[n], before[n]).double().cpu() for n in self.names if state[n].ndim > 1]
        return {OWN + name: state[name].clone() for name in self.names} | {DRIFT: torch.stack(moved).mean()}

    def start(self, method: Method) -> Tensors:
        """A copy of the weights that training starts from."""
        state = method.state_dict()
        return {name: state[name].clone() for name in self.names} if self.form != "none" else {}

    def _distance(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float:
        if self.form == "code":
            return float(kept[DRIFT])
        squares = [torch.dist(state[name], tensor).double().square() for name, tensor in own.items()]
        return float(torch.stack(squares).sum().sqrt())
