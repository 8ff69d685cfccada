"""What all sites of one process share: built once per study, and reused for every site and round."""

import functools
import json
from dataclasses import dataclass

import torch

from medfl import config, seeding
from medfl.data.sample import SiteData
from medfl.errors import ConfigError
from medfl.forms import Form, forms_of
from medfl.layout import (
    Flat,
    Layout,
    Policy,
    Tensors,
    broadcast_layout,
    pooled_norms,
    study_claims,
    traveling,
    update_layout,
)
from medfl.malloc import keep_freed
from medfl.methods.base import Method, Role
from medfl.models.encoders import ResNet
from medfl.site_weights import Blend
from medfl.study import Study
from medfl.training import Device, Views


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
    down: Form  # of the broadcast that a site trains from
    up: Form  # of its update
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


def _refuse_halves(method: Method, dims: int) -> None:
    """Refuse bfloat16 on a CPU where torch's convolutions are wrong (2.13.0, against float32 over many shapes).

    In 3D gradients of weights are wrong at sides of one and two voxels, and kernels of 7 over 5³ write beyond their
    memory; in 2D single pixels under a stride of 2 give wrong ones.

    Raises:
        ConfigError: such a network.
    """
    sides = getattr(method.encoder, "map_sides", ())
    if dims == 3 or 1 in sides[:-1]:
        what = "Conv3d" if dims == 3 else f"Conv2d, over maps of the sides {sides},"
        raise ConfigError(
            f"training.precision=bf16: torch's {what} gives wrong gradients in bfloat16 on a CPU. Take fp32 or auto."
        )


@functools.lru_cache(maxsize=2)
def workshop(source: str) -> Workshop:
    """Built once per process and study, and reused for every site and round."""
    study = config.parse(source)
    torch.set_num_threads(study.training.threads)
    keep_freed()
    plan = study.training
    where = Device.choose(plan.device, plan.precision, plan.channels_last)
    method = new_method(study).to(where.device)
    if where.bf16 and where.device.type == "cpu":
        _refuse_halves(method, int(study.data["spatial_dims"]))
    for module in method.modules():
        if isinstance(module, ResNet):
            module.checkpointing = study.training.checkpointing
    if study.privacy.on:
        method.isolate()
    if where.channels_last:
        method.to(memory_format=where.memory_format(int(study.data["spatial_dims"])))  # type: ignore[call-overload]
    views = config.build(study.views)
    if method.segments and not getattr(views, "keeps_masks", False):
        raise ConfigError(f"views: {type(views).__name__} would move images off their masks. Take paired or crops.")
    policy = Policy.of(method, study.rounds)
    claims, brought = study_claims(method, policy), traveling(policy)
    initial = {
        name: tensor.clone()
        for name, tensor in method.state_dict().items()
        if claims[name].role not in (*brought, Role.FIXED, Role.TARGET)
    }
    # counters of batch norm are recomputed, queues mostly refilled: they need not outlive the round
    staying = tuple(n for n, t in initial.items() if claims[n].role is Role.LOCAL and t.is_floating_point())
    if study.rounds.queue == "keep":
        staying += tuple(n for n in initial if claims[n].role is Role.QUEUE)
    sends, answers = broadcast_layout(method, policy), update_layout(method, policy)
    blended = [name for name, claim in claims.items() if claim.role is Role.PARAMETER]
    return Workshop(
        study,
        method,
        views,
        where,
        initial,
        staying,
        tuple(pooled_norms(method, policy.norm)),
        policy,
        sends,
        answers,
        update_layout(method, policy, parameters=False),
        *forms_of(study.rounds, sends, answers),
        Blend(study.rounds.blend, study.rounds.blend_tau, blended),
        answers.empty(),
    )


@functools.lru_cache(maxsize=2)
def simulated_sites(data: str, sites: str, seed: int) -> tuple[SiteData, ...]:
    """All sites of a simulation, from the JSON of the nodes `data` and `sites`."""
    return tuple(config.build(json.loads(sites)).partition(config.build(json.loads(data)).load(), seed))


def sites_of(study: Study) -> tuple[SiteData, ...]:
    return simulated_sites(json.dumps(dict(study.data)), json.dumps(dict(study.sites)), study.seed)
