"""One arm's state on the server, and one round: aggregate what the gate admitted, and step."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from medfl import config, rules
from medfl.checkpoint import Checkpoint, load_optimizer, optimizer_tensors
from medfl.errors import ConfigError
from medfl.exchange import Enrolled, Federation, Request, collect
from medfl.gate import Update
from medfl.layout import Flat, Layout, Tensors, broadcast_layout, update_layout
from medfl.messages import PRETRAIN, REFRESH, Order
from medfl.methods.moments import pool
from medfl.run_folder import Event
from medfl.site import new_method
from medfl.study import Study

Rule = Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray]


@dataclass(frozen=True)
class Blueprint:
    """What the server knows of the method: layouts and initial tensors. It never trains."""

    sends: Layout
    answers: Layout
    sums: Layout
    initial: Flat
    remarks: Callable[[Mapping[str, float]], list[str]]

    @classmethod
    def of(cls, study: Study) -> "Blueprint":
        method, norm = new_method(study), study.rounds.norm
        sends = broadcast_layout(method, norm)
        return cls(
            sends,
            update_layout(method, norm),
            update_layout(method, norm, parameters=False),
            sends.pack(method.state_dict()),
            method.remarks,
        )


@dataclass
class Server:
    """One arm's global state: all that a checkpoint needs."""

    arm: str
    lineage: str
    blueprint: Blueprint
    flat: Flat
    optimizer: torch.optim.Optimizer | None
    round: int = 0
    norms: list[float] = field(default_factory=list)  # of the updates accepted so far
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)  # what the server optimizer steps

    @classmethod
    def start(cls, study: Study, arm: str, blueprint: Blueprint, saved: Checkpoint | None) -> "Server":
        """A new arm, or the one that a checkpoint holds.

        Raises:
            ConfigError: the checkpoint is of another model.
        """
        flat = {group: array.copy() for group, array in blueprint.initial.items()}
        if saved is not None:
            if saved.facts["layout"] != blueprint.sends.digest:
                raise ConfigError(f"the checkpoint of arm '{arm}' is of another model. Repeat the run's own overrides.")
            flat = {group: saved.tensors[group].numpy() for group in flat}
        steps = {g: torch.from_numpy(a).requires_grad_() for g, a in flat.items() if g.startswith("parameter/")}
        optimizer = config.build(study.server_optimizer, parameters=list(steps.values()))
        server = cls(arm, uuid.uuid4().hex, blueprint, flat, optimizer, parameters=steps)
        if saved is not None:
            server.lineage, server.round = str(saved.facts["lineage"]), int(saved.facts["round"])
            server.norms = [float(norm) for norm in saved.facts["norms"]]
            if optimizer is not None:
                load_optimizer(optimizer, saved.tensors)
        return server

    def checkpoint(self) -> Checkpoint:
        tensors = {group: torch.from_numpy(array) for group, array in self.flat.items()}
        state = optimizer_tensors(self.optimizer) if self.optimizer is not None else {}
        facts = {
            "arm": self.arm,
            "lineage": self.lineage,
            "layout": self.blueprint.sends.digest,
            "norms": self.norms,
        }
        return Checkpoint(tensors | state, facts)

    def tensors(self) -> Tensors:
        return self.blueprint.sends.unpack(self.flat)

    def step(self, aggregate: Flat) -> None:
        """Parameters take the aggregate, or step towards it through the server optimizer (gradient = −change)."""
        with torch.no_grad():
            for group, parameter in self.parameters.items():
                if self.optimizer is None:
                    parameter.copy_(torch.from_numpy(aggregate[group]))
                else:
                    parameter.grad = parameter.detach() - torch.from_numpy(aggregate[group])
            if self.optimizer is not None:
                self.optimizer.step()

    def set_moments(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Running statistics of every pooled norm from sums over the sites; statistics are set, never stepped."""
        tensors = self.tensors()
        for name in (n.removesuffix(".count") for n in sums if n.endswith(".count")):
            count = int(sums[f"{name}.count"][0])
            mean, variance = pool([(count, sums[f"{name}.sum"], sums[f"{name}.square"])])
            tensors[f"{name}.running_mean"].copy_(mean)
            tensors[f"{name}.running_var"].copy_(variance)


def run_round(federation: Federation, server: Server, sites: Sequence[Enrolled], steps: int) -> None:
    """One round: the server's state moves by one round, or stays as it is.

    Args:
        steps: optimizer steps of each site.

    Raises:
        NetworkError (or the sites' common error): too few usable updates.
    """
    began, study, parts = time.perf_counter(), federation.study, server.blueprint.answers
    order = order_of(study, server, server.round + 1, steps)
    request = Request(PRETRAIN, order, server.blueprint.sends, server.flat, parts, parts.digest, True, server.norms)
    updates = collect(federation, request, sites)
    weights = rules.site_weights([update.volumes for update in updates], study.rounds.max_share)
    server.step(_aggregate(updates, weights, server, config.partial(study.rule)))
    server.set_moments(_sum_moments(updates, parts))
    server.round += 1
    server.norms = (server.norms + [update.norm for update in updates])[-1000:]
    federation.folder.write(_events(server, updates, weights, time.perf_counter() - began))


def refresh(federation: Federation, server: Server, sites: Sequence[Enrolled]) -> None:
    """Norm statistics under the final weights, over all sites, and the monitors of the final encoder."""
    sums = server.blueprint.sums
    order = order_of(federation.study, server, max(server.round, 1), 1)
    request = Request(REFRESH, order, server.blueprint.sends, server.flat, sums, sums.digest, False)
    updates = collect(federation, request, sites)
    server.set_moments(_sum_moments(updates, sums))
    federation.folder.write(
        Event("refresh", server.arm, server.round, update.site, name, value)
        for update in updates
        for name, value in update.metrics.items()
        if name.startswith("monitor/")
    )


def order_of(study: Study, server: Server, number: int, steps: int) -> Order:
    """A fresh order: its nonce is never used again."""
    digest = server.blueprint.sends.digest
    return Order(
        study.source,
        server.lineage,
        server.arm,
        "pretrain",
        number,
        study.rounds.count,
        steps,
        digest,
        uuid.uuid4().hex,
    )


def _aggregate(updates: Sequence[Update], weights: Sequence[float], server: Server, rule: Rule) -> Flat:
    """Each parameter group over the sites that own it; a group that no site owns stays as it is."""
    aggregate: Flat = {}
    for group in server.parameters:
        held = [(u.flat[group], w) for u, w in zip(updates, weights, strict=True) if group in u.flat]
        before = server.flat[group]
        aggregate[group] = rule([f for f, _ in held], [w for _, w in held]) if held else before
    return aggregate


def _sum_moments(updates: Sequence[Update], layout: Layout) -> Tensors:
    """Plain sums over the sites, in the order of their names."""
    total: Tensors = {}
    for update in updates:
        groups = {group for group in update.flat if group.startswith("norm_moments/")}
        for name, tensor in Layout(tuple(s for s in layout.slots if s.group in groups)).unpack(update.flat).items():
            total[name] = total[name] + tensor if name in total else tensor.clone()
    return total


def _events(server: Server, updates: Sequence[Update], weights: Sequence[float], seconds: float) -> list[Event]:
    def event(site: str, name: str, value: float) -> Event:
        return Event("pretrain", server.arm, server.round, site, name, value)

    rows = [event("", "round/seconds", seconds), event("", "round/sites", float(len(updates)))]
    for update, weight in zip(updates, weights, strict=True):
        rows.append(event(update.site, "round/weight", weight))
        rows.append(event(update.site, "round/update_norm", update.norm))
        rows += [event(update.site, name, value) for name, value in sorted(update.metrics.items())]
    means = {
        name: sum(update.metrics.get(name, 0.0) * weight for update, weight in zip(updates, weights, strict=True))
        for name in sorted(updates[0].metrics)
        if name.startswith(("loss/", "monitor/"))
    }
    rows += [event("", name, value) for name, value in means.items()]
    terms = {name.removeprefix("loss/"): value for name, value in means.items() if name.startswith("loss/")}
    remarks = server.blueprint.remarks(terms)
    return rows + [Event("pretrain", server.arm, server.round, "", "remark", 1.0, text) for text in remarks]
