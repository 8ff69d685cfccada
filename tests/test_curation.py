"""Curation finds what is planted: copies, noise, duplicates; and lets other patients' images pass."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.data.phantom import Phantom
from medfl.errors import ConfigError, DataError
from medfl.synthesis import alignment
from medfl.synthesis.alignment import Templates, aligned, likeliest, margins, prepared, variants
from medfl.synthesis.copies import Calibration, Scores, planted
from medfl.synthesis.curation import KEPT, Curation, curate
from medfl.synthesis.sheet import contact_sheet
from medfl.views.spatial import resample

SIZES = {2: 24, 3: 12}
DIMS = pytest.mark.parametrize("dims", [2, 3])


@functools.cache
def anatomies(dims: int, *, size: int, count: int) -> Tensor:
    settings: dict[str, Any] = {"classes": ("none", "smooth"), "contrast": 0.5, "noise": 0.02, "seed": 3}
    made = Phantom(
        name="anatomy", spatial_dims=dims, channels=1, size=size, count=count, images_per_patient=1, **settings
    )
    return made.load().images


def sets(dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images, calibration images and new images, all of different patients."""
    images = anatomies(dims, size=SIZES[dims], count=139)
    return images[:60], images[60:115], images[115:]


def features(images: Tensor) -> Tensor:
    """Coarse pixels and their deviations: no training, and no dependence on the batch."""
    pool = F.avg_pool2d if images.ndim == 4 else F.avg_pool3d
    return torch.cat([pool(images, 3).flatten(1), images.flatten(1).std(1, keepdim=True)], dim=1)


def candidates_of(dims: int) -> dict[str, Tensor]:
    real, _, new = sets(dims)
    noise = torch.randn(real[:4].shape, generator=torch.Generator().manual_seed(1))
    checks = torch.ones(4, 1, *[SIZES[dims]] * dims)
    checks[..., ::2] = -1
    return {
        "new": new,
        "noisy": real[:4] + 0.04 * noise,
        "flipped": real[4:8].flip(-1),
        "shifted": real[8:12].roll(1, -1),
        "white noise": noise.clamp(-1, 1),
        "checks": checks,
    }


@functools.cache
def curated(dims: int) -> tuple[Curation, dict[str, list[int]]]:
    """All kinds of candidates curated at once, and where each kind is."""
    real, held_out, _ = sets(dims)
    candidates, places, end = candidates_of(dims), dict[str, list[int]](), 0
    for kind, images in candidates.items():
        places[kind], end = list(range(end, end + len(images))), end + len(images)
    return curate(torch.cat(list(candidates.values())), real, held_out, features, keep=12, seed=0), places


@DIMS
@pytest.mark.parametrize("kind", ["noisy", "flipped", "shifted"])
def test_near_copies_are_found(kind: str, dims: int) -> None:
    found, places = curated(dims)
    assert bool(found.copies[places[kind]].all())
    assert KEPT not in {found.reasons[place] for place in places[kind]}


@DIMS
@pytest.mark.parametrize("kind", ["white noise", "checks"])
def test_what_is_no_image_is_refused_before_all_else(kind: str, dims: int) -> None:
    found, places = curated(dims)
    assert {found.reasons[place] for place in places[kind]} <= {"sanity", "realism"}


@DIMS
def test_new_patients_pass_and_the_budget_holds(dims: int) -> None:
    found, places = curated(dims)
    reasons = [found.reasons[place] for place in places["new"]]
    assert float(found.copies[places["new"]].double().mean()) <= 0.1
    assert sum(reason in (KEPT, "budget") for reason in reasons) >= 0.7 * len(reasons)
    assert len(found.kept) == found.reasons.count(KEPT) <= 12
    rho = found.scores["rho"][found.kept].tolist()
    assert rho == sorted(rho, reverse=True)


def test_verdicts_depend_neither_on_other_candidates_nor_on_the_seed() -> None:
    real, held_out, new = sets(2)
    all_at_once, _ = curated(2)
    alone = curate(torch.cat([new[:4], new[:4]]), real, held_out, features, keep=12, seed=5)
    for name in ("rho", "similarity", "ratio", "ncc"):
        torch.testing.assert_close(alone.scores[name][:4], all_at_once.scores[name][:4], rtol=0, atol=1e-6)
    assert alone.copies[:4].tolist() == alone.copies[4:].tolist() == all_at_once.copies[:4].tolist()
    first, second = alone.reasons[:4], alone.reasons[4:]
    assert first.count(KEPT) >= 1
    assert all(again != KEPT for reason, again in zip(first, second, strict=True) if reason == KEPT)  # equal images


def test_a_broken_candidate_is_refused_and_harms_nobody() -> None:
    real, held_out, new = sets(2)
    broken = new[:4].clone()
    broken[1, 0, 3, 3] = float("nan")
    found, plain = (curate(c, real, held_out, features, keep=4, seed=0) for c in (broken, new[:4]))
    assert found.reasons[1] == "sanity"
    others = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found.scores["ncc"][others], plain.scores["ncc"][others])
    assert json.loads(json.dumps(found.record()))["counts"]["sanity"] >= 1


