"""A site: its data, its method, and the state that stays on its disk. What runs when a message arrives."""

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context
from torch import Tensor

from medfl import config, seeding, site_books
from medfl.checkpoint import load_optimizer, optimizer_tensors
from medfl.data.sample import SiteData
from medfl.data.sites import pool
from medfl.errors import ConfigError
from medfl.evaluation import collapse
from medfl.evaluation.at_site import probe
from medfl.layout import (
    Flat,
    Layout,
    Policy,
    Tensors,
    broadcast_layout,
    pooled_norms,
    seed_layout,
    study_claims,
    traveling,
    update_layout,
)
from medfl.messages import Answer, Broadcast, Order
from medfl.methods.base import Method, Role
from medfl.methods.moments import Moments
from medfl.methods.tokens import CodeStatistics, TokenSample
from medfl.models.quantizer import CodeSums
from medfl.site_weights import Blend, keep_targets, place_targets
from medfl.state import SiteState
from medfl.study import Study
from medfl.training import Device, Plan, Task, Views, train_locally

CENTRAL = "central"
STAYS = (Role.LOCAL, Role.QUEUE)
SEED_TOKENS = 64  # per image and codebook, for the k-means before the first round


@dataclass(frozen=True)
class Workshop:
    """What all sites of one process share: the method with its seeded start, the views, and the device."""

    study: Study
    method: Method
    views: Views
    where: Device
    initial: Tensors  # the tensors that no broadcast brings
    staying: tuple[str, ...]  # those of them that must outlive the round
    norms: tuple[str, ...]  # batch norms whose sums are sent
    policy: Policy
    sends: Layout
    answers: Layout
    sums: Layout
    blend: Blend
    packed: Flat  # where an answer is packed; written anew by each, so it is sent before the next is made


