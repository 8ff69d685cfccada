"""Layouts, owner groups, batches and schedules: what both ends derive alone must agree."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from medfl.ballot import Ballot
from medfl.enrolment import Enrolled
from medfl.errors import ConfigError
from medfl.gate import Update
from medfl.layout import Flat, Layout, Policy, broadcast_layout, seed_layout, study_claims, update_layout
from medfl.methods.base import Claim, Method, Role
from medfl.methods.phases import Phase, phase_of, phases_of
from medfl.optimizers import learning_rate, scale_rates
from medfl.rules import Before, weighted_mean
from medfl.server_state import Blueprint, Server
from medfl.training import Plan, indices


class Modalities(Method):
    """A net for each modality, one shared by all, and what must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2, self.flair = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
        self.shared = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.private, self.frozen_head = nn.Linear(2, 1), nn.Linear(2, 1)
        self.claims = {
            "t1": Claim(Role.PARAMETER, "modality:t1"),
            "t2": Claim(Role.PARAMETER, "modality:t2"),
            "flair": Claim(Role.PARAMETER, "modality:flair"),
            "shared": Claim(Role.PARAMETER),
            "private": Claim(Role.LOCAL),
            "frozen_head": Claim(Role.FIXED),
        }


def test_only_what_may_travel_is_in_the_layouts() -> None:
    method = Modalities()
    names = {slot.name for slot in broadcast_layout(method, Policy()).slots}
    assert names == {
        n for n in method.state_dict() if not n.startswith(("private", "frozen_head")) and "batches" not in n
    }
    sums = {slot.name for slot in update_layout(method, Policy(), parameters=False).slots}
    assert sums == {f"shared.1.{kind}" for kind in ("count", "sum", "square")}
    assert not update_layout(method, Policy(norm="local"), parameters=False).slots
    local = {slot.name for slot in broadcast_layout(method, Policy(norm="local")).slots}
    assert not {n for n in local if n.startswith("shared.1")}  # FedBN: scale and shift stay as well
    assert study_claims(method, Policy(norm="local_statistics"))["shared.1.weight"].role is Role.PARAMETER


def test_tensors_survive_packing_in_any_order_and_the_digest_names_the_layout() -> None:
    method = Modalities()
    layout = broadcast_layout(method, Policy())
    state = method.state_dict()
    back = layout.unpack(layout.pack(dict(reversed(state.items()))))
    assert all(torch.equal(back[slot.name], state[slot.name]) for slot in layout.slots)
    assert layout.digest == broadcast_layout(Modalities(), Policy()).digest
    assert layout.digest != broadcast_layout(method, Policy(norm="local")).digest


def test_unclaimed_integer_and_misshapen_tensors_are_refused_by_name() -> None:
    method = Modalities()
    method.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"'extra\.weight' is claimed by no prefix"):
        broadcast_layout(method, Policy())
    with pytest.raises(ValueError, match=r"'counter' is int64.*Claim it as local"):
        Layout.of([("counter", Claim(Role.PARAMETER), (), "int64")])
    layout = broadcast_layout(Modalities(), Policy())
    with pytest.raises(ValueError, match=r"'flair\.bias': got nothing, need shape \(2,\)"):
        layout.pack({})


def server_of(method: Method, optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None) -> Server:
    sends, answers = broadcast_layout(method, Policy()), update_layout(method, Policy())
    sums, seeds, initial = update_layout(method, Policy(), parameters=False), seed_layout(method), method.state_dict()
    blueprint = Blueprint(sends, answers, sums, seeds, sends.pack(initial), {}, method.phases, method.needs,
                          method.enter, method.remarks, method.alarm)  # fmt: skip
    flat = {group: array.copy() for group, array in blueprint.initial.items()}
    steps = {g: torch.from_numpy(a).requires_grad_() for g, a in flat.items() if g.startswith("parameter/")}
    return Server("federated", "x", blueprint, flat, optimizer and optimizer([*steps.values()]), parameters=steps)


def answer(server: Server, site: Enrolled, seed: int) -> Update:
    sizes = server.blueprint.answers.owned(tuple(site.holdings)).sizes
    draw = np.random.default_rng(seed)
    flat = {group: draw.standard_normal(size).astype(group.rpartition("/")[2]) for group, size in sizes.items()}
    return Update(site.name, flat, site.volumes, {}, 1.0)


def mean_of(server: Server, answers: list[tuple[Enrolled, Update]], needed: str = "") -> Flat:
    sites, updates = {site.name: site for site, _ in answers}, [update for _, update in answers]
    return Ballot.of(updates, sites, server.blueprint.sends, server.flat, needed=needed).count(weighted_mean, 1.0)


def test_each_modality_is_averaged_over_the_sites_that_hold_it_bit_for_bit() -> None:
    a = Enrolled(1, "a", 10, False, {"modality:t1": 10, "modality:t2": 5})
    b = Enrolled(2, "b", 30, False, {"modality:t2": 30, "modality:flair": 7})
    server = server_of(Modalities())
    first, second = answer(server, a, 1), answer(server, b, 2)
    mean = mean_of(server, [(a, first), (b, second)])
    group = "parameter/modality:{}/float32".format
    assert (mean[group("t1")] == first.flat[group("t1")]).all()  # its owner's, bit for bit
    assert (mean[group("flair")] == second.flat[group("flair")]).all()
    before = Before(server.flat[group("t2")], [])
    both = weighted_mean([first.flat[group("t2")], second.flat[group("t2")]], [5, 30], before)
    assert (mean[group("t2")] == both).all()  # by the volumes that have it, not by all
    assert np.allclose(both, (5 * first.flat[group("t2")] + 30 * second.flat[group("t2")]) / 35, atol=1e-6)
    everybody = weighted_mean([u.flat["parameter/all/float32"] for u in (first, second)], [10, 30], before)
    assert (mean["parameter/all/float32"] == everybody).all()


