"""A sum over sites that hold given numbers: the real exchanges, gates and steps, without data or training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from medfl import egress
from medfl.carriers import FIRST_NODE, InProcessGrid
from medfl.enrolment import Enrolled, Federation
from medfl.exchange import Request, collect
from medfl.gate import Update
from medfl.layout import Flat, Layout
from medfl.messages import PRETRAIN, Answer, Broadcast, Order
from medfl.methods.base import Claim, Role
from medfl.mods import always_reply
from medfl.rules import site_weights
from medfl.run_folder import RunFolder
from medfl.secagg import at_site
from medfl.secagg.at_server import collect_sum
from medfl.study import Study
from tests.federation.small import small_study

WEIGHTS, SUMS = "parameter/all/float32", "norm_moments/all/float64"
SOME, SOME_OWN = "parameter/modality:t1/float32", "codebook/modality:t1/float64"
STEPS = ("keys", "shares", "pretrain", "unmask")
Site = Any  # what `at_site` reads of a Site


class LossyGrid(InProcessGrid):
    """Some replies never come; all that come are kept."""

    def __init__(self, client: ClientApp, sites: int) -> None:
        super().__init__(client, sites)
        self.lost: set[tuple[str, int]] = set()  # (step, site)
        self.received: list[tuple[str, int, Message]] = []

    def deliver(self, message: Message) -> Message:
        step, site = message.metadata.message_type.partition(".")[2], message.metadata.dst_node_id - FIRST_NODE
        if (step, site) in self.lost:
            return Message(Error(code=7, reason="lost on its way"), reply_to=message)
        reply = super().deliver(message)
        self.received.append((step, site, reply))
        return reply


@dataclass
class Sites:
    """Sites by number, their numbers, and the server's side of them."""

    study: Study
    layout: Layout
    before: Flat
    values: list[Flat]
    owners: list[tuple[str, ...]]
    members: list[Site] = field(default_factory=list)

    def __post_init__(self) -> None:
        shop = SimpleNamespace(study=self.study, answers=self.layout, sums=Layout(()))
        for number, owners in enumerate(self.owners):
            own = self.layout.owned(owners)
            self.members.append(
                SimpleNamespace(
                    shop=shop, data=SimpleNamespace(name=f"site-{number}"), holdings=dict.fromkeys(owners, 10),
                    leaves={"pretrain": own}.get, number=number,
                )
            )  # fmt: skip
        self.grid = LossyGrid(self.app(), len(self.values))
        folder = RunFolder.create(Path(self.study.run_dir), self.study.source, resume=True)
        self.federation = Federation(self.grid, self.study, folder)
        self.enrolled = [
            Enrolled(FIRST_NODE + at, site.data.name, 10 + at, False, dict.fromkeys(site.holdings, 10 + at))
            for at, site in enumerate(self.members)
        ]

    def app(self) -> ClientApp:
        app = ClientApp(mods=[always_reply])
        acts = {"keys": at_site.offer, "shares": at_site.share, "pretrain": self.train, "unmask": at_site.unmask}
        for kind, act in acts.items():
            register = app.train if kind == "pretrain" else app.query

            def answer(message: Message, context: Context, kind: str = kind, act: at_site.Act = act) -> Message:
                site = self.members[int(str(context.node_config["partition-id"]))]
                made, layout = at_site.answered(site, kind, Broadcast.from_record(message.content), act)
                egress.check(made, layout)
                return Message(made.to_record(), reply_to=message)

            register(kind)(answer)
        return app

    def train(self, site: Site, broadcast: Broadcast) -> Answer:
        metrics = {"site/volumes": 10 + site.number, "site/steps": 1}
        flat = {group: self.values[site.number][group] for group in self.layout.owned(tuple(site.holdings)).sizes}
        return Answer(site.data.name, broadcast.order.nonce, self.layout.digest, metrics, flat)

    def request(self, number: int = 1) -> Request:
        order = Order("study", uuid4().hex, "federated", "pretrain", number, 3, 1, self.layout.digest, uuid4().hex)
        sends = self.layout.of_role(Role.PARAMETER)
        return Request(PRETRAIN, order, sends, self.before, self.layout, self.layout.digest, trains=True)

    def weigh(self, names: list[str]) -> Mapping[str, Mapping[str, float]]:
        found = {}
        for group, slots in self.layout.groups.items():
            if group.startswith("parameter/"):
                held = {s.name: s.volumes for s in self.enrolled if s.name in names and s.share(slots[0].owner)}
                found[group] = dict(zip(held, site_weights(list(held.values()), 0.5), strict=True))
        return found

    def summed(self, request: Request | None = None) -> Update:
        return collect_sum(self.federation, request or self.request(), self.enrolled, self.weigh)[1]

    def plain(self) -> list[Update]:
        return collect(self.federation, self.request(), self.enrolled)

    def expected(self, present: set[int]) -> dict[str, np.ndarray]:
        """The means and sums over some sites in float64, by plain loops."""
        weights = self.weigh([site.name for site in self.enrolled])
        found = {}
        for group in self.layout.sizes:
            owner = self.layout.groups[group][0].owner
            those = [at for at in sorted(present) if not owner or owner in self.owners[at]]
            shares = [weights[group][f"site-{at}"] if group in weights else 1.0 for at in those]
            total = sum(w * self.values[at][group].astype(np.float64) for at, w in zip(those, shares, strict=True))
            found[group] = total / sum(shares) if group in weights else total
        return found


def sites_of(folder: Path, *overrides: str, count: int = 8, size: int = 1000, active: bool = True) -> Sites:
    """Sites of random numbers; all but the first two own a group of their own beside what all have."""
    draw = np.random.default_rng(0)
    parts = {
        "a.weight": (Claim(Role.PARAMETER), size, "float32"),
        "b.weight": (Claim(Role.PARAMETER, "modality:t1"), size // 4, "float32"),
        "c.residuals": (Claim(Role.CODEBOOK, "modality:t1"), size // 8, "float64"),
        "d.tokens": (Claim(Role.NORM_MOMENTS), size // 8, "float64"),
    }
    layout = Layout.of((name, claim, (length,), dtype) for name, (claim, length, dtype) in parts.items())
    before = {
        group: draw.standard_normal(size).astype(np.float32)
        for group, size in layout.sizes.items()
        if group.startswith("parameter/")
    }
    values = []
    for _ in range(count):
        drawn: Flat = {group: draw.standard_normal(size) * 1e6 for group, size in layout.sizes.items()}
        drawn |= {group: (old + draw.standard_normal(old.size) / 10).astype(old.dtype) for group, old in before.items()}
        values.append(drawn)
    owners = [() if at < 2 else ("modality:t1",) for at in range(count)]
    study = small_study(
        folder, f"secagg.active={str(active).lower()}", "arms=[federated]", "rounds.quorum=0.1", *overrides
    )
    return Sites(study, layout, before, values, owners)
