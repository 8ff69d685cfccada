"""One arm's state on the server, and one round: aggregate what the gate admitted, and step."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from medfl import config, features, rules, server_books
from medfl.checkpoint import Checkpoint, load_optimizer, optimizer_tensors
from medfl.codebooks import Book
from medfl.errors import ConfigError, DivergedError
from medfl.exchange import Enrolled, Federation, Request, collect
from medfl.gate import Update
from medfl.layout import Flat, Layout, Policy, Tensors, broadcast_layout, seed_layout, update_layout
from medfl.messages import PRETRAIN, REFRESH, SEED, Order
from medfl.methods.base import Role
from medfl.methods.moments import pool
from medfl.run_folder import Event
from medfl.server_books import Books, Kind
from medfl.study import Study
from medfl.workshop import new_method

Rule = Callable[[Sequence[np.ndarray], Sequence[float], rules.Before], np.ndarray]
LLOYD = 3  # exchanges of code sums before the first round
CONFIRMED = 2  # collapsed rounds running


@dataclass(frozen=True)
class Blueprint:
    """What the server knows of the method: layouts and initial tensors. It never trains."""

    sends: Layout
    answers: Layout
    sums: Layout
    seeds: Layout
    initial: Flat
    books: Mapping[str, Kind]  # the codebooks that travel
    remarks: Callable[[Mapping[str, float]], list[str]]
    alarm: Callable[[Mapping[str, float]], str]

    @classmethod
    def of(cls, study: Study) -> "Blueprint":
        method = new_method(study)
        policy = Policy.of(method, study.rounds)
        sends = broadcast_layout(method, policy)
        return cls(
            sends,
            update_layout(method, policy),
            update_layout(method, policy, parameters=False),
            seed_layout(method),
            sends.pack(method.state_dict()),
            server_books.kinds_of(method) if policy.codebook != "local" else {},
            method.remarks,
            method.alarm,
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
    alarms: int = 0  # collapsed rounds running
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)  # what the server optimizer steps
    books: Books = field(default_factory=lambda: Books({}, {}))

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
        books = Books.start(blueprint.books, saved.tensors if saved is not None else {})
        server = cls(arm, uuid.uuid4().hex, blueprint, flat, optimizer, parameters=steps, books=books)
        if saved is not None:
            server.lineage, server.round = str(saved.facts["lineage"]), int(saved.facts["round"])
            server.norms, server.alarms = [float(norm) for norm in saved.facts["norms"]], int(saved.facts["alarms"])
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
            "alarms": self.alarms,
        }
        return Checkpoint(tensors | state | self.books.checkpoint(), facts)

    def tensors(self) -> Tensors:
        return self.blueprint.sends.unpack(self.flat)

    def step(self, aggregate: Flat) -> None:
        """Parameters take the aggregate, or step towards it through the server optimizer (gradient = −change).

        Momentum encoders are averages already and take theirs as it is.
        """
        with torch.no_grad():
            for group in aggregate.keys() - self.parameters.keys():
                self.flat[group][:] = aggregate[group]
            for group, parameter in self.parameters.items():
                if self.optimizer is None:
                    parameter.copy_(torch.from_numpy(aggregate[group]))
                else:
                    parameter.grad = parameter.detach() - torch.from_numpy(aggregate[group])
            if self.optimizer is not None:
                self.optimizer.step()

    def get_books(self) -> dict[str, Book]:
        tensors = self.tensors()
        return {n: Book(tensors[f"{n}.counts"].double(), tensors[f"{n}.sums"].double()) for n in self.books.kinds}

    def set_books(self, books: Mapping[str, Book]) -> None:
        tensors = self.tensors()
        for name, book in books.items():
            tensors[f"{name}.counts"].copy_(book.counts)
            tensors[f"{name}.sums"].copy_(book.sums)

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
    server.round += 1
    told = _take_sums(study, server, updates, weights, parts, server.round)
    server.norms = (server.norms + [update.norm for update in updates])[-1000:]
    federation.folder.write(_events(server, updates, weights, told, time.perf_counter() - began))


def refresh(federation: Federation, server: Server, sites: Sequence[Enrolled]) -> None:
    """Norm statistics and codebooks under the final weights, over all sites, and the monitors of the final encoder."""
    updates = _ask(REFRESH, federation, server, sites, server.blueprint.sums)
    told = _take_sums(federation.study, server, updates, (), server.blueprint.sums, 0)
    monitors = [
        (update.site, name, value)
        for update in updates
        for name, value in update.metrics.items()
        if name.startswith("monitor/")
    ]
    federation.folder.write(
        Event("refresh", server.arm, server.round, site, name, value) for site, name, value in (*monitors, *told)
    )


def seed_codebooks(federation: Federation, server: Server, sites: Sequence[Enrolled]) -> None:
    """The first codebooks: every site's own centres, clustered on the server, then Lloyd's steps on plain sums."""
    if not server.books.kinds:
        return
    updates = _ask(SEED, federation, server, sites, server.blueprint.seeds)
    server.set_books(server_books.first(server.books.kinds, updates, server.blueprint.seeds, federation.study.seed))
    for _ in range(LLOYD):
        updates = _ask(REFRESH, federation, server, sites, server.blueprint.sums)
        server.set_books(server_books.lloyd(server.get_books(), updates, server.blueprint.sums, federation.study.seed))
    images = 2 * federation.study.training.batch_size * len(sites)  # of one step everywhere, both views
    books = server.get_books()
    server.set_books({n: book.scaled(images * server.books.kinds[n].tokens) for n, book in books.items()})


def join_codebooks(federation: Federation, server: Server, members: int, joined: Sequence[Enrolled]) -> None:
    """Codes for the tokens of sites that come late: theirs and the present ones as points, clustered to as many.

    Args:
        members: sites so far.
    """
    if not server.books.kinds or not joined:
        return
    layout = server.blueprint.seeds
    updates = _ask(SEED, federation, server, joined, layout)
    server.set_books(server_books.joined(server.get_books(), members, updates, layout, federation.study.seed))
    server.books = Books.start(server.books.kinds, {})  # an index means another code now


def _ask(kind: str, federation: Federation, server: Server, sites: Sequence[Enrolled], answers: Layout) -> list[Update]:
    """Sums under the present state, without training: `answers` is what each reply holds."""
    order = order_of(federation.study, server, server.round, 1)
    request = Request(kind, order, server.blueprint.sends, server.flat, answers, answers.digest, trains=False)
    return collect(federation, request, sites)


def _take_sums(
    study: Study, server: Server, updates: Sequence[Update], weights: Sequence[float], layout: Layout, number: int
) -> list[tuple[str, str, float]]:
    """Set what follows from the sums of the refresh pass; (site, name, value) of what they tell.

    Args:
        weights: of the sites; none needed for a refresh pass alone.
        number: of the round; 0: a refresh pass alone.
    """
    sums = _sum_statistics(updates, layout)
    server.set_moments(sums)
    told = list(server_books.round_of(server.books, server.tensors(), updates, weights, layout, study, number))
    return told + features.told(updates, layout)


def stop_if_collapsed(study: Study, server: Server) -> None:
    """
    Raises:
        DivergedError: the embeddings collapsed in two rounds running and rounds.on_collapse=stop.
    """
    if server.alarms >= CONFIRMED and study.rounds.on_collapse == "stop":
        raise DivergedError(
            f"arm '{server.arm}', round {server.round}: the embeddings have collapsed, {server.alarms} rounds running "
            "(see the remarks in metrics.jsonl). Lower training.optimizer.lr, raise training.batch_size, or go on with "
            "rounds.on_collapse=warn resume=true."
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
    """Each group of weights over the sites that own it; a group that no site owns stays as it is."""
    aggregate: Flat = {}
    for group, slots in server.blueprint.sends.groups.items():
        if slots[0].role not in (Role.PARAMETER, Role.TARGET):
            continue
        held = [(u.flat[group], w) for u, w in zip(updates, weights, strict=True) if group in u.flat]
        before = rules.Before(server.flat[group], [(s.offset, s.size) for s in slots if len(s.shape) > 1])
        aggregate[group] = rule([f for f, _ in held], [w for _, w in held], before) if held else server.flat[group]
    return aggregate


def _sum_statistics(updates: Sequence[Update], layout: Layout) -> Tensors:
    """Plain sums over the sites of the norms' inputs, in the order of their names."""
    total: Tensors = {}
    for update in updates:
        owned = tuple(slot for slot in layout.of_role(Role.NORM_MOMENTS).slots if slot.group in update.flat)
        for name, tensor in Layout(owned).unpack(update.flat).items():
            total[name] = total[name] + tensor if name in total else tensor.clone()
    return total


def _events(
    server: Server,
    updates: Sequence[Update],
    weights: Sequence[float],
    told: Sequence[tuple[str, str, float]],
    seconds: float,
) -> list[Event]:
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
    rows += [event(site, name, value) for site, name, value in told]
    terms = {name.removeprefix("loss/"): value for name, value in means.items() if name.startswith("loss/")}
    remarks = [*server.blueprint.remarks(terms), *_index_alarms(told)]
    if collapse := server.blueprint.alarm(terms):
        remarks.append(f"collapsed: {collapse}")
    server.alarms = server.alarms + 1 if collapse else 0
    return rows + [Event("pretrain", server.arm, server.round, "", "remark", 1.0, text) for text in remarks]


def _index_alarms(told: Sequence[tuple[str, str, float]]) -> list[str]:
    return [
        f"site '{site}' answers with other code indices than the broadcast ones ({name}: {value:.0%} of its tokens). "
        "Check its release and its data."
        for site, name, value in told
        if name.endswith("/index_alarm") and value > 0
    ]
