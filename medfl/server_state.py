"""One arm's state on the server: the global weights, what steps them, and what a checkpoint holds of it."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from medfl import conduct, config, server_books
from medfl.checkpoint import Checkpoint, load_optimizer, optimizer_tensors
from medfl.codebooks import Book
from medfl.errors import ConfigError
from medfl.layout import Flat, Layout, Policy, Tensors, broadcast_layout, seed_layout, update_layout
from medfl.methods.moments import pool
from medfl.methods.phases import phases_of
from medfl.server_books import Books, Kind
from medfl.study import Study
from medfl.workshop import new_method


@dataclass(frozen=True)
class Blueprint:
    """What the server knows of the method: layouts and initial tensors. It never trains."""

    sends: Layout
    answers: Layout
    sums: Layout
    seeds: Layout
    initial: Flat
    books: Mapping[str, Kind]  # the codebooks that travel
    phases: Mapping[str, float]
    needs: Mapping[str, str]  # phase -> owner group of the sites that take part
    enter: Callable[[str], None]  # the phase that remarks and alarm speak of
    remarks: Callable[[Mapping[str, float]], list[str]]
    alarm: Callable[[Mapping[str, float]], str]

    @classmethod
    def of(cls, study: Study) -> "Blueprint":
        method = new_method(study)
        policy = Policy.of(method, study.rounds)
        sends = broadcast_layout(method, policy)
        phases_of(method.phases, study.rounds.count)  # refuses too few rounds before the first one
        return cls(
            sends,
            update_layout(method, policy),
            update_layout(method, policy, parameters=False),
            seed_layout(method),
            sends.pack(method.state_dict()),
            server_books.kinds_of(method) if policy.codebook != "local" else {},
            method.phases,
            method.needs,
            method.enter,
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
    parent: str = ""  # lineage of what it started from
    earlier: conduct.Earlier = field(default_factory=dict)  # samples of the sites' last updates

    @classmethod
    def start(
        cls, study: Study, arm: str, blueprint: Blueprint, saved: Checkpoint | None, *, parent: str = ""
    ) -> "Server":
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
        server = cls(arm, uuid.uuid4().hex, blueprint, flat, optimizer, parameters=steps, books=books, parent=parent)
        if saved is not None:
            server.lineage, server.round = str(saved.facts["lineage"]), int(saved.facts["round"])
            server.parent = str(saved.facts["parent"])
            server.norms, server.alarms = [float(norm) for norm in saved.facts["norms"]], int(saved.facts["alarms"])
            server.earlier = conduct.of_tensors(saved.tensors)
            if optimizer is not None:
                load_optimizer(optimizer, saved.tensors)
        return server

    def checkpoint(self) -> Checkpoint:
        tensors = {group: torch.from_numpy(array) for group, array in self.flat.items()}
        state = optimizer_tensors(self.optimizer) if self.optimizer is not None else {}
        facts = {
            "arm": self.arm,
            "lineage": self.lineage,
            "parent": self.parent,
            "layout": self.blueprint.sends.digest,
            "norms": self.norms,
            "alarms": self.alarms,
        }
        return Checkpoint(tensors | state | self.books.checkpoint() | conduct.to_tensors(self.earlier), facts)

    def tensors(self) -> Tensors:
        return self.blueprint.sends.unpack(self.flat)

    def step(self, aggregate: Flat) -> None:
        """Parameters take the aggregate, or step towards it through the server optimizer (gradient = −change).

        Momentum encoders are averages already and take theirs as it is. What is not in the aggregate stays.
        """
        with torch.no_grad():
            for group in aggregate.keys() - self.parameters.keys():
                self.flat[group][:] = aggregate[group]
            for group, parameter in self.parameters.items():
                parameter.grad = None  # an optimizer leaves such a parameter alone
                if group not in aggregate:
                    continue
                if self.optimizer is None:
                    parameter.copy_(torch.from_numpy(aggregate[group]))
                else:
                    parameter.grad = parameter.detach() - torch.from_numpy(aggregate[group])
            if self.optimizer is not None:
                self.optimizer.step()

    def begin_phase(self, study: Study, phase: str) -> None:
        """What the method changes of the global weights before the first round of a phase."""
        method = new_method(study)
        method.load_state_dict(self.tensors(), strict=False)
        method.start_phase(phase)
        self.blueprint.sends.pack(method.state_dict(), into=self.flat)
        self.norms = []  # other weights move, by other lengths

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
