"""Layouts, owner groups, batches and schedules: what both ends derive alone must agree."""

import pytest
import torch
from torch import nn

from medfl.gate import Update
from medfl.layout import Layout, Policy, broadcast_layout, seed_layout, study_claims, update_layout
from medfl.methods.base import Claim, Method, Role
from medfl.optimizers import learning_rate
from medfl.rounds import Blueprint, Server, _aggregate
from medfl.rules import weighted_mean
from medfl.training import Plan, indices


class TwoModalities(Method):
    """A net for each modality, one shared by all, and what must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.t1, self.t2 = nn.Linear(3, 2), nn.Linear(3, 2)
        self.shared = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.private, self.frozen_head = nn.Linear(2, 1), nn.Linear(2, 1)
        self.claims = {
            "t1": Claim(Role.PARAMETER, "modality:t1"),
            "t2": Claim(Role.PARAMETER, "modality:t2"),
            "shared": Claim(Role.PARAMETER),
            "private": Claim(Role.LOCAL),
            "frozen_head": Claim(Role.FIXED),
        }


def test_only_what_may_travel_is_in_the_layouts() -> None:
    method = TwoModalities()
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
    method = TwoModalities()
    layout = broadcast_layout(method, Policy())
    state = method.state_dict()
    back = layout.unpack(layout.pack(dict(reversed(state.items()))))
    assert all(torch.equal(back[slot.name], state[slot.name]) for slot in layout.slots)
    assert layout.digest == broadcast_layout(TwoModalities(), Policy()).digest
    assert layout.digest != broadcast_layout(method, Policy(norm="local")).digest


def test_unclaimed_integer_and_misshapen_tensors_are_refused_by_name() -> None:
    method = TwoModalities()
    method.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"'extra\.weight' is claimed by no prefix"):
        broadcast_layout(method, Policy())
    with pytest.raises(ValueError, match=r"'counter' is int64.*Claim it as local"):
        Layout.of([("counter", Claim(Role.PARAMETER), (), "int64")])
    layout = broadcast_layout(TwoModalities(), Policy())
    with pytest.raises(ValueError, match=r"'shared\.0\.bias': got nothing, need shape \(2,\)"):
        layout.pack({})


def test_a_site_without_a_modality_does_not_move_its_net_by_a_bit() -> None:
    method = TwoModalities()
    sends, answers = broadcast_layout(method, Policy()), update_layout(method, Policy())
    blueprint = Blueprint(sends, answers, update_layout(method, Policy(), parameters=False), seed_layout(method),
                          sends.pack(method.state_dict()), {}, method.remarks, method.alarm)  # fmt: skip
    groups = {g: torch.from_numpy(a) for g, a in blueprint.initial.items() if g.startswith("parameter/")}
    server = Server("federated", "x", blueprint, blueprint.initial, None, parameters=groups)

    def update(site: str, owners: tuple[str, ...], value: float) -> Update:
        sizes = answers.owned(owners).sizes
        flat = {g: torch.full((n,), value, dtype=torch.float32).numpy() for g, n in sizes.items() if "parameter" in g}
        return Update(site, flat, 10, {}, 1.0)

    updates = [update("a", ("modality:t1", "modality:t2"), 1.0), update("b", ("modality:t2",), 3.0)]
    mean = _aggregate(updates, [0.5, 0.5], server, weighted_mean)
    assert set(mean["parameter/modality:t1/float32"].tolist()) == {1.0}  # only its owner counts
    assert set(mean["parameter/modality:t2/float32"].tolist()) == {2.0}
    assert set(mean["parameter/all/float32"].tolist()) == {2.0}
    nobody = _aggregate([update("b", ("modality:t2",), 3.0)], [1.0], server, weighted_mean)
    assert (nobody["parameter/modality:t1/float32"] == blueprint.initial["parameter/modality:t1/float32"]).all()


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
