"""A site's real images as the reference of curation: what is usual among them sets the limits of every test."""

from dataclasses import dataclass

import torch
from torch import Tensor

from medfl.errors import DataError
from medfl.synthesis.copies import BATCH, Calibration, Features, Gallery, Scores, compare, planted, unit_rows
from medfl.synthesis.realism import Manifold
from medfl.synthesis.sanity import Range, ranges

FALSE_ALARMS = 0.01  # of each of the three copy tests, among other patients' real images
LEAST_REAL, LEAST_HELD_OUT = 6, 2  # below, nothing can be computed
REFUSED_REAL = 0.05  # of held-out images, by the realism test
FOUND = 0.95  # of planted copies, of every kind
DUPLICATED = 0.95  # quantile of the real images' nearest-neighbour cosine


@dataclass(frozen=True)
class Reference:
    """What candidates are compared with.

    Attributes:
        real, held_out: training images, and images of other patients, without those that repeat a training image.
        repeats: how many did.
        features: as given to `curate`.
        gallery, beside, known: the training images, the units (m, F) of `held_out`, and the scores of these.
        calibration, realism, sanity, alike: the limits of the tests.
        found: share of the training images copied on purpose that the copy test finds, by kind.
    """

    real: Tensor
    held_out: Tensor
    repeats: int
    features: Features
    gallery: Gallery
    beside: Tensor
    known: Scores
    manifold: Manifold
    calibration: Calibration
    realism: float
    sanity: dict[str, Range]
    alike: float
    found: dict[str, float]

    def thresholds(self) -> dict[str, float]:
        """By name, in the unit of each score; low and high of a range."""
        limits = {f"{name}_{end}": value for name, span in self.sanity.items() for end, value in vars(span).items()}
        return {**limits, "rho": self.realism, **self.calibration.thresholds(), "duplicate": self.alike}


def prepare(real: Tensor, held_out: Tensor, features: Features, *, seed: int) -> Reference:
    """The reference made of a site's images, with the limits that they set.

    Raises:
        DataError: too few images, images of different shapes, or some that are not finite.
    """
    _check(real, held_out)
    gallery, plants = Gallery.of(real, features), planted(real, seed)
    others = _other_patients(held_out, plants, gallery, features)
    beside = unit_rows(others, features)
    known = compare(others, gallery, beside, features, itself=True)
    calibration = Calibration.on(known, false_alarms=FALSE_ALARMS)
    manifold = Manifold.of(gallery.units)
    flags = {kind: calibration.flags(compare(copies, gallery, beside, features)) for kind, copies in plants.items()}
    return Reference(
        real=real,
        held_out=others,
        features=features,
        gallery=gallery,
        beside=beside,
        known=known,
        repeats=len(held_out) - len(others),
        manifold=manifold,
        calibration=calibration,
        realism=min(1.0, float(manifold.realism(beside).quantile(REFUSED_REAL))),
        sanity=ranges(real),
        alike=_usual_neighbor(gallery.units),
        found={kind: share(flag.any(dim=1)) for kind, flag in flags.items()},
    )


def _other_patients(held_out: Tensor, plants: dict[str, Tensor], gallery: Gallery, features: Features) -> Tensor:
    """The held-out images that do not repeat a training image.

    One whose voxels are as close to a training image as those of near-copies are is the same scan, or one of the
    same patient. It cannot show how alike other patients are: with it, the limit would let every copy pass.
    """
    nothing = gallery.units[:1]  # no ratio is read here
    close = min(
        float(compare(images, gallery, nothing, features).ncc.quantile(1 - FOUND)) for images in plants.values()
    )
    new = compare(held_out, gallery, nothing, features).ncc < close
    return held_out[new.to(held_out.device)] if int(new.sum()) >= LEAST_HELD_OUT else held_out


def _check(real: Tensor, held_out: Tensor) -> None:
    for name, images, least in (("training", real, LEAST_REAL), ("held-out", held_out, LEAST_HELD_OUT)):
        if len(images) < least:
            raise DataError(f"curation: got {len(images)} {name} images, need at least {least}. Add patients.")
        if not bool(images.isfinite().all()):
            raise DataError(f"curation: {name} images hold NaN or infinity. Take them out of the data set.")
    if real.shape[1:] != held_out.shape[1:]:
        raise DataError(
            f"curation: got training images {tuple(real.shape[1:])} and held-out images {tuple(held_out.shape[1:])}, "
            "need one shape (C, *S). Resample them."
        )


def _usual_neighbor(units: Tensor) -> float:
    """The cosine that 95 % of the real images do not reach with their nearest neighbour."""
    nearest = [(part @ units.T).topk(2, dim=1).values[:, 1] for part in torch.split(units, BATCH)]  # itself comes first
    return float(torch.cat(nearest).quantile(DUPLICATED))


def share(flags: Tensor) -> float:
    return float(flags.double().mean())