def test_too_few_other_patients_or_too_many_copies_forbid_sharing() -> None:
    real, held_out, new = sets(2)
    few = curate(new[:4], real, held_out[:30], features, keep=2, seed=0)
    assert not few.exportable
    assert any("needs 50 to know what a copy is" in text for text in few.objections)
    copied = curate(candidates_of(2)["noisy"], real, held_out, features, keep=2, seed=0)
    assert any("copies of training images" in text for text in copied.objections)
    assert copied.record()["copies"]["share_low"] > 0.1


def test_limits_are_the_held_out_images_own() -> None:
    m, rate = 199, 0.02
    values = (torch.randperm(m, generator=torch.Generator().manual_seed(0)).double() + 1) / (m + 2)
    known = Scores(values, 1 - values, values, torch.zeros(m, dtype=torch.int64))
    limits = Calibration.on(known, false_alarms=rate).limits
    above = (known.evidence() > limits).sum(0)
    assert ((above + 1) / (m + 1) <= rate).all()  # one more image exceeds a limit with this probability
    assert ((above + 2) / (m + 1) > rate).all()  # and no lower limit would do


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"keep": -1}, ConfigError, "need the number of images to keep"),
        ({"candidates": torch.zeros(2, 1, 8, 8)}, DataError, "need one shape"),
        ({"real": torch.zeros(2, 1, 24, 24)}, DataError, "got 2 training images"),
    ],
)
def test_what_cannot_be_curated_is_said(change: dict[str, Any], error: type[Exception], text: str) -> None:
    real, held_out, new = sets(2)
    given: dict[str, Any] = {"candidates": new, "real": real, "held_out": held_out, "keep": 3} | change
    with pytest.raises(error, match=text):
        curate(given["candidates"], given["real"], given["held_out"], features, keep=given["keep"], seed=0)


@DIMS
def test_the_contact_sheet_is_a_picture(dims: int, tmp_path: Path) -> None:
    candidates = torch.cat(list(candidates_of(dims).values()))
    contact_sheet(tmp_path / "sheet.png", candidates, curated(dims)[0], real=sets(dims)[0])
    from matplotlib.image import imread

    picture = imread(tmp_path / "sheet.png")
    assert picture.shape[1] > 500
    assert picture[..., :3].std() > 0.05


def correlation(image: Tensor, reference: Tensor) -> float:
    """The largest over mirror images, turns and whole voxels of shift, by loops, in float64."""
    image, reference = image.double(), reference.double()
    dims, room = image.ndim - 1, margins(image[None])
    rim = alignment.RIM
    inner = [slice(margin + rim, side - margin - rim) for margin, side in zip(room, image.shape[1:], strict=True)]
    centre = reference[(slice(None), *inner)].flatten(1)
    centre = (centre - centre.mean(1, keepdim=True)).flatten()
    best = -1.0
    for variant in variants(image[None].float(), alignment.TURNS[dims]):
        for shifts in itertools.product(*[range(-margin, margin + 1) for margin in room]):
            place = [slice(part.start + shift, part.stop + shift) for part, shift in zip(inner, shifts, strict=True)]
            window = variant[0].double()[(slice(None), *place)].flatten(1)
            window = (window - window.mean(1, keepdim=True)).flatten()
            best = max(best, float(window @ centre / (window.norm() * centre.norm())))
    return best


@DIMS
def test_alignment_is_the_best_of_all_whole_shifts_or_between_two(dims: int) -> None:
    real, _, new = sets(dims)
    templates = Templates.of(real[:3])
    found = aligned(new[:2], templates, torch.tensor([[0, 2], [1, 2]]))
    for image, row, values in zip(prepared(new[:2]), [(0, 2), (1, 2)], found.tolist(), strict=True):
        for place, value in zip(row, values, strict=True):
            whole = correlation(image, templates.images[place])
            assert whole - 1e-5 <= value <= whole + 0.03


@DIMS
def test_a_shift_by_the_whole_margin_is_found(dims: int) -> None:
    real = anatomies(dims, size=24 if dims == 2 else 16, count=12)
    templates, axes = Templates.of(real), list(range(2, real.ndim))
    for signs in itertools.product((-1, 1), repeat=dims):
        shifts = [sign * margin for sign, margin in zip(signs, margins(real), strict=True)]
        own = aligned(real.roll(shifts, axes), templates, torch.arange(len(real))[:, None])
        assert float(own.min()) > 0.999


@pytest.mark.parametrize(("dims", "size"), [(2, 28), (2, 40), (3, 28)])  # compared at 28, 32 and 20 voxels a side
def test_a_shift_by_half_a_voxel_is_found(dims: int, size: int) -> None:
    real = anatomies(dims, size=size, count=12)
    maps = torch.cat([torch.eye(dims), torch.full((dims, 1), 0.5)], dim=1)
    shifted = resample(real, maps.expand(len(real), -1, -1), padding="border")
    own = aligned(shifted, Templates.of(real), torch.arange(len(real))[:, None])
    assert float(own.min()) > 0.99


@DIMS
def test_the_likeliest_templates_are_few_and_hold_the_source_of_every_copy(
    dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "LEFT", 16)  # of 60
    monkeypatch.setattr("medfl.synthesis.copies.PLANTED", 12)
    real, _, _ = sets(dims)
    templates = Templates.of(real)
    source = likeliest(planted(real, 0)["flip"], templates, 1)
    for copies in planted(real, 0).values():
        chosen = likeliest(copies, templates, 5)
        assert chosen.shape == (12, 5)
        assert (chosen == source).any(dim=1).all()