def new_method(study: Study) -> Method:
    """The method as every participant builds it: initial weights are a function of the study's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key(study.seed, "init"))
        method = config.build(study.method)
    if not isinstance(method, Method):
        raise ConfigError(f"method: {study.method.get('_target_')!r} is not a Method. Choose one of configs/method/.")
    return method


@functools.lru_cache(maxsize=2)
def workshop(source: str) -> Workshop:
    """Built once per process and study, and reused for every site and round."""
    study = config.parse(source)
    torch.set_num_threads(study.training.threads)
    plan = study.training
    where = Device.choose(plan.device, plan.precision, plan.channels_last)
    if where.bf16 and where.device.type == "cpu" and int(study.data["spatial_dims"]) == 3:
        raise ConfigError(
            "training.precision=bf16: torch's Conv3d gives wrong gradients in bfloat16 on a CPU. Take fp32 or auto."
        )
    method = new_method(study).to(where.device)
    if where.channels_last:
        method.to(memory_format=where.memory_format(int(study.data["spatial_dims"])))  # type: ignore[call-overload]
    policy = Policy.of(method, study.rounds)
    claims, brought = study_claims(method, policy), traveling(policy)
    initial = {
        name: tensor.clone()
        for name, tensor in method.state_dict().items()
        if claims[name].role not in (*brought, Role.FIXED, Role.TARGET)
    }
    # counters of batch norm are recomputed and need not outlive the round
    staying = tuple(n for n, t in initial.items() if claims[n].role in STAYS and t.is_floating_point())
    answers = update_layout(method, policy)
    blended = [name for name, claim in claims.items() if claim.role is Role.PARAMETER]
    return Workshop(
        study,
        method,
        config.build(study.views),
        where,
        initial,
        staying,
        tuple(pooled_norms(method, policy.norm)),
        policy,
        broadcast_layout(method, policy),
        answers,
        update_layout(method, policy, parameters=False),
        Blend(study.rounds.blend, study.rounds.blend_tau, blended),
        answers.empty(),
    )


@functools.lru_cache(maxsize=2)
def simulated_sites(data: str, sites: str, seed: int) -> tuple[SiteData, ...]:
    """All sites of a simulation, from the JSON of the nodes `data` and `sites`."""
    return tuple(config.build(json.loads(sites)).partition(config.build(json.loads(data)).load(), seed))


def sites_of(study: Study) -> tuple[SiteData, ...]:
    return simulated_sites(json.dumps(dict(study.data)), json.dumps(dict(study.sites)), study.seed)


@functools.lru_cache(maxsize=64)
def open_site(source: str, partition: int) -> "Site":
    shop = workshop(source)
    sites = sites_of(shop.study)
    if partition > len(sites):
        raise ConfigError(f"partition-id={partition}: the study has {len(sites)} sites, need 0 to {len(sites)}.")
    return Site(shop, pool(sites) if partition == len(sites) else sites[partition])


class Site:
    """One institution in one study."""

    def __init__(self, shop: Workshop, data: SiteData) -> None:
        self.shop, self.data = shop, data
        self.images = _resident(data.train.images, shop.where)

    @classmethod
    def for_message(cls, source: str, context: Context) -> "Site":
        return open_site(source, int(str(context.node_config["partition-id"])))

    def describe(self, order: Order) -> Answer:
        """How many volumes it has, and whether it takes part in training."""
        splits = {"train": self.data.train, "val": self.data.val, "test": self.data.test}
        metrics = {f"site/{name}": len(split.images) for name, split in splits.items()}
        facts = {"held_out": "yes" if self.data.held_out else "no", "owners": ""}
        return Answer(self.data.name, order.nonce, order.layout, metrics, facts=facts)

    def train(self, broadcast: Broadcast) -> Answer:
        """One round: refresh pass under the broadcast weights, then local training."""
        began, order, shop = time.perf_counter(), broadcast.order, self.shop
        method, rounds, state = shop.method, shop.study.rounds, self._state(order)
        kept = state.before(order.round)
        self._load(broadcast, kept)
        self._start_own_books()
        sums, monitors, codes = self._refresh()
        share, blending = shop.blend.apply(method, kept)
        prior, start = site_books.take_prior(method, 2 * self._batch_size()), shop.blend.start(method)
        losses, moments = self._learn(order, kept)
        state.save(order.round, self._staying() | blending | shop.blend.keep(method, start) | moments)
        if shop.policy.codebook in ("split_prior", "mean"):
            sums |= site_books.trained(
                method, prior, codes, mode=shop.policy.codebook, steps=order.steps, least=rounds.codebook_images
            )
        metrics: dict[str, float | int] = {f"loss/{name}": value for name, value in losses.items()}
        metrics |= monitors | {
            "site/volumes": min(len(self.images), order.steps * shop.study.training.batch_size),
            "site/steps": order.steps,
            "site/seconds": time.perf_counter() - began,
        }
        if shop.blend.form != "none":
            metrics["site/kept_share"] = share
        flat = shop.answers.pack({**method.state_dict(), **sums}, into=shop.packed)
        return Answer(self.data.name, order.nonce, shop.answers.digest, metrics, flat)

    def _learn(self, order: Order, kept: Tensors) -> tuple[dict[str, float], Tensors]:
        """The round's steps; mean terms, and the optimizer's state if it outlives the round."""
        shop = self.shop
        optimizer = config.build(shop.study.training.optimizer, parameters=shop.method.trainable())
        keep = shop.study.training.optimizer_state == "keep"
        if keep:
            load_optimizer(optimizer, kept)
        task = Task(self.images, self.data.train.labels, shop.views)
        losses = train_locally(shop.method, task, optimizer, self._plan(order), shop.where)
        return losses, optimizer_tensors(optimizer) if keep else {}

    def seed_codebooks(self, broadcast: Broadcast) -> Answer:
        """Before the first round: this site's own k-means of its tokens, as masses and sums of its centres."""
        order, method = broadcast.order, self.shop.method
        self._load(broadcast, self._state(order).before(order.round + 1))
        layout = seed_layout(method)
        found = self._seeds(least=self.shop.study.rounds.codebook_images)
        metrics = {"site/volumes": len(self.images), "site/steps": 1}
        return Answer(self.data.name, order.nonce, layout.digest, metrics, layout.pack(found))

    def refresh(self, broadcast: Broadcast) -> Answer:
        """The refresh pass alone: plain sums under the weights sent along."""
        order, layout = broadcast.order, self.shop.sums
        self._load(broadcast, self._state(order).before(order.round + 1))
        self._start_own_books()
        sums, monitors, _ = self._refresh()
        metrics = monitors | {"site/volumes": len(self.images), "site/steps": 1}
        return Answer(self.data.name, order.nonce, layout.digest, metrics, layout.pack(sums))

    def evaluate(self, broadcast: Broadcast) -> Answer:
        """Probes on the frozen encoder, with this site's own labels; only the scores leave."""
        order, shop = broadcast.order, self.shop
        self._load(broadcast, self._state(order).before(order.round + 1))
        shop.method.eval()
        metrics = probe(shop.method, self.data, shop.study.evaluation, shop.where.device, seed=shop.study.seed)
        return Answer(self.data.name, order.nonce, order.layout, metrics)

    def _plan(self, order: Order) -> Plan:
        training = self.shop.study.training
        return Plan(
            self.shop.study.seed, self.data.name, order.round, order.rounds, order.steps,
            training.batch_size, training.warmup,
        )  # fmt: skip

    def _state(self, order: Order) -> SiteState:
        return SiteState(Path(self.shop.study.state_dir), order.lineage, self.data.name)

    def _load(self, broadcast: Broadcast, kept: Tensors) -> None:
        """Broadcast tensors, then what the site kept; what it never kept starts as the study's seed made it."""
        method, layout = self.shop.method, self.shop.sends
        if broadcast.order.layout != layout.digest:
            raise ConfigError(
                f"site '{self.data.name}': the server's model has layout {broadcast.order.layout[:12]}, "
                f"this site's has {layout.digest[:12]}. Install the same medfl release and study on both."
            )
        own = {name: kept.get(name, tensor) for name, tensor in self.shop.initial.items()}
        method.load_state_dict({**layout.unpack(broadcast.flat), **own}, strict=False)
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
        return [part.to(self.images.device) for part in _batches(chosen, self.shop.study.training.batch_size)]

    @torch.no_grad()
    def _refresh(self) -> tuple[Tensors, dict[str, float], dict[str, CodeSums]]:
        """One pass without gradient over the sample: what is sent of its sums, monitors, and the whole code sums.

        Norms use batch statistics, as in training, so that no layer's sums depend on statistics of older weights.
        """
        method, parts = self.shop.method, self._parts()
        method.train()
        with self.shop.where.autocast():
            with Moments(method) as moments, CodeStatistics(method) as codes:
                plain = torch.cat([method.observe(self._batch(part), 0.0) for part in parts]).float()
            with Moments(method):  # leaves the running statistics alone; these sums are not used
                views = torch.cat([method.encoder(self._view(part)) for part in parts]).float()
        found = collapse.monitors(plain.cpu(), views.cpu())
        sums = self._norm_sums(moments) | self._feature_sums(plain)
        if self.shop.policy.codebook != "local":
            sums |= site_books.refreshed(codes.sums, self.shop.study.rounds.codebook_images)
        return sums, {f"monitor/{name}": value for name, value in found.items()}, codes.sums

    def _batch(self, part: Tensor) -> Tensor:
        layout = self.shop.where.memory_format(self.images.ndim - 2)
        return self.images[part].to(self.shop.where.device).contiguous(memory_format=layout)

    def _view(self, part: Tensor) -> Tensor:
        key = seeding.key(self.shop.study.seed, "monitor", self.data.name, int(part[0]))
        layout = self.shop.where.memory_format(self.images.ndim - 2)
        return self.shop.views(self._batch(part), key=key)[0].contiguous(memory_format=layout)

    def _feature_sums(self, features: Tensor) -> Tensors:
        """Count, sum and Σzzᵀ of the features at unit length (N, F), for the coding rate of all sites together."""
        if not self.shop.policy.gram:
            return {}
        count, total, gram = collapse.sums(torch.nn.functional.normalize(features.double(), dim=1))
        return {
            "features.count": torch.tensor([count], dtype=torch.float64),
            "features.sum": total.cpu(),
            "features.gram": gram.cpu(),
        }

    def _norm_sums(self, moments: Moments) -> Tensors:
        sums: Tensors = {}
        for name in self.shop.norms:
            count, total, square = moments.sums[name]
            sums |= {
                f"{name}.count": torch.full_like(total, count),
                f"{name}.sum": total,
                f"{name}.square": square,
            }
        return {name: tensor.double().cpu() for name, tensor in sums.items()}


def _batches(chosen: Tensor, size: int) -> list[Tensor]:
    """Parts of `size`; a last part of one image joins the one before, since batch statistics need two."""
    parts = list(torch.split(chosen, size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _resident(images: Tensor, where: Device) -> Tensor:
    """The images on the device if they take less than a third of its free memory, else in pinned host memory."""
    if where.device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(where.device)
    return images.to(where.device) if images.nbytes < free / 3 else images.pin_memory()
