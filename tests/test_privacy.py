"""Differential privacy: each patient's part, its bound, the noise, the accounts and the ledger."""

import multiprocessing
import os
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torch import Tensor

from medfl import admission, config
from medfl.codebooks import Book
from medfl.data.fractions import rows_with_labels
from medfl.data.sample import Split
from medfl.errors import ConfigError, PolicyError, PrivacyError
from medfl.methods.base import Method
from medfl.methods.tokens import CodeStatistics
from medfl.onsite import policy
from medfl.onsite.audit import Audit
from medfl.onsite.site_file import SiteFile, SitePolicy
from medfl.privacy import codes
from medfl.privacy.account import account
from medfl.privacy.accounting import BUCKET, PATIENT, Release, noise_for, spent
from medfl.privacy.at_site import Guard
from medfl.privacy.forecast import forecast
from medfl.privacy.gradients import PrivateGradients, clipped_sum
from medfl.privacy.ledger import Ledger
from medfl.privacy.secret import Secret
from medfl.privacy.units import Units, bucket_of, units_of
from medfl.protection import Privacy
from medfl.training import Device, Plan, Task
from tests.contract.conftest import CONFIGS, MULTIMODAL, SITES_KNOW

CPU = Device(torch.device("cpu"), bf16=False, channels_last=False)
PLAN = Plan(0, "a", 1, 1, 4, 8, 0.0)
PATIENTS = torch.tensor([7, 8, 8, 9, 9, 9, 10, 11, 12, 13, 13, 14])
OWN = [pytest.param(group, name, id=name) for group, name in CONFIGS]


def settings(**changes: object) -> Privacy:
    return replace(config.compose(["privacy=group"]).privacy, **changes)


def isolated(group: str, name: str, dims: int) -> Method:
    """A method or task as a site trains it under differential privacy."""
    data = ["data=phantom", f"data.spatial_dims={dims}", "data.size=16", "encoder=tiny", "encoder.base_width=4"]
    if name in MULTIMODAL:
        data[0] = "data=brain"
        data += ["method.base_width=2", "method.levels=2"]
    small = ["method.projector=none"] if name == "simsiam" else []
    study = config.compose([f"{group}={name}", *data, *small, "privacy=group"])
    node = study.method if group == "method" else {n: SITES_KNOW.get(n, v) for n, v in study.task.items()}
    torch.manual_seed(0)
    method: Method = config.build(node)
    method.isolate()
    for book in method.codebooks().values():
        draw = torch.Generator().manual_seed(3)
        tokens = torch.nn.functional.normalize(torch.randn(book.sums.shape, generator=draw), dim=1)
        book.set(torch.ones(len(tokens)), tokens)
    return method.double().train()


def views_of(images: Tensor, *, key: int, count: int) -> list[Tensor]:
    """Views that are a function of each image alone."""
    del key
    return [images if not place else images * (1 - 0.2 * place) for place in range(count)]


def task_of(method: Method, dims: int, patients: Tensor = PATIENTS) -> Task:
    draw = torch.Generator().manual_seed(1)
    channels, count = len(getattr(method.encoder, "modalities", "1")), len(patients)
    images = torch.randn(count, channels, *[16] * dims, generator=draw).sigmoid().double()
    labels = torch.arange(count) % 2
    if method.findings:
        labels = torch.arange(3 * count).view(count, 3) % 3 - 1
    masks = torch.randint(0, 4, (count, *[16] * dims), generator=draw, dtype=torch.uint8) if method.segments else None
    return Task(images, labels, views_of, patients, masks)


def each_apart(patients: Tensor = PATIENTS) -> Units:
    return units_of(patients, settings(mechanism="patient", images=9), batch=99, key=b"")


