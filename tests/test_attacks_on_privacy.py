"""The audit: its lower bound stays below an honest claim, and broken builds are caught."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medfl import config
from medfl.audit.canaries import Lower, Marked, lower_bound, p_value
from medfl.audit.inversion import gradient, invert, judged
from medfl.audit.membership import inference
from medfl.audit.run import ledger_findings
from medfl.privacy.accounting import PATIENT, Release, spent
from medfl.privacy.ledger import Ledger
from medfl.privacy.secret import Secret
from medfl.privacy.units import Units
from medfl.run_folder import Event, RunFolder
from tests.test_privacy import CPU, PLAN, Quiet, each_apart, isolated, settings, task_of

DELTA, STEPS, NOISE, CANARIES = 1e-6, 4, 4.0, 58_000  # as one Gaussian of noise 2: ε is about 2.3


class TwoRows(Marked):
    """As where both views of a patient are clipped apart: it counts twice."""

    def summed(self, step: int) -> Tensor:
        plain = super(Marked, self).summed(step)
        return plain + 2 * (super().summed(step) - plain)


class Silent(Quiet):
    """A build that forgot the noise; `chosen` is as ever."""


def attacked(kind: type[Marked], seed: int, secret: type[Secret] = Secret) -> Lower:
    """Canaries through the product's own steps, all of them in every step. Known noise: a bound is a chance's, too."""
    method = isolated("task", "classification", 3).float()
    task = task_of(method, 3)
    task = type(task)(task.images.float(), task.labels, task.views, task.patients)
    privacy = settings(mechanism="patient", noise=NOISE, clip=0.5)
    apart = each_apart()
    units = Units(apart.patients[:2], apart.members[:2], 1.0)
    with kind(method, task, PLAN, CPU, privacy, units, secret(seed)) as gradients:
        gradients.mark(CANARIES, seed=seed)
        for step in range(STEPS):
            assert gradients(step % PLAN.steps) == {}
    return lower_bound(gradients.seen, gradients.part, DELTA)


def test_the_bound_stays_below_an_honest_claim_and_three_planted_faults_do_not(tmp_path: Path) -> None:
    claim = spent([Release(PATIENT, NOISE, 1.0, STEPS)], DELTA).epsilon
    honest = [attacked(Marked, seed).epsilon for seed in range(5)]
    assert all(0.5 < found <= claim for found in honest)
    assert attacked(Marked, 0, Silent).epsilon > claim  # no noise
    assert attacked(TwoRows, 0).epsilon > claim  # concatenated views
    study = config.compose(["privacy=patient", "method=byol", f"run.dir={tmp_path}"])
    folder = RunFolder.create(tmp_path, study.source, resume=False)
    ledger = Ledger.of(Path(study.state_dir), "site-1")
    for number in (1, 2, 3):
        ledger.book([Release(PATIENT, 2.0, 0.1, 20)], 1e-3, None, phase="pretrain", arm="federated", round=number)
        folder.write([Event("pretrain", "federated", number, "site-1", "site/epsilon_rdp", 1.0)])
    assert ledger_findings(folder, study) == []
    ledger.path.write_bytes(ledger.path.read_bytes().splitlines(keepends=True)[0])  # a ledger set back
    assert "lacks 2 of the 3" in ledger_findings(folder, study)[0]


def test_a_p_value_is_the_binomial_of_pure_privacy_and_falls_with_epsilon() -> None:
    from scipy import stats

    assert p_value(100, 50, 40, 1.0, 0.0) == pytest.approx(stats.binom.sf(39, 50, 1 / (1 + torch.e**-1)))
    values = [p_value(1000, 200, 190, epsilon, 1e-5) for epsilon in (0.0, 1.0, 2.0, 3.0, 4.0)]
    assert values == sorted(values)
    assert p_value(1000, 200, 190, 2.0, 1e-3) > p_value(1000, 200, 190, 2.0, 1e-5)
    draw = torch.Generator().manual_seed(0)
    assert lower_bound(torch.rand(2000, generator=draw), torch.rand(2000, generator=draw) < 0.5, DELTA).epsilon < 0.2


def test_membership_is_measured_as_it_was_planted() -> None:
    draw = torch.Generator().manual_seed(0)
    same, moved = torch.randn(4000, generator=draw), torch.randn(4000, generator=draw)
    nothing, plain = inference(same, moved), inference(same + 10, moved)
    assert abs(nothing.auc - 0.5) < 0.02
    assert nothing.found < 0.03
    assert (plain.auc, plain.found) == (pytest.approx(1.0, abs=1e-6), 1.0)


def test_one_image_is_found_from_its_own_gradient_and_not_from_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is one linear layer over the pixels gives the image away: the attack must see that."""
    monkeypatch.setattr("medfl.audit.inversion.SMOOTH", 0.0)
    from medfl.tasks.classification import Classification

    class Pixels(torch.nn.Module):
        width = 16 * 16

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(256))

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) * self.scale

    torch.manual_seed(0)
    method = Classification(encoder=Pixels(), classes=2, loss="cross_entropy", freeze=False)
    torch.nn.init.normal_(method.head.weight)
    image = torch.nn.functional.interpolate(torch.rand(1, 1, 4, 4), size=16, mode="bilinear") * 2 - 1
    others = torch.rand(4, 1, 16, 16) * 2 - 1
    label = torch.tensor([1])
    update = gradient(method, image, label)
    found = judged(invert(method, update, label, (1, 16, 16), seed=0), image, others)
    assert found.ssim > 0.8 > found.prior
    noise = [torch.randn_like(part) for part in update]
    assert judged(invert(method, noise, label, (1, 16, 16), seed=0), image, others).ssim < 0.5
    assert json.dumps(vars(found))
