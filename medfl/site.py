"""A site: its data, its method, and the state that stays on its disk. What runs when a message arrives."""

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context
from torch import Tensor

from medfl import config, seeding
from medfl.checkpoint import load_optimizer, optimizer_tensors
from medfl.data.sample import SiteData
from medfl.data.sites import pool
from medfl.errors import ConfigError
from medfl.evaluation import collapse
from medfl.evaluation.at_site import probe
from medfl.layout import Layout, Tensors, broadcast_layout, pooled_norms, study_claims, update_layout
from medfl.messages import Answer, Broadcast, Order
from medfl.methods.base import Method, Role
from medfl.methods.moments import Moments
from medfl.state import SiteState
from medfl.study import Study
from medfl.training import Device, Plan, Task, Views, train_locally

CENTRAL = "central"
STAYS = (Role.LOCAL, Role.QUEUE)


@dataclass(frozen=True)
class Workshop:
    """What all sites of one process share: the method with its seeded start, the views, and the device."""

    study: Study
    method: Method
    views: Views
    where: Device
    initial: Tensors  # the tensors that no broadcast brings
    sends: Layout
    answers: Layout

    @property
    def norm(self) -> str:
        return self.study.rounds.norm


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
    method = new_method(study).to(where.device)
    if where.channels_last:
        method.to(memory_format=where.memory_format(int(study.data["spatial_dims"])))  # type: ignore[call-overload]
    claims = study_claims(method, study.rounds.norm)
    travels = {slot.name for slot in broadcast_layout(method, study.rounds.norm).slots}
    initial = {
        name: tensor.clone()
        for name, tensor in method.state_dict().items()
        if name not in travels and claims[name].role is not Role.FIXED
    }
    return Workshop(
        study,
        method,
        config.build(study.views),
        where,
        initial,
        broadcast_layout(method, study.rounds.norm),
        update_layout(method, study.rounds.norm),
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
        state = self._state(order)
        kept = state.before(order.round)
        self._load(broadcast, shop.sends, kept)
        sums, monitors = self._refresh()
        optimizer = config.build(shop.study.training.optimizer, parameters=shop.method.trainable())
        keep = shop.study.training.optimizer_state == "keep"
        if keep:
            load_optimizer(optimizer, kept)
        task = Task(self.images, self.data.train.labels, shop.views)
        losses = train_locally(shop.method, task, optimizer, self._plan(order), shop.where)
        state.save(order.round, {**self._staying(), **(optimizer_tensors(optimizer) if keep else {})})
        metrics: dict[str, float | int] = {f"loss/{name}": value for name, value in losses.items()}
        metrics |= monitors | {
            "site/volumes": min(len(self.images), order.steps * shop.study.training.batch_size),
            "site/steps": order.steps,
            "site/seconds": time.perf_counter() - began,
        }
        flat = shop.answers.pack({**shop.method.state_dict(), **sums})
        return Answer(self.data.name, order.nonce, shop.answers.digest, metrics, flat)

    def refresh(self, broadcast: Broadcast) -> Answer:
        """The refresh pass alone: sums of the norm statistics under the final weights."""
        order, shop = broadcast.order, self.shop
        self._load(broadcast, shop.sends, self._state(order).before(order.round + 1))
        sums, monitors = self._refresh()
        layout = update_layout(shop.method, shop.norm, parameters=False)
        metrics = monitors | {"site/volumes": len(self.images), "site/steps": 1}
        return Answer(self.data.name, order.nonce, layout.digest, metrics, layout.pack(sums))

    def evaluate(self, broadcast: Broadcast) -> Answer:
        """Probes on the frozen encoder, with this site's own labels; only the scores leave."""
        order, shop = broadcast.order, self.shop
        self._load(broadcast, shop.sends, self._state(order).before(order.round + 1))
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

    def _load(self, broadcast: Broadcast, layout: Layout, kept: Tensors) -> None:
        """Broadcast tensors, then what the site kept; what it never kept starts as the study's seed made it."""
        if broadcast.order.layout != layout.digest:
            raise ConfigError(
                f"site '{self.data.name}': the server's model has layout {broadcast.order.layout[:12]}, "
                f"this site's has {layout.digest[:12]}. Install the same medfl release and study on both."
            )
        own = {name: kept.get(name, tensor) for name, tensor in self.shop.initial.items()}
        self.shop.method.load_state_dict({**layout.unpack(broadcast.flat), **own}, strict=False)

    def _staying(self) -> Tensors:
        """The tensors that must outlive the round; counters of batch norm are recomputed and need not."""
        method, norm = self.shop.method, self.shop.norm
        claims, state = study_claims(method, norm), method.state_dict()
        return {n: state[n] for n in self.shop.initial if claims[n].role in STAYS and state[n].is_floating_point()}

    @torch.no_grad()
    def _refresh(self) -> tuple[Tensors, dict[str, float]]:
        """Sums of every pooled norm's inputs, and the collapse monitors, over a fixed sample of the training images.

        Norms use batch statistics, as in training, so that no layer's sums depend on statistics of older weights.
        """
        shop = self.shop
        draw = seeding.generator(shop.study.seed, "refresh", self.data.name)
        chosen = torch.randperm(len(self.images), generator=draw)[: shop.study.rounds.refresh_volumes]
        parts = [part.to(self.images.device) for part in _batches(chosen, shop.study.training.batch_size)]
        layout = shop.where.memory_format(self.images.ndim - 2)
        shop.method.train()
        with shop.where.autocast():
            with Moments(shop.method) as moments:
                plain = [shop.method.observe(self._batch(part).contiguous(memory_format=layout), 0.0) for part in parts]
            with Moments(shop.method):  # leaves the running statistics alone; these sums are not used
                views = [shop.method.encoder(self._view(part).contiguous(memory_format=layout)) for part in parts]
        pair = (torch.cat(parts).float().cpu() for parts in (plain, views))
        return self._sums(moments), {f"monitor/{name}": value for name, value in collapse.monitors(*pair).items()}

    def _batch(self, part: Tensor) -> Tensor:
        return self.images[part].to(self.shop.where.device)

    def _view(self, part: Tensor) -> Tensor:
        key = seeding.key(self.shop.study.seed, "monitor", self.data.name, int(part[0]))
        return self.shop.views(self._batch(part), key=key)[0]

    def _sums(self, moments: Moments) -> Tensors:
        sums: Tensors = {}
        for name in pooled_norms(self.shop.method, self.shop.norm):
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