def flat(method: Method, task: Task, rows: Tensor) -> Tensor:
    """The gradient of the loss of these images as one batch, by autograd."""
    views = task.batch(rows, 0, CPU, count=method.views, masked=method.segments)
    read: dict[str, Tensor | None] = dict(task.known(rows, method, CPU))
    if method.segments:
        read["masks"] = views[0][:, -1].to(torch.uint8)
        views = [view[:, :-1] for view in views]
    total = method(views, 0.0, **read)["total"]
    found = torch.autograd.grad(total, method.trainable(), allow_unused=True)
    parts = zip(method.trainable(), found, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in parts])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("group", "name"), OWN)
def test_each_patients_gradient_is_that_of_a_plain_loop(group: str, name: str, dims: int) -> None:
    method = isolated(group, name, dims)
    task, units = task_of(method, dims), each_apart()
    chosen = torch.arange(len(units.members))
    if not method.separable:
        with pytest.raises(ConfigError, match="privacy=group"):
            PrivateGradients(method, task, PLAN, CPU, settings(mechanism="patient"), units)
        privacy, units = settings(images=9), units_of(PATIENTS, settings(bucket=3), batch=99, key=b"k")
        rows = [torch.cat([units.patients[p] for p in members]) for members in units.members if members]
        wanted = [flat(method, task, part) for part in rows if len(part) > 1]
        chosen = torch.arange(len(units.members))
    else:
        privacy = settings(mechanism="patient", images=9)
        wanted = [torch.stack([flat(method, task, row[None]) for row in part]).mean(0) for part in units.patients]
    with PrivateGradients(method, task, PLAN, CPU, privacy, units) as gradients:
        found = torch.cat(list(gradients.of_units(chosen, 0.0)))
    scale = float(torch.stack(wanted).abs().max())
    torch.testing.assert_close(found, torch.stack(wanted).float(), rtol=1e-5, atol=1e-5 * min(1.0, scale))
    assert scale > 0
    assert not any(hasattr(parameter, "grad_sample") for parameter in method.parameters())


def test_gradients_lie_in_memory_as_their_parameters_do() -> None:
    """Fused optimizers go through memory."""
    method = isolated("method", "byol", 2).to(memory_format=torch.channels_last)
    privacy = settings(mechanism="patient", images=9)
    with PrivateGradients(method, task_of(method, 2), PLAN, CPU, privacy, each_apart()) as gradients:
        gradients(0)
    assert any(p.stride() != p.contiguous().stride() for p in gradients.parameters)
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in gradients.parameters)


def test_a_patient_moves_the_sum_by_no_more_than_the_bound() -> None:
    """Added or removed: by C for patients, by 2C for buckets, whatever the images are; nobody else's part changes."""
    for mechanism, factor in (("patient", 1.0), ("group", 2.0)):
        method = isolated("task", "classification", 2) if factor == 1 else isolated("method", "medcss", 2)
        privacy = settings(mechanism=mechanism, clip=0.05, bucket=3, images=9)
        moved = []
        for seed in range(20):
            draw = torch.Generator().manual_seed(seed)
            task = task_of(method, 2)
            task = replace(task, images=task.images * 10 ** (6 * torch.rand(12, 1, 1, 1, generator=draw) - 3))
            units = units_of(PATIENTS, privacy, batch=99, key=bytes([seed]))
            gone = int(PATIENTS[torch.randint(12, (1,), generator=draw)])
            without = gone != PATIENTS
            left = tuple(part for part in units.patients if bool(without[part].all()))
            places = {int(part[0]): place for place, part in enumerate(left)}
            first = [int(part[0]) for part in units.patients]
            members = tuple(tuple(places[first[p]] for p in unit if first[p] in places) for unit in units.members)
            sums = []
            for one in (units, Units(left, members, 1.0)):
                chosen = torch.tensor([place for place, unit in enumerate(one.members) if unit])
                with PrivateGradients(method, task, PLAN, CPU, privacy, one) as gradients:
                    parts = [clipped_sum(rows, privacy.clip) for rows in gradients.of_units(chosen, 0.0)]
                sums.append(torch.stack(parts).sum(0))
            moved.append(float((sums[0] - sums[1]).norm()))
        assert max(moved) <= factor * privacy.clip * (1 + 1e-4)
        assert max(moved) > 0.5 * privacy.clip


