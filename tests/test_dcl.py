"""MoCo, DCL and SimSiam: their losses from their parts, gradients, key network, queue, and what each switch does."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.errors import ConfigError
from medfl.layout import Policy, broadcast_layout, update_layout
from medfl.methods.base import Method, Role
from medfl.methods.contrast import crosswise, info_nce, pairwise_cosine, standardized, symmetric_kl
from medfl.methods.dcl import DCL
from medfl.methods.moco import MoCo
from medfl.methods.moments import Moments
from medfl.methods.simsiam import SimSiam
from medfl.models.cross_scale import CrossScaleAttention
from medfl.models.layers import pooled
from tests.test_encoders import encoder
from tests.test_methods import Unreadable

BATCH, SIDE = 6, 16
DIMS = pytest.mark.parametrize("dims", [2, 3])
MOCO: dict[str, Any] = {
    "head": "cstp", "tokens": 16, "heads": 2, "width": None, "capacity": 10, "temperature": 0.2, "momentum": 0.9,
    "split": 2,
}  # fmt: skip
STREAMS: dict[str, Any] = {
    "alpha": 0.3, "beta": 0.7, "use_global": True, "use_kl": True, "use_local": True, "local_target": "encoder_bn",
}  # fmt: skip
LOCAL_ALONE = {"use_global": False, "use_kl": False}


def moco(dims: int = 2, **changes: Any) -> MoCo:
    torch.manual_seed(0)
    return MoCo(encoder=encoder(base_width=4, spatial_dims=dims), **(MOCO | changes)).train()


def dcl(dims: int = 2, **changes: Any) -> DCL:
    torch.manual_seed(0)
    return DCL(encoder=encoder(base_width=4, spatial_dims=dims), **(MOCO | STREAMS | changes)).train()


def simsiam(dims: int = 2, **changes: Any) -> SimSiam:
    torch.manual_seed(0)
    given = {"head": "mlp", "projector": "mlp", "hidden": 12, "width": 16, "tokens": None, "heads": 2}
    return SimSiam(encoder=encoder(base_width=4, spatial_dims=dims), **(given | changes)).train()


def views(count: int, dims: int = 2, seed: int = 1, images: int = BATCH) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 1, *[SIDE] * dims, generator=draw) for _ in range(count)]


def filled(method: MoCo, dims: int = 2) -> Any:
    """The method with a queue full of keys of other images, patients 100 and later, under another key network."""
    for seed in range(2):
        method.enqueue(views(1, dims, seed=50 + seed)[0], 100 + torch.arange(BATCH))
    with torch.no_grad():
        for name in method.targets:
            for parameter in method.get_submodule(name).parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return method


def stepped(method: Method, dims: int, steps: int = 2) -> tuple[list[Any], dict[str, Tensor]]:
    """Losses and gradients of each step, and the state after them."""
    optimizer, told = torch.optim.SGD(method.trainable(), lr=0.03, momentum=0.9), list[Any]()
    for step in range(steps):
        optimizer.zero_grad()
        extra = {"patients": torch.arange(BATCH) % 4 + step} if method.by_patient else {}
        losses = method(views(method.views, dims, seed=step), step / steps, **extra)
        losses["total"].backward()
        optimizer.step()
        method.after_step((step + 1) / steps)
        told.append((losses, [parameter.grad.clone() for parameter in method.trainable()]))
    return told, method.state_dict()


def gradients(method: Method, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, method.trainable(), retain_graph=True))


@DIMS
def test_the_terms_are_the_equations_of_the_three_views(dims: int) -> None:
    method = filled(dcl(dims), dims)
    given, patients = views(3, dims), torch.arange(BATCH)
    got = method(given, 0.0, Unreadable(), patients=patients)
    maps = method.encoder.maps(torch.cat(given))[3]
    q1, q2, q3 = method.head(maps).chunk(3)
    keyed = (F.normalize(q1), method.keys_of(given[1]), method.queue.snapshot(), method.queue.hidden(patients))
    t2, t3 = standardized(pooled(maps)[BATCH:]).chunk(2)
    expected = {
        "nce": info_nce(*keyed, temperature=0.2),
        "kl": symmetric_kl(*keyed, temperature=0.2),
        "local": crosswise(q2, q3, t2, t3),
        "cosine": pairwise_cosine(q1),
    }
    torch.testing.assert_close({name: got[name] for name in expected}, expected)
    total = got["nce"] + 0.3 * got["kl"] + 0.7 * got["local"]
    torch.testing.assert_close(got["total"], total)
    assert got.keys() == {"total", *expected, "std", "queue_filled", "queue_stale"}
    assert [name for name, value in got.items() if value.requires_grad] == ["total"]


@DIMS
def test_without_its_own_terms_it_is_moco_bit_for_bit(dims: int) -> None:
    plain, own = moco(dims), dcl(dims, use_local=False, use_kl=False)
    torch.testing.assert_close(own.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(stepped(own, dims), stepped(plain, dims), rtol=0, atol=0)


@DIMS
@pytest.mark.parametrize("head", ["cstp", "mlp"])
def test_the_local_stream_alone_is_simsiam_without_projector_bit_for_bit(dims: int, head: str) -> None:
    own = dcl(dims, head=head, tokens=None, beta=1.0, **LOCAL_ALONE)
    plain = simsiam(dims, head=head, projector="none", width=None)
    told, state = stepped(own, dims)
    expected, trained = stepped(plain, dims)
    torch.testing.assert_close(told, expected, rtol=0, atol=0)
    torch.testing.assert_close({name: state[name] for name in trained}, trained, rtol=0, atol=0)
    assert not own.queues()
    assert bool((own.queue.versions == -1).all())


def test_gradients_reach_all_of_the_query_network_and_nothing_of_the_keys() -> None:
    method = filled(dcl(head="self_attention"))
    torch.autograd.backward(method(views(3), 0.0)["total"])
    for name, own in method.named_parameters():
        if name.startswith("key_"):
            assert own.grad is None, name
            assert not own.requires_grad, name
        else:
            assert own.grad is not None, name
            assert own.dim() == 1 or bool(own.grad.any()), name
    keys, negatives, _ = method.contrasted(views(1)[0].requires_grad_(), None)
    assert not keys.requires_grad
    assert not negatives.requires_grad


@pytest.mark.parametrize(("weight", "term"), [("alpha", "kl"), ("beta", "local")])
def test_each_term_teaches_by_its_weight(weight: str, term: str) -> None:
    without, once = (filled(dcl(**{"alpha": 0.0, "beta": 0.0, weight: value})) for value in (0.0, 0.6))
    there, here = without(views(3), 0.0), once(views(3), 0.0)
    torch.testing.assert_close(there["total"], there["nce"])
    torch.testing.assert_close(here["total"], here["nce"] + 0.6 * here[term])
    own, rest = gradients(once, here["total"]), gradients(without, there["total"])
    assert any(bool(gradient.any()) for gradient in rest)
    assert max(float((a - b).abs().max()) for a, b in zip(own, rest, strict=True)) > 1e-4


@pytest.mark.parametrize("target", ["encoder_bn", "encoder", "projection"])
def test_the_local_targets_and_their_stopped_gradient(target: str) -> None:
    method = dcl(local_target=target, beta=1.0, **LOCAL_ALONE)
    got = method(views(2), 0.0)
    maps = method.encoder.maps(torch.cat(views(2)))[3]
    rows = method.head(maps)
    targets = {"encoder_bn": standardized(pooled(maps)), "encoder": pooled(maps), "projection": rows}[target]
    (q2, q3), (t2, t3) = rows.chunk(2), targets.chunk(2)
    fixed = crosswise(q2, q3, *(t.detach().clone() for t in (t2, t3)))
    through = -(F.cosine_similarity(q2, t3).mean() + F.cosine_similarity(q3, t2).mean()) / 2
    torch.testing.assert_close(got["local"], fixed)
    own, expected, other = (gradients(method, loss) for loss in (got["total"], fixed, through))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(a, b, rtol=1e-2, atol=1e-5) for a, b in zip(own, other, strict=True))


def test_keys_enter_the_queue_after_the_step_and_only_those_of_training() -> None:
    method, patients = dcl(), torch.arange(BATCH)
    before = copy.deepcopy(method.tensors(Role.QUEUE))
    first = method(views(3), 0.0, patients=patients)
    assert float(first["nce"]) == 0  # no negatives yet: its own batch is none
    assert float(first["kl"]) == 0
    torch.testing.assert_close(method.tensors(Role.QUEUE), before, rtol=0, atol=0)
    keys = method.keys_of(views(3)[1])
    method.after_step(0.1)
    assert torch.equal(method.queue.snapshot()[:BATCH], keys)
    assert method.queue.patients[: BATCH + 1].tolist() == [*range(BATCH), -1]
    torch.testing.assert_close(method.queue.keys[:BATCH].norm(dim=1), torch.ones(BATCH))
    after = copy.deepcopy(method.tensors(Role.QUEUE))
    method.after_step(0.2)
    with torch.no_grad():
        method(views(3), 0.0)
    method.eval()(views(3), 0.0)
    method.after_step(0.3)
    torch.testing.assert_close(method.tensors(Role.QUEUE), after, rtol=0, atol=0)


def test_keys_of_the_same_patient_are_no_negatives() -> None:
    method = dcl(capacity=BATCH)
    method.enqueue(views(1, seed=8)[0], torch.full((BATCH,), 3))
    alike = method(views(3), 0.0, patients=torch.full((BATCH,), 3))
    assert float(alike["nce"]) == 0
    assert float(alike["kl"]) == 0
    others = method(views(3), 0.0, patients=torch.tensor([3, 3, 3, 4, 5, 6]))
    unknown = method(views(3), 0.0)
    assert 0 < float(others["nce"]) < float(unknown["nce"])


@DIMS
def test_keys_are_normalised_with_every_split_th_image(dims: int) -> None:
    whole, halves = moco(dims, split=1), moco(dims, split=2)
    view = views(1, dims)[0]
    keys = halves.keys_of(view)
    for part in range(2):
        torch.testing.assert_close(keys[part::2], whole.keys_of(view[part::2]), rtol=0, atol=0)
    assert not torch.allclose(keys, whole.keys_of(view))
    changed = view.clone()
    changed[1] += 1
    assert torch.equal(halves.keys_of(changed)[0::2], keys[0::2])
    assert not torch.equal(whole.keys_of(changed)[0::2], whole.keys_of(view)[0::2])
    few = moco(dims, split=16)
    torch.testing.assert_close(few.keys_of(view[:3]), whole.keys_of(view[:3]), rtol=0, atol=0)


def test_the_key_network_starts_as_the_query_network_and_follows_it_exactly() -> None:
    method = dcl()
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    pairs = {name: name.removeprefix("key_") for name in method.tensors(Role.TARGET)}
    assert pairs.keys() == {f"key_{name}" for part in ("encoder", "head") for name, _ in named(method, part)}
    assert all(torch.equal(state[own], state[online]) for own, online in pairs.items())
    with torch.no_grad():
        for parameter in method.trainable():
            parameter.add_(torch.randn_like(parameter))
    for momentum in (0.9, 0.0, 1.0):
        method.momentum = momentum
        before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
        method.after_step(0.5)
        for own, online in pairs.items():
            expected = momentum * before[own] + (1 - momentum) * before[online]
            torch.testing.assert_close(method.state_dict()[own], expected, msg=own)
            assert torch.equal(method.state_dict()[online], before[online])
    for own, online in pairs.items():  # m = 0 copied the query network, m = 1 left it there
        assert torch.equal(method.state_dict()[own], method.state_dict()[online])


def named(method: Method, part: str) -> list[tuple[str, Tensor]]:
    return list(method.get_submodule(part).named_parameters(prefix=part))


@pytest.mark.parametrize("target", ["average", "shift", "reset", "local"])
@pytest.mark.parametrize("build", [moco, dcl])
def test_nothing_of_the_queue_is_in_a_message(build: Callable[[], MoCo], target: str) -> None:
    method, policy = build(), Policy(target=target)
    for layout in (broadcast_layout(method, policy), update_layout(method, policy)):
        assert layout.slots
        assert not [slot.name for slot in layout.slots if "queue" in slot.name or slot.role is Role.QUEUE]
    assert set(method.tensors(Role.QUEUE)) == {f"queue.{name}" for name in ("keys", "versions", "patients", "position")}
    integers = {name for name, tensor in method.state_dict().items() if not tensor.is_floating_point()}
    assert {method.claim_of(name).role for name in integers} == {Role.QUEUE, Role.LOCAL}
    assert (method.target_mode, set(method.queues()), method.by_patient) == ("shift", {"queue"}, True)


@DIMS
def test_simsiam_is_the_published_network(dims: int) -> None:
    method = simsiam(dims)
    got = method(views(2, dims), 0.0, Unreadable())
    z = standardized(method.projector(method.encoder(torch.cat(views(2, dims)))))
    torch.testing.assert_close(z.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
    (p2, p3), (z2, z3) = method.head(z).chunk(2), z.chunk(2)
    torch.testing.assert_close(got["local"], crosswise(p2, p3, z2, z3))
    widths = [module.weight.shape for module in method.projector if isinstance(module, torch.nn.Linear)]
    assert widths == [(12, 32), (12, 12), (16, 12)]
    assert [tuple(m.weight.shape) for m in method.head if isinstance(m, torch.nn.Linear)] == [(4, 16), (16, 4)]
    got["total"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in method.projector.parameters() if p.dim() > 1)
    assert got.keys() == {"total", "local", "cosine", "std"}


@pytest.mark.parametrize(
    ("build", "changes"),
    [(moco, {}), (dcl, {}), (dcl, LOCAL_ALONE), (simsiam, {}), (simsiam, {"projector": "none", "width": None})],
)
def test_what_is_observed_is_of_the_encoder_and_nothing_changes(
    build: Callable[..., Method], changes: dict[str, Any]
) -> None:
    method, images = build(**changes), views(1)[0]
    before = copy.deepcopy(method.state_dict())
    with Moments(method) as moments:
        features = method.observe(images, 0.5)
        torch.testing.assert_close(features, method.encoder(images), rtol=0, atol=0)
    method.after_step(0.0)
    torch.testing.assert_close(method.tensors(Role.QUEUE), {n: before[n] for n in method.tensors(Role.QUEUE)})
    assert not features.requires_grad
    assert {name.rpartition(".")[0] for name in method.tensors(Role.NORM_MOMENTS)} <= moments.sums.keys()


@pytest.mark.parametrize(("cosine", "remarked", "alarmed"), [(0.94, 0, 0), (0.96, 1, 0), (0.998, 1, 1)])
@pytest.mark.parametrize("build", [dcl, simsiam])
def test_collapse_is_told(build: Callable[[], Method], cosine: float, remarked: int, alarmed: int) -> None:
    method = build()
    told = [text for text in method.remarks({"cosine": cosine}) if "attention" not in text]
    assert len(told) == remarked
    assert not told or f"mean cosine of two images {cosine:.3f}, where 1 is one direction" in told[0]
    assert ("are one direction" in method.alarm({"cosine": cosine})) == bool(alarmed)


@pytest.mark.parametrize(("stem", "told"), [("small", True), ("none", False)])
def test_an_attention_with_one_source_is_told(stem: str, *, told: bool) -> None:
    method = MoCo(encoder=encoder(base_width=4, image_size=28, stem=stem), **(MOCO | {"tokens": None}))
    attention = method.head.get_submodule("attention")
    assert isinstance(attention, CrossScaleAttention)
    sources = attention.weights(method.encoder.maps(torch.randn(2, 1, 28, 28))[3]).shape[-1]
    assert ("attention is constant" in " ".join(method.remarks({}))) == told == (sources == 1)


def test_half_precision_training_gives_finite_float32_losses() -> None:
    for method in (filled(dcl()), simsiam()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = method(views(method.views), 0.0)
        torch.autograd.backward(got["total"])
        method.after_step(0.1)
        assert all(value.isfinite() and value.dtype == torch.float32 for value in got.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.trainable())


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no device without values
    for method in (dcl().to("meta"), simsiam().to("meta")):  # there, reading a value back is an error
        patients = torch.arange(BATCH, device="meta")
        given = [view.to("meta") for view in views(method.views)]
        extra = {"patients": patients} if method.by_patient else {}
        torch.autograd.backward(method(given, 0.0, **extra)["total"])
        method.after_step(0.1)
        method.enqueue(given[0], patients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 1.5}, r"method\.momentum: got 1\.5, need a number in \[0, 1\]"),
        ({"temperature": 0.0}, r"method\.temperature: got 0\.0, need a number above 0"),
        ({"capacity": 0}, r"method\.capacity: got 0, need at least 1 key"),
        ({"split": 0}, r"method\.split: got 0, need at least 1"),
        ({"head": "linear"}, r"method\.head: got 'linear'"),
        ({"width": 8}, r"local_target=encoder_bn is as wide as the encoder, 32: got method\.width=8"),
        ({"width": 8, "local_target": "encoder"}, r"Set method\.width=null, or method\.local_target=projection"),
        ({"local_target": "features"}, r"method\.local_target: got 'features'"),
        ({"use_global": False, "use_local": False}, r"no loss is left"),
        ({"alpha": -0.1}, r"method\.alpha=-0\.1, method\.beta=0\.7: need both 0 or more"),
    ],
)
def test_a_dcl_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dcl(**changes)


def test_other_refusals_and_what_is_allowed() -> None:
    dcl(width=8, local_target="projection")(views(3), 0.0)
    dcl(width=8, use_local=False)(views(2), 0.0)
    with pytest.raises(ValueError, match=r"need 3 of equal shape"):
        dcl()(views(2), 0.0)
    with pytest.raises(ConfigError, match=r"the last map of the encoder has one cell per axis"):
        MoCo(encoder=encoder(stem="imagenet"), **MOCO)
    with pytest.raises(ConfigError, match=r"method\.head=cstp reads a map, and method\.projector=mlp leaves none"):
        simsiam(head="cstp")
    with pytest.raises(ConfigError, match=r"features, 32 wide: got method\.width=16\. Set method\.width=null"):
        simsiam(projector="none")
    with pytest.raises(ConfigError, match=r"method\.projector: got 'linear'"):
        simsiam(projector="linear")
