"""Differential privacy at one site: every release is booked in its ledger before it is made."""

from pathlib import Path

import torch
from torch import Tensor

from medfl.errors import ConfigError
from medfl.methods.base import Method
from medfl.privacy import codes
from medfl.privacy.accounting import BUCKET, PATIENT, Release
from medfl.privacy.gradients import PrivateGradients
from medfl.privacy.ledger import Ledger
from medfl.privacy.secret import Secret
from medfl.privacy.units import Units, bucket_key, rows_of, units_of
from medfl.study import Study
from medfl.training import Device, Plan, Task


class Guard:
    """The privacy of a site's patients in one study.

    Args:
        method: one that `isolate` has been called on.
        patients: (N,) codes of the site's training images.

    Raises:
        ConfigError: synthetic images, which were made of patients without any privacy; a δ that one patient in all
            can be given away under.
    """

    def __init__(self, study: Study, site: str, method: Method, patients: Tensor) -> None:
        if study.training.synthetic:
            raise ConfigError(
                "training.synthetic: images that were made of patients have no privacy to keep. Set it to 0, or take "
                "privacy=none."
            )
        self.study, self.method, self.patients = study, method, patients
        people = len(torch.unique(patients))
        self.delta = study.privacy.delta or 1 / (10 * people)
        if self.delta * people > 1:
            raise ConfigError(
                f"privacy.delta: got {self.delta:g} at a site of {people} patients, need at most 1 / {people}: to "
                "publish one patient in full would pass under it. Lower it, or set it to null."
            )
        self.ledger = Ledger.of(Path(study.state_dir), site)
        self._key = bucket_key(self.ledger.path.with_suffix(".key"))
        self._units: tuple[Task, Units] | None = None  # of the last task

    def units(self, task: Task) -> Units:
        """Who is sampled in the steps of this task."""
        if self._units is None or self._units[0] is not task:
            patients = self.patients if task.patients is None else task.patients
            found = units_of(patients, self.study.privacy, batch=self.study.training.batch_size, key=self._key)
            self._units = task, found
        return self._units[1]

    def book(self, releases: list[Release], *, phase: str, arm: str, number: int, last: bool) -> dict[str, float]:
        """Write down what is about to be released; the numbers that may be told of it.

        Args:
            last: whether the last round of the arm: then the tighter accountant is told too.

        Raises:
            PrivacyError: the budget does not allow it.
        """
        if not releases:
            return {}
        privacy, study = self.study.privacy, self.study.study_id or "simulation"
        total = self.ledger.book(
            releases, self.delta, privacy.max_epsilon, study=study, tight=last, phase=phase, arm=arm, round=number
        )
        told = {"site/epsilon_rdp": total.rdp, "site/delta": self.delta}
        tight = {"site/epsilon": total.epsilon} if last else {}
        return told | tight

    def of_training(self, task: Task, steps: int) -> list[Release]:
        privacy, units = self.study.privacy, self.units(task)
        unit = PATIENT if privacy.mechanism == "patient" else BUCKET
        return [Release(unit, privacy.noise, units.rate, steps)]

    def of_codes(self) -> list[Release]:
        """Of a refresh pass; a method without codebooks releases nothing there."""
        return [Release(PATIENT, self.study.privacy.codes_noise, self._rate, 1)] if self.method.codebooks() else []

    def gradients(self, task: Task, plan: Plan, where: Device) -> PrivateGradients:
        return PrivateGradients(self.method, task, plan, where, self.study.privacy, self.units(task))

    @property
    def _rate(self) -> float:
        return min(1.0, self.study.rounds.refresh_volumes / len(self.patients))

    @torch.no_grad()
    def codes(self, images: Tensor, where: Device) -> dict[str, Tensor]:
        """The noised sums of the codebooks over a Poisson sample of the patients; {} without codebooks."""
        if not self.method.codebooks():
            return {}
        secret, privacy = Secret(), self.study.privacy
        own = list(rows_of(self.patients).values())
        rows = [secret.some(own[int(place)], privacy.images) for place in secret.chosen(len(own), self._rate)]
        owners = torch.cat([torch.full((len(part),), place) for place, part in enumerate(rows)] or [torch.empty(0)])
        shares = torch.cat([torch.full((len(part),), 1 / len(part)) for part in rows] or [torch.empty(0)])
        chosen = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
        self.method.train()
        with codes.PatientSums(self.method, max(1, len(rows)), privacy.codes_clip) as sums, where.autocast():
            for part in torch.split(torch.arange(len(chosen)), self.study.training.batch_size):
                sums.owners, sums.shares = owners[part].long().to(where.device), shares[part].to(where.device)
                self.method.observe(images[chosen[part].to(images.device)].to(where.device), 0.0)
        sums.fill(where.device)
        return codes.released(sums.rows, self.method, privacy, secret)