def test_clipping_shortens_and_drops_what_is_not_finite() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 1.0], [float("inf"), 0.0], [0.0, 0.0]])
    torch.testing.assert_close(clipped_sum(rows.clone(), 1.0), torch.tensor([0.9, 1.2]))
    torch.testing.assert_close(clipped_sum(rows.clone(), 2.0), torch.tensor([1.5, 2.0]))


def test_the_noise_has_its_size_and_shape_where_nobody_takes_part() -> None:
    method = isolated("task", "classification", 2)
    units, privacy = each_apart(), settings(mechanism="patient", noise=1.7, clip=0.3)
    with PrivateGradients(
        method, task_of(method, 2), PLAN, CPU, privacy, replace(units, rate=1e-12), Secret(5)
    ) as gradients:
        drawn = []
        for step in range(200_000 // sum(p.numel() for p in method.trainable()) + 1):
            assert gradients(step) == {}
            drawn.append(torch.cat([p.grad.flatten() for p in method.trainable() if p.grad is not None]))
        noise = torch.cat(drawn) * gradients.units.expected
    assert abs(float(noise.std()) / (1.7 * 0.3) - 1) < 0.01
    assert stats.kstest((noise / 0.51).numpy(), "norm").pvalue > 1e-4
    assert len(torch.unique(noise)) > 0.9 * len(noise)


def test_steps_are_poisson_samples_and_buckets_know_nobody_else() -> None:
    secret = Secret(1)
    sizes = [len(secret.chosen(50, 0.1)) for _ in range(4000)]
    found = Counter(sizes)
    assert found[0] > 0
    assert abs(np.mean(sizes) / 5 - 1) < 0.03
    assert abs(np.var(sizes) / 4.5 - 1) < 0.08
    privacy = settings(bucket=4)
    units = units_of(range(400), privacy, batch=40, key=b"secret")
    assert len(units.members) == 100
    assert units.expected == 10
    assert sorted(place for unit in units.members for place in unit) == list(range(400))
    assert len({len(unit) for unit in units.members}) > 3
    for place, unit in enumerate(units.members):
        assert all(bucket_of(patient, 100, b"secret") == place for patient in unit)
    assert Secret().key() != Secret().key()


def test_two_accountants_and_another_library_agree() -> None:
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    for plan in ([(1.0, 0.1, 200)], [(1.5, 0.05, 400), (0.9, 0.02, 300)], [(4.0, 1.0, 15), (1.1, 0.1, 60)]):
        found = spent([Release(PATIENT, *one) for one in plan], 1e-4)
        mechanisms = [
            PoissonSubsampledGaussianMechanism(noise_multiplier=s, sampling_probability=q) for s, q, _ in plan
        ]
        steps = [count for *_, count in plan]
        other = PRVAccountant(prvs=mechanisms, max_self_compositions=steps, eps_error=0.01, delta_error=1e-8)
        low, value, high = other.compute_epsilon(delta=1e-4, num_self_compositions=steps)
        assert low * 0.99 <= found.prv <= high * 1.05
        assert value * 0.99 <= found.rdp <= 1.25 * value  # an upper bound, and no loose one
        assert found.epsilon == found.prv


def test_a_bucket_costs_a_patient_twice_and_more() -> None:
    release = Release(PATIENT, 3.0, 0.05, 400)
    alone, bucket = spent([release], 1e-4), spent([replace(release, unit=BUCKET)], 1e-4)
    assert 2 * alone.epsilon < bucket.epsilon < 3 * alone.epsilon
    both = spent([release, replace(release, unit=BUCKET)], 1e-4)
    assert both.epsilon > alone.epsilon + bucket.epsilon
    assert spent([], 1e-4).epsilon == 0
    more = [spent([replace(release, steps=steps)], 1e-4).epsilon for steps in (100, 200, 400, 800)]
    assert more == sorted(more)
    noise = noise_for(4.0, 1e-4, [release])
    assert spent([replace(release, noise=noise)], 1e-4).epsilon <= 4.0
    assert spent([replace(release, noise=0.97 * noise)], 1e-4).epsilon > 4.0


def test_the_ledger_stops_at_the_limit_and_knows_when_it_was_cut(tmp_path: Path) -> None:
    ledger, release = Ledger.of(tmp_path, "a"), Release(PATIENT, 2.0, 0.2, 20)
    totals = [ledger.book([release], 1e-3, 4.0, study="s", phase="pretrain", arm="f", round=i).rdp for i in (1, 2)]
    assert 0 < totals[0] < totals[1] < 4.0
    head = ledger.head()
    with pytest.raises(PrivacyError, match="budget is spent"):
        ledger.book([replace(release, noise=0.5)], 1e-3, 4.0, study="s", phase="pretrain", arm="f", round=3)
    assert ledger.head() == head
    shown = account(tmp_path, "a", {"max_epsilon": 4.0})
    assert (shown["releases"], shown["rows"][0]["steps"], shown["rdp"]) == (2, 40, totals[1])
    assert shown["epsilon"] < shown["rdp"]
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(lines[0])
    with pytest.raises(PrivacyError, match="cannot be trusted"):
        ledger.releases(head)
    ledger.path.write_bytes(lines[0].replace(b'"steps":20', b'"steps":2') + lines[1])
    with pytest.raises(PrivacyError, match="cannot be trusted"):
        ledger.book([release], 1e-3, None)


def test_a_site_whose_ledger_was_set_back_obeys_no_more(tmp_path: Path) -> None:
    site = SiteFile(tmp_path / "site.yaml", "a")
    ledger, release = Ledger.of(site.state, "a"), Release(PATIENT, 2.0, 0.2, 20)
    for number in (1, 2):
        ledger.book([release], 1e-3, None, round=number)
        Audit(site.audit).write("answer", ledger="{}:{}".format(*ledger.head()))
    admission.check_ledger(site)
    Audit(site.audit).write("answer", ledger="{}:{}".format(*ledger.head()), order="an order")
    admission.check_ledger(site, "another order")
    with pytest.raises(PolicyError, match="answered before"):  # whoever carries it could have it obeyed again
        admission.check_ledger(site, "an order")
    ledger.path.write_bytes(ledger.path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(PrivacyError, match="cannot be trusted"):
        admission.check_ledger(site)
    ledger.path.unlink()
    with pytest.raises(PrivacyError, match="cannot be trusted"):
        admission.check_ledger(site)


def _spend(path: Path, told: int) -> None:
    ledger = Ledger(path)
    for number in range(10_000):
        ledger.book([Release(PATIENT, 30.0, 0.1, 1)], 1e-3, None, round=number)
        os.write(told, b"x")  # the release


def test_the_ledger_never_forgets_a_release_over_fifty_kills(tmp_path: Path) -> None:
    """Each release was written before; a kill counts at most the one that it stopped too much."""
    path, made, epsilon = tmp_path / "a.jsonl", 0, 0.0
    spent([Release(PATIENT, 30.0, 0.1, 1)], 1e-3)  # imports, before the forks
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    for number in range(50):
        reading, writing = os.pipe()
        child = context.Process(target=_spend, args=(path, writing))
        child.start()
        os.close(writing)
        made += len(os.read(reading, 1))
        time.sleep(draw.random() / 20)
        child.kill()
        child.join()
        with os.fdopen(reading, "rb") as rest:
            made += len(rest.read())
        found = Ledger(path).releases()
        assert made <= sum(one.steps for one in found) <= made + number + 1
        now = spent(found, 1e-3, tight=False).rdp
        assert now > epsilon
        epsilon = now


def _seen(method: Method, images: Tensor, owners: Tensor, clip: float) -> dict[str, Tensor]:
    with torch.no_grad(), codes.PatientSums(method, int(owners.max()) + 1, clip) as sums:
        sums.owners, sums.shares = owners, 1 / torch.bincount(owners).double()[owners]
        method.observe(images, 0.0)
    return sums.rows


class Quiet(Secret):
    """No noise, to see what it would cover."""

    def normal(self, size: int, device: torch.device) -> Tensor:
        return torch.zeros(size, device=device)


def test_a_codebooks_release_is_the_plain_sums_but_for_noise_and_clipping() -> None:
    method = isolated("method", "dissect", 2)
    images = task_of(method, 2).images
    rows = _seen(method, images, torch.arange(len(images)), 2.0)  # unit tokens are at most 2 apart: nothing is clipped
    privacy = settings(codes_clip=2.0, codes_noise=1e-6)
    found = codes.released(rows, method, privacy, Quiet())
    with torch.no_grad(), CodeStatistics(method) as plain:
        method.observe(images, 0.0)
    for name, sums in plain.sums.items():
        torch.testing.assert_close(found[f"{name}.counts"], sums.counts)
        torch.testing.assert_close(found[f"{name}.sums"], sums.sums, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[f"{name}.residuals"], sums.residuals, rtol=1e-4, atol=1e-5)


def test_a_patient_counts_once_in_a_codebook_whatever_its_images() -> None:
    method = isolated("method", "dissect", 2)
    draw = torch.Generator().manual_seed(4)
    owners, width = torch.tensor([0, 0, 0, 1, 1, 2]), next(iter(method.codebooks().values())).sums.shape[1]
    for scale in (1e-3, 1.0, 1e4):
        images = torch.randn(6, 1, 16, 16, generator=draw).double() * scale
        for found in _seen(method, images, owners, 0.8).values():
            assert float(found.norm(dim=1).max()) <= 3**0.5 + 1e-6
            counts = found.view(3, len(found[0]) // (width + 2), width + 2)[..., 0]
            torch.testing.assert_close(counts.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_release_of_nobody_is_noise_that_the_gate_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    method = isolated("method", "dissect", 2)
    with codes.PatientSums(method, 1, 0.8) as sums:
        sums.fill(torch.device("cpu"))
    monkeypatch.setattr(codes, "SIGMAS", 0.0)  # everything is shown
    found = codes.released(sums.rows, method, settings(codes_noise=2.0), Secret(3))
    for name in method.codebooks():
        counts, total, energy = (found[f"{name}.{kind}"] for kind in ("counts", "sums", "residuals"))
        assert bool((counts >= 0).all())
        assert bool((total.norm(dim=1) <= counts * (1 + 1e-6) + 1e-9).all())
        assert bool((energy <= 4 * counts + 1e-9).all())
        assert counts.sum() > 0


def test_public_seeds_are_whole_codebooks() -> None:
    method = isolated("method", "dissect", 2)
    images = task_of(method, 2).images
    for name, (counts, sums) in codes.public_seeds(method, images, 0).items():
        assert counts.shape == method.codebooks()[name].counts.shape
        assert Book(counts, sums).counts.sum() > 0


def test_the_sites_limits_win_and_a_study_without_privacy_is_refused() -> None:
    tree = {"privacy": dict(vars(settings())), "method": {"_target_": "medfl.methods.byol.BYOL"}, "stages": [],
            "training": {}, "rounds": {"refresh_volumes": 64, "codebook": "local"}}  # fmt: skip
    rules = SitePolicy(privacy={"max_epsilon": 3.0})
    assert policy.refusals(tree, rules) == []
    assert policy.private(tree, rules)["max_epsilon"] == 3.0
    tree["privacy"]["max_epsilon"] = 2.0
    assert policy.private(tree, rules)["max_epsilon"] == 2.0
    tree["privacy"]["mechanism"] = "none"
    assert "no differential privacy" in policy.refusals(tree, rules)[0]
    for wrong in ({}, {"max_epsilon": 0}, {"max_epsilon": True}, {"max_epsilon": 3.0, "sigma": 1}):
        with pytest.raises(ConfigError, match=r"policy\.privacy"):
            SitePolicy(privacy=wrong)


@pytest.mark.parametrize(
    "words", [["method=dissect", "privacy=patient"], ["method=medcss", "privacy=group"]], ids=lambda words: words[0]
)
def test_a_forecast_grows_with_rounds_and_falls_with_patients(words: list[str]) -> None:
    def epsilon(patients: int, *more: str) -> float:
        study = config.compose([*words, "privacy.noise=4", "privacy.codes_noise=20", "arms=[federated]", *more])
        return spent(forecast(study, patients, sites=3, books="dissect" in words[0]), 1e-4, tight=False).rdp

    assert epsilon(500) > epsilon(5000) > 0
    assert epsilon(500, "rounds.count=20") > epsilon(500)
    assert forecast(config.compose([words[0]]), 500, sites=3, books=True) == []


def test_settings_that_protect_nothing_are_refused(tmp_path: Path) -> None:
    for word in ("noise=0", "clip=0", "delta=0.5", "max_epsilon=-1", "mechanism=percentile"):
        with pytest.raises(ConfigError, match=r"privacy\."):
            config.compose(["privacy=group", f"privacy.{word}"])
    with pytest.raises(ConfigError, match="batch norm"):
        config.build(config.compose(["method=simclr"]).method).isolate()
    with pytest.raises(ConfigError, match="synthesize makes images of patients"):
        config.compose(["privacy=patient", "method=byol", "stages=[synthesize,pretrain]"])
    slabs = ["method=byol", "data=multimodal", "data.root=x", "data.slabs=2", "data.slab_splits=[train,test]"]
    assert config.compose(slabs).data["slab_splits"] == ["train", "test"]
    for mechanism in ("patient", "group"):
        with pytest.raises(ConfigError, match=r"data\.slab_splits: each slab counts as a patient.*not of a person"):
            config.compose([*slabs, f"privacy={mechanism}"])
    study = config.compose([f"run.dir={tmp_path}", "privacy=patient", "method=byol", "privacy.delta=0.09"])
    assert Guard(study, "a", isolated("method", "byol", 2), torch.arange(11)).delta == 0.09
    with pytest.raises(ConfigError, match="need at most 1 / 12: to publish one patient in full"):
        Guard(study, "a", isolated("method", "byol", 2), torch.arange(12))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("rounds", "codebook", "local"), ("rounds", "queue", "keep"), ("method", "norm", "batch")],
)
def test_a_study_that_mixes_patients_is_refused_by_who_gets_it(section: str, key: str, value: str) -> None:
    """The study lead's tool sets these; what a site is sent may have been made by hand."""
    tree = yaml.safe_load(config.compose(["method=byol", "privacy=patient"]).source)
    assert config.parse(yaml.safe_dump(tree)).privacy.on
    tree[section][key] = value
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: under privacy it would let images of other patients"):
        config.parse(yaml.safe_dump(tree))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9, 1.0])
def test_a_patient_more_takes_nobodys_label(fraction: float) -> None:
    """Else it would be a patient replaced, at twice the bound that the ledger counts with."""
    patients = tuple(f"patient {number // 2}" for number in range(400))
    labels = torch.arange(400) // 2 % 3 - 1  # of a third of the patients it is unknown

    def chosen(count: int) -> set[int]:
        split = Split(torch.zeros(count, 1, 2, 2), labels[:count], patients[:count], None)
        return set(rows_with_labels(split, fraction, least=5, key=3, alone=True).tolist())

    whole = chosen(400)
    for count in range(2, 400, 2):
        assert chosen(count) == {row for row in whole if row < count}
    assert abs(len(whole) - fraction * 266) <= 40
    assert all((row ^ 1) in whole for row in whole)
