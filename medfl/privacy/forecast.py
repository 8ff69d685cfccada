"""What a whole study would cost the patients of one site, before it starts."""

from medfl.privacy.accounting import BUCKET, PATIENT, Release
from medfl.privacy.units import sampling
from medfl.protection import Privacy
from medfl.study import AT_ONE_SITE, Study


def forecast(study: Study, patients: int, *, sites: int, books: bool) -> list[Release]:
    """All that a site with so many training patients releases if every stage runs once; [] without a mechanism.

    Args:
        sites: of the study: a lone site takes everybody's steps.
        books: whether the method has codebooks, whose sums are released too.
    """
    privacy, training, tuning = study.privacy, study.training, study.finetune
    if not privacy.on:
        return []
    found: list[Release] = []
    arms = [arm for arm in ("random", "federated", "local") if arm in study.arms]
    if "pretrain" in study.stages and study.encoders is None:
        for arm in arms:
            steps = 0 if arm == "random" else training.steps * (sites if arm == "local" else 1)
            found.append(_training(privacy, patients, training.batch_size, steps * study.rounds.count))
            passes = 1 + (study.rounds.count if steps else 0)
            rate = min(1.0, study.rounds.refresh_volumes / patients)
            found.append(Release(PATIENT, privacy.codes_noise, rate, passes * books))
    if "finetune" in study.stages:
        for protocol in tuning.protocols:
            for fraction in tuning.fractions:
                tuned = [arm for arm in arms if arm != "local" or protocol in AT_ONE_SITE]
                steps = tuning.steps * (sites if protocol in AT_ONE_SITE else 1) * tuning.rounds * len(tuned)
                labelled = max(1, round(fraction * patients))
                found.append(_training(privacy, labelled, tuning.batch_size, steps))
    return [release for release in found if release.steps]


def _training(privacy: Privacy, patients: int, batch: int, steps: int) -> Release:
    _, rate = sampling(privacy, patients, batch)
    return Release(PATIENT if privacy.mechanism == "patient" else BUCKET, privacy.noise, rate, steps)