def test_a_phase_counts_the_volumes_that_it_trains_on() -> None:
    a = Enrolled(1, "a", 10, False, {"modality:t1": 10, "modality:t2": 5, "paired": 5, "paired:t1": 5, "paired:t2": 5})
    b = Enrolled(2, "b", 40, False, {"modality:t1": 40, "modality:t2": 1, "paired": 1, "paired:t1": 1, "paired:t2": 1})
    server = server_of(Modalities())
    first, second = answer(server, a, 1), answer(server, b, 2)
    mean = mean_of(server, [(a, first), (b, second)], "paired")
    group = "parameter/modality:t1/float32"
    by_pairs = weighted_mean([first.flat[group], second.flat[group]], [5, 1], Before(server.flat[group], []))
    assert np.allclose(mean[group], by_pairs, rtol=1e-6)
    assert "parameter/modality:flair/float32" not in mean
    assert (a.share(""), a.share("paired"), b.share("modality:t1"), b.share("modality:t1", "labelled")) == (
        1,
        0.5,
        1,
        0,
    )


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_what_no_site_of_a_round_owns_stays_as_it_was_bit_for_bit(momentum: float | None) -> None:
    """With a server optimizer too, whose momentum from earlier rounds would still carry it on."""
    a = Enrolled(1, "a", 10, False, {"modality:t1": 10, "modality:t2": 10})
    b = Enrolled(2, "b", 10, False, {"modality:t2": 10})
    stepper = None if momentum is None else lambda steps: torch.optim.SGD(steps, lr=1.0, momentum=momentum)
    server = server_of(Modalities(), stepper)
    server.step(mean_of(server, [(a, answer(server, a, 1))]))
    before = {group: array.copy() for group, array in server.flat.items()}
    server.step(mean_of(server, [(b, answer(server, b, 2))]))
    still = {group for group, array in server.flat.items() if (array == before[group]).all()}
    assert {g for g in still if g.startswith("parameter")} == {
        "parameter/modality:t1/float32",
        "parameter/modality:flair/float32",
    }


def plan(number: int, steps: int = 5, batch: int = 8) -> Plan:
    return Plan(0, "a", number, 3, steps, batch, 0.05)


def test_batches_are_passes_without_replacement_that_go_on_over_rounds() -> None:
    drawn = [batch for number in (1, 2, 3) for batch in indices(40, None, plan(number))]
    for epoch in range(3):
        assert sorted(torch.cat(drawn[5 * epoch : 5 * epoch + 5]).tolist()) == list(range(40))
    assert all(torch.equal(a, b) for a, b in zip(drawn[5:10], indices(40, None, plan(2)), strict=True))
    assert not torch.equal(drawn[0], drawn[5])


def test_a_small_site_uses_all_its_images_in_every_step() -> None:
    assert all(sorted(batch.tolist()) == [0, 1, 2] for batch in indices(3, None, plan(1)))


def test_balanced_batches_draw_classes_equally_and_never_an_unknown_label() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10 + [-1] * 20)
    drawn = labels[torch.cat(list(indices(120, labels, plan(1, steps=50, batch=64))))]
    assert (drawn >= 0).all()
    assert drawn.float().mean() == pytest.approx(0.5, abs=0.05)


def test_schedules_are_functions_of_progress_alone() -> None:
    assert [plan(n, steps=s).progress(s) for n, s in ((1, 5), (2, 7), (3, 9))] == pytest.approx([1 / 3, 2 / 3, 1.0])
    rate = [learning_rate(p, peak=0.1, warmup=0.05) for p in (0.0, 0.05, 0.525, 1.0)]
    assert rate == pytest.approx([0.0, 0.1, 0.05, 0.0])


def test_phases_share_out_all_rounds_in_order() -> None:
    shares = {"features": 0.4, "fusion": 0.3, "segmentation": 0.3}
    assert phases_of(shares, 10) == [Phase("features", 1, 4), Phase("fusion", 5, 7), Phase("segmentation", 8, 10)]
    assert [phase_of(shares, number, 10).name for number in (0, 1, 4, 5, 7, 8, 10)] == [
        *["features"] * 3, *["fusion"] * 2, *["segmentation"] * 2
    ]  # fmt: skip
    assert phases_of({"pretrain": 1.0}, 7) == [Phase("pretrain", 1, 7)]
    with pytest.raises(ConfigError, match=r"rounds\.count: got 2, too few for the phases features 40%, fusion 30%"):
        phases_of(shares, 2)


def test_each_phase_has_the_whole_schedule() -> None:
    second = Plan(0, "a", 5, 3, 10, 8, 0.05, before=4)
    assert second.progress(0) == 0.0
    assert Plan(0, "a", 7, 3, 10, 8, 0.05, before=4).progress(10) == 1.0


def test_rates_are_scaled_without_changing_anything_else() -> None:
    weights, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    slow = nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [weights, slow], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    scale_rates(optimizer, lambda parameter: 0.25 if parameter is slow else 1.0)
    rows = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert [([id(p) for p in params], lr, decay) for params, lr, decay in rows] == [
        ([id(weights)], 1.0, 0.1), ([id(slow)], 0.25, 0.1), ([id(bias)], 1.0, 0.0)
    ]  # fmt: skip
