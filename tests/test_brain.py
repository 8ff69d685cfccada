"""The procedural head: nested tumours, contrasts as in real scans, exact masks; a pure function of its arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from medfl.data.brain import Brain
from medfl.data.sample import UNLABELLED, Records, present
from medfl.errors import ConfigError

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "data" / "brain.yaml"
MODALITIES = ("flair", "t1ce", "t1", "t2")


def brain(**changes: Any) -> Brain:
    arguments = yaml.safe_load(CONFIG.read_text())
    del arguments["_target_"]
    return Brain(**(arguments | {"seed": 0, "count": 16} | changes))


def drawn(records: Records) -> torch.Tensor:
    assert records.masks is not None
    return records.masks


def grown(mask: torch.Tensor) -> torch.Tensor:
    """A boolean mask (N, H, W) and the four neighbours of its pixels."""
    padded = F.pad(mask, (1, 1, 1, 1))
    return mask | padded[:, 2:, 1:-1] | padded[:, :-2, 1:-1] | padded[:, 1:-1, 2:] | padded[:, 1:-1, :-2]


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        ({}, (64, 64)),
        ({"spatial_dims": 3, "size": 32}, (32, 32, 32)),
        ({"spatial_dims": 3, "size": 40, "depth": 16}, (40, 40, 16)),
    ],
)
def test_images_are_in_range_with_every_tumour_part_and_depend_on_the_seed(
    changes: dict[str, Any], grid: tuple[int, ...]
) -> None:
    records = brain(**changes).load()
    assert records.images.shape == (16, 4, *grid)
    assert records.spacing == (192 / grid[0],) * len(grid)
    assert (records.modalities, records.classes, records.labels.unique().tolist()) == (MODALITIES, (), [-1])
    assert len(set(records.patients)) == 16
    assert records.images.max() <= 1
    assert bool(present(records.images).all())
    inside = records.images > 0
    assert torch.equal(inside[:, 0], inside[:, 3])  # one brain
    assert bool((records.images[inside] >= 0.02).all())
    assert 0.15 < float(inside.float().mean()) < 0.7
    assert all(mask.unique().tolist() == [0, 1, 2, 3] for mask in drawn(records))
    assert bool(inside[:, 0][drawn(records) > 0].all())
    again, other = brain(**changes).load(), brain(**changes, seed=1).load()
    assert torch.equal(again.images, records.images)
    assert torch.equal(drawn(again), drawn(records))
    assert not torch.equal(other.images, records.images)


def test_the_core_is_in_the_rim_and_the_rim_in_the_tumour() -> None:
    mask = drawn(brain(size=128).load())
    core, rim, oedema = mask == 1, mask == 3, mask == 2
    around_core = grown(core) & ~core
    assert rim[around_core].float().mean() > 0.95  # the rest is where the brain ends
    assert oedema[grown(core)].sum() == 0
    around_rim = grown(core | rim) & ~(core | rim)
    assert oedema[around_rim].float().mean() > 0.7  # the rest is fluid, or outside the brain


def test_contrasts_show_what_real_ones_show() -> None:
    records = brain(size=96, noise=0.0).load()
    mask, flair, t1ce, t1, t2 = drawn(records), *records.images.unbind(1)
    fluid = (mask == 0) & (flair > 0) & (flair < 0.2)
    healthy = (mask == 0) & (flair > 0.35)
    core, oedema, rim = (mask == label for label in (1, 2, 3))

    def mean(image: torch.Tensor, where: torch.Tensor) -> float:
        return float(image[where].mean())

    assert fluid.sum() > 1000
    assert mean(flair, oedema) > 1.3 * mean(flair, healthy) > 2 * mean(flair, fluid)
    assert mean(t1ce, rim) > 1.2 * mean(t1ce, healthy) > 1.2 * mean(t1ce, core)
    assert mean(t1, core | oedema | rim) < 0.8 * mean(t1, healthy)
    assert mean(t1, fluid) < 0.5 * mean(t1, healthy)
    assert min(mean(t2, oedema), mean(t2, fluid)) > 1.3 * mean(t2, healthy)


def test_a_texture_is_partly_common_to_all_modalities() -> None:
    flair, _, t1, _ = brain(size=64, noise=0.0, count=40).load().images.unbind(1)
    fine = [image - F.avg_pool2d(image[:, None], 5, 1, 2, count_include_pad=False)[:, 0] for image in (flair, t1)]
    middle = [image[:, 18:30, 38:46].flatten() for image in fine]  # mostly one tissue
    assert 0.1 < float(torch.corrcoef(torch.stack(middle))[0, 1]) < 0.95


def test_shift_moves_every_modality_but_the_first_and_not_the_mask() -> None:
    still, moved = brain(noise=0.0).load(), brain(noise=0.0, shift=12.0).load()
    assert torch.equal(drawn(still), drawn(moved))
    torch.testing.assert_close(still.images[:, 0], moved.images[:, 0], rtol=0, atol=1e-6)
    axis = (torch.arange(64) - 31.5) * 3.0  # mm
    weight = (moved.images > 0).float()
    centre = torch.stack([weight.sum(3) @ axis, weight.sum(2) @ axis], dim=-1) / weight.sum((2, 3))[..., None]
    distance = (centre[:, 1:] - centre[:, :1]).norm(dim=-1)
    assert float(distance.max()) < 12.5
    assert float(distance.mean()) > 4
    assert float((centre[:, 1] - centre[:, 2]).norm(dim=-1).mean()) > 4  # each in its own direction


def test_modalities_come_in_the_wanted_order_and_some_masks_are_unknown() -> None:
    records = brain(modalities=["t2", "flair"], channels=2, noise=0.0, unlabelled=0.25).load()
    mask = drawn(records)
    unknown = (mask == UNLABELLED).flatten(1).all(1)
    assert int(unknown.sum()) == 4
    assert not (mask[~unknown] == UNLABELLED).any()
    core = mask == 1
    assert records.images[:, 0][core].mean() > 1.2 * records.images[:, 1][core].mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "head"}, r"data\.name: got 'head', need 'brain'"),
        ({"modalities": ["flair", "pd"]}, r"data\.modalities: .* need different ones of flair, t1ce, t1, t2"),
        ({"modalities": ["flair", "flair"]}, r"data\.modalities: .* need different ones"),
        ({"channels": 3}, r"data\.channels: got 3, need 4, one per modality"),
        ({"depth": 8}, r"data\.depth: got 8, need .* null in 2D"),
        ({"size": 8}, r"data\.size: got 8, need an integer of at least 16"),
        ({"shift": -1}, r"data\.shift: got -1, need mm"),
        ({"unlabelled": 1.5}, r"data\.unlabelled: got 1\.5, need from 0 to 1"),
    ],
)
def test_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        brain(**changes)
