"""A site: its data, its method, and the state that stays on its disk. What runs when a message arrives."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from medfl import config, seeding, site_books, site_queues, site_synthesis, site_task, site_wire
from medfl.checkpoint import load_optimizer, optimizer_tensors
from medfl.data.sample import SiteData
from medfl.data.sites import pool
from medfl.errors import ConfigError, PolicyError
from medfl.evaluation import collapse
from medfl.layout import Layout, Tensors, seed_layout
from medfl.messages import Answer, Broadcast, Order
from medfl.methods.moments import Moments
from medfl.methods.phases import Phase, phase_of
from medfl.methods.tokens import CodeStatistics, TokenSample
from medfl.models.quantizer import CodeSums
from medfl.optimizers import scale_rates
from medfl.privacy.at_site import Guard
from medfl.site_scores import tallies, tallies_layout
from medfl.site_sums import feature_sums, norm_sums
from medfl.site_weights import keep_targets, place_targets
from medfl.state import SiteState
from medfl.training import Plan, Task, batches, train_locally
from medfl.workshop import Workshop, sites_of, workshop

CENTRAL = "central"
SEED_TOKENS = 64  # per image and codebook, for the k-means before the first round


@functools.lru_cache(maxsize=64)
def open_site(source: str, partition: int) -> "Site":
    shop = workshop(source)
    sites = sites_of(shop.study)
    if partition > len(sites):
        raise ConfigError(f"partition-id={partition}: the study has {len(sites)} sites, need 0 to {len(sites)}.")
    members = sites[partition : partition + 1] or tuple(site for site in sites if not site.held_out)
    data = members[0] if partition < len(sites) else pool(sites)
    return Site(shop, data, {site.name: len(site.train) for site in members})


class Site:
    """One institution in one study."""

    def __init__(self, shop: Workshop, data: SiteData, members: Mapping[str, int]) -> None:
        """`members`: training images by site: this one, or in a simulation's place with all data, all of them."""
        self.shop, self.data, self.members = shop, data, members
        self.images = shop.where.resident(data.train.images)
        self.patients = site_queues.patient_codes(data.train.patients)
        self.holdings = shop.method.holdings(data.train.images, data.train.masks)
        self.answers, self.sums = (layout.owned(tuple(self.holdings)) for layout in (shop.answers, shop.sums))
        self.up = shop.up.owned(tuple(self.holdings))
        self.guard = Guard(shop.study, data.name, shop.method, self.patients) if shop.study.privacy.on else None

    def leaves(self, kind: str) -> Layout:
        """The tensors in the answer to a request of this kind, such as "pretrain"; all others answer with none."""
        if kind == "probe":
            return tallies_layout(self.shop.study.evaluation, self.data.exclusive)
        if kind == "codebook":
            return seed_layout(self.shop.method)
        return {"pretrain": self.up.coded, "finetune": self.up.coded, "refresh": self.sums}.get(kind, Layout(()))

    def describe(self, order: Order) -> Answer:
        """How many volumes it has, and whether it takes part in training."""
        metrics, facts = site_task.describe(self.data, self.holdings)
        return Answer(self.data.name, order.nonce, order.layout, metrics, facts=facts)

    def train(self, broadcast: Broadcast) -> Answer:
        """One round: refresh pass under the broadcast weights, then local training."""
        began, order, shop = time.perf_counter(), broadcast.order, self.shop
        method, rounds, state = shop.method, shop.study.rounds, self._state(order)
        phase = self._phase(order)
        method.enter(phase.name)
        kept, broadcast = self._kept(order, order.round), site_wire.opened(broadcast, shop.down, self.data.name)
        self._load(broadcast, kept)
        self._start_own_books()
        spent = self._book(order, trains=True)
        sums, monitors, codes = self._refresh()
        share, blending = shop.blend.apply(method, kept)
        self._begin_queues(order)
        prior, start = site_books.take_prior(method, 2 * self._batch_size()), shop.blend.start(method)
        losses, moments = self._learn(order, kept, phase)
        if shop.policy.codebook in ("split_prior", "mean"):
            sums |= site_books.trained(
                method, prior, codes, mode=shop.policy.codebook, steps=order.steps, least=rounds.codebook_images
            )
        packed = self.answers.pack({**method.state_dict(), **sums}, into=shop.packed)
        local, earlier = {g: packed[g] for g in self.answers.sizes}, kept if order.round > phase.first else {}
        flat, unsent = site_wire.closed(self.up, local, broadcast.flat, earlier)
        state.save(order.round, self._staying() | blending | shop.blend.keep(method, start) | moments | unsent)
        metrics: dict[str, float | int] = {f"loss/{name}": value for name, value in losses.items()}
        metrics |= monitors | spent
        metrics |= {
            "site/volumes": min(len(self.task.images), order.steps * shop.study.training.batch_size),
            "site/steps": order.steps,
            "site/seconds": time.perf_counter() - began,
        }
        if shop.blend.form != "none":
            metrics["site/kept_share"] = share
        return Answer(self.data.name, order.nonce, shop.up.digest, metrics, flat)

    def _phase(self, order: Order) -> Phase:
        """The phase of this round by this site's own study.

        Raises:
            ConfigError: the server is in another phase.
        """
        phase = phase_of(self.shop.method.phases, order.round, order.rounds)
        if order.phase != phase.name:
            raise ConfigError(
                f"site '{self.data.name}', round {order.round}: the server is in phase {order.phase!r}, the study says "
                f"{phase.name!r}. Install the same medfl release on both."
            )
        return phase

    def _learn(self, order: Order, kept: Tensors, phase: Phase) -> tuple[dict[str, float], Tensors]:
        """The round's steps; mean terms, and the optimizer's state if it outlives the round."""
        shop, method = self.shop, self.shop.method
        optimizer = config.build(shop.study.training.optimizer, parameters=method.trainable())
        rates = {id(parameter): method.rate(name) for name, parameter in method.named_parameters()}
        scale_rates(optimizer, lambda parameter: rates[id(parameter)])
        keep = shop.study.training.optimizer_state == "keep"
        if keep and order.round > phase.first:  # another phase steps other parameters
            load_optimizer(optimizer, kept)
        plan = self._plan(order, phase)
        if self.guard is None:
            losses = train_locally(method, self.task, optimizer, plan, shop.where)
        else:
            with self.guard.gradients(self.task, plan, shop.where) as gradients:
                losses = train_locally(method, self.task, optimizer, plan, shop.where, gradients)
        return losses, optimizer_tensors(optimizer) if keep else {}

    def _book(self, order: Order, *, trains: bool) -> dict[str, float]:
        """Under differential privacy: write down what this request releases, before anything is computed."""
        if self.guard is None:
            return {}
        releases = self.guard.of_codes() + (self.guard.of_training(self.task, order.steps) if trains else [])
        last = not trains or order.round == order.rounds
        return self.guard.book(releases, phase=order.phase, arm=order.arm, number=order.round, last=last)

    def synthesize(self, order: Order) -> Answer:
        """Synthetic images of this site's own, made and kept here."""
        shop = self.shop
        metrics = site_synthesis.make(shop.study, self.data, self.images, shop.views, shop.where)
        return Answer(self.data.name, order.nonce, order.layout, metrics)

    def seed_codebooks(self, broadcast: Broadcast) -> Answer:
        """Before the first round: this site's own k-means of its tokens, as masses and sums of its centres."""
        order, method = broadcast.order, self.shop.method
        if self.guard is not None:
            raise PolicyError("privacy: the first codebook is of drawn images, not of centres. Nothing was sent.")
        self._load(broadcast, self._kept(order))
        layout = seed_layout(method)
        found = self._seeds(least=self.shop.study.rounds.codebook_images)
        metrics = {"site/volumes": len(self.images), "site/steps": 1}
        return Answer(self.data.name, order.nonce, layout.digest, metrics, layout.pack(found))

    def refresh(self, broadcast: Broadcast) -> Answer:
        """The refresh pass alone: plain sums under the weights sent along."""
        order, digest = broadcast.order, self.shop.sums.digest
        self._load(broadcast, self._kept(order))
        self._start_own_books()
        spent = self._book(order, trains=False)
        sums, monitors, _ = self._refresh()
        metrics = monitors | spent | {"site/volumes": len(self.images), "site/steps": 1}
        return Answer(self.data.name, order.nonce, digest, metrics, self.sums.pack(sums))

    def evaluate(self, broadcast: Broadcast) -> Answer:
        """Scores with this site's own labels, and counts of its test images; pictures of them are kept here."""
        from medfl.evaluation import pictures  # seconds of imports, and a deployed site starts anew for each request
        from medfl.evaluation.at_site import probe

        order, shop = broadcast.order, self.shop
        self._load(broadcast, self._kept(order))
        shop.method.eval()
        plan, device = shop.study.evaluation, shop.where.device
        least = shop.study.training.label_least
        metrics, scores = probe(shop.method, self.data, plan, device, seed=shop.study.seed, least=least)
        if pictures.wanted(plan.pictures, order.arm, shop.study.arms):
            pictures.draw(shop.method, self.data, Path(shop.study.state_dir), device, arm=order.arm, plan=plan)
        flat = tallies(plan, scores, self.data.exclusive)
        return Answer(self.data.name, order.nonce, order.layout, metrics, flat)

    def _plan(self, order: Order, phase: Phase) -> Plan:
        training = self.shop.study.training
        return Plan(
            self.shop.study.seed, self.data.name, order.round, phase.rounds, order.steps,
            training.batch_size, training.warmup, training.schedule, phase.first - 1, training.parts,
        )  # fmt: skip

    @functools.cached_property
    def task(self) -> Task:
        """What this site trains on."""
        return site_task.build(self.shop, self.data, self.images, self.patients, self.members)

    @torch.no_grad()
    def _begin_queues(self, order: Order) -> None:
        """Queues as the round starts them; fresh keys are of one view of local images."""
        method, rounds, shop, task = self.shop.method.train(), self.shop.study.rounds, self.shop, self.task
        patients = self.patients if task.patients is None else task.patients  # of synthetic images too
        count, batch = len(task.images), min(len(task.images), shop.study.training.batch_size)
        wanted = site_queues.begin(
            method, mode=rounds.queue, age=rounds.queue_age, batch=batch, images=count, number=order.round
        )
        key = seeding.key(shop.study.seed, "queue", self.data.name, order.round)
        for part in site_queues.rows(count, wanted, batch=batch, key=key):
            if len(part) > 1:  # batch statistics need two
                view = task.batch(part, seeding.key(key, int(part[0])), shop.where, count=1)[0]
                with shop.where.autocast():
                    method.enqueue(view, patients[part].to(shop.where.device))

    def _kept(self, order: Order, before: int | None = None) -> Tensors:
        """What this site kept before a round (None: up to the order's own), or else of what the arm started from."""
        kept = self._state(order).before(order.round + 1 if before is None else before)
        if kept or not order.parent:
            return kept
        root = Path(self.shop.study.state_dir)
        return SiteState(root, order.parent, self.data.name).before(None)

    def _state(self, order: Order) -> SiteState:
        return SiteState(Path(self.shop.study.state_dir), order.lineage, self.data.name)

    def _load(self, broadcast: Broadcast, kept: Tensors) -> None:
        """Broadcast tensors, then what the site kept; what it never kept starts as the study's seed made it."""
        method, layout = self.shop.method, self.shop.sends
        site_wire.check(broadcast, layout.digest, self.data.name)
        own = {name: kept.get(name, tensor) for name, tensor in self.shop.initial.items()}
        site_wire.load(method.state_dict(), {**layout.unpack(broadcast.flat), **own})
        place_targets(method, self.shop.policy.target, kept)

    def _staying(self) -> Tensors:
        """What of the method outlives the round at this site alone."""
        state = self.shop.method.state_dict()
        return {n: state[n] for n in self.shop.staying} | keep_targets(self.shop.method, self.shop.policy.target)

    def _batch_size(self) -> int:
        return min(len(self.images), self.shop.study.training.batch_size)

    def _start_own_books(self) -> None:
        """Codebooks that never travel start from this site's own tokens."""
        books = self.shop.method.codebooks()
        if self.shop.policy.codebook == "local" and books and not all(book.ready for book in books.values()):
            found = self._seeds(least=1)
            for name, book in books.items():
                book.set(found[f"{name}.counts"], found[f"{name}.sums"])

    @torch.no_grad()
    def _seeds(self, *, least: int) -> Tensors:
        method = self.shop.method.train()
        draw = seeding.generator(self.shop.study.seed, "codebook", self.data.name)
        with TokenSample(method, most=SEED_TOKENS, generator=draw) as sample, Moments(method):
            for part in self._parts():
                method.observe(self._batch(part), 0.0)
        return site_books.seeds(method, sample.tokens(), least=least, seed=draw)

    def _parts(self) -> list[Tensor]:
        """The training images of the refresh pass, in batches: a fixed sample."""
        draw = seeding.generator(self.shop.study.seed, "refresh", self.data.name)
        chosen = torch.randperm(len(self.images), generator=draw)[: self.shop.study.rounds.refresh_volumes]
        return batches(chosen, self.shop.study.training.batch_size)

    @torch.no_grad()
    def _refresh(self) -> tuple[Tensors, dict[str, float], dict[str, CodeSums]]:
        """One pass without gradient over the sample: what is sent of its sums, monitors, and the whole code sums.

        Norms use batch statistics, as in training, so that no layer's sums depend on statistics of older weights.
        """
        if self.guard is not None:
            return self.guard.codes(self.images, self.shop.where), {}, {}
        method, parts = self.shop.method, self._parts()
        method.train()
        with self.shop.where.autocast():
            with Moments(method) as moments, CodeStatistics(method) as codes:
                plain = torch.cat([method.observe(self._batch(part), 0.0) for part in parts]).float()
            with Moments(method):  # leaves the running statistics alone; these sums are not used
                views = torch.cat([method.encoder(self._view(part)) for part in parts]).float()
        found = collapse.monitors(plain.cpu(), views.cpu())
        sums = norm_sums(moments, self.shop.norms) | (feature_sums(plain) if self.shop.policy.gram else {})
        if self.shop.policy.codebook != "local":
            sums |= site_books.refreshed(codes.sums, self.shop.study.rounds.codebook_images)
        return sums, {f"monitor/{name}": value for name, value in found.items()}, codes.sums

    def _batch(self, part: Tensor) -> Tensor:
        layout = self.shop.where.memory_format(self.images.ndim - 2)
        return self.shop.where.of(self.images, part).contiguous(memory_format=layout)

    def _view(self, part: Tensor) -> Tensor:
        key = seeding.key(self.shop.study.seed, "monitor", self.data.name, int(part[0]))
        layout = self.shop.where.memory_format(self.images.ndim - 2)
        with torch.autocast(self.shop.where.device.type, enabled=False):  # places of voxels are no matter of bf16
            made = self.shop.views(self._batch(part), key=key, count=1)[0]
        return made.contiguous(memory_format=layout)
