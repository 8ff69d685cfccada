import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import Tensor

from medfl.data.subject import REGIONS
from medfl.evaluation.segmentation_metrics import hd95, region_scores, segmentation_scores

Bools = NDArray[np.bool_]


def region(*size: int, seed: int, share: float = 0.5) -> Tensor:
    """A random region of connected blocks, (*size) bool."""
    coarse = torch.rand([side // 3 + 1 for side in size], generator=torch.Generator().manual_seed(seed)) < share
    for axis, side in enumerate(size):
        coarse = coarse.repeat_interleave(3, dim=axis).narrow(axis, 0, side)
    return coarse


def scipy_hd95(found: Bools, real: Bools, spacing: tuple[float, ...]) -> float:
    """By distance transforms of the whole grid."""
    edges = [part & ~binary_erosion(part) for part in (found, real)]
    far = [distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    return float(max(np.percentile(far[1][edges[0]], 95), np.percentile(far[0][edges[1]], 95)))


def test_counted_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 3], [0, 2, 3, 3]])[None]
    found = torch.tensor([[0, 1, 1, 0], [0, 2, 3, 3], [0, 0, 2, 3]])[None]
    scored = segmentation_scores(found, truth, spacing=(1, 1), regions=REGIONS)
    scores = {name: value.item() for name, value in scored.items()}
    # WT: 8 real, 7 found, 6 of both; TC: 5, 5 and 3; ET: 3, 3 and 2; of 12 pixels
    for name, tp, fp, fn in (("wt", 6, 1, 2), ("tc", 3, 2, 2), ("et", 2, 1, 1)):
        tn = 12 - tp - fp - fn
        assert scores[f"dice_{name}"] == scores[f"dice_{name}_present"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
        assert scores[f"iou_{name}"] == scores[f"iou_{name}_present"] == pytest.approx(tp / (tp + fp + fn))
        assert scores[f"sensitivity_{name}"] == pytest.approx(tp / (tp + fn))
        assert scores[f"specificity_{name}"] == pytest.approx(tn / (tn + fp))
        assert scores[f"accuracy_{name}"] == pytest.approx((tp + tn) / 12)
    assert scores["dice"] == pytest.approx((12 / 15 + 6 / 10 + 4 / 6) / 3)
    assert scores["iou"] == pytest.approx((6 / 9 + 3 / 7 + 2 / 4) / 3)


masks = st.lists(st.integers(0, 3), min_size=24, max_size=24)


@given(masks, masks)
@settings(max_examples=30, deadline=None)
def test_scores_are_those_of_sets_of_voxels(found: list[int], real: list[int]) -> None:
    grids = [torch.tensor(values, dtype=torch.uint8).view(1, 4, 3, 2) for values in (found, real)]
    scored = segmentation_scores(*grids, spacing=(1, 1, 1), regions=REGIONS)
    scores = {name: value.item() for name, value in scored.items()}
    for name, labels in REGIONS.items():
        p, t = ({place for place, label in enumerate(values) if label in labels} for values in (found, real))
        rule = 1.0 if not p else 0.0
        expected = {
            "dice": 2 * len(p & t) / (len(p) + len(t)) if t else rule,
            "iou": len(p & t) / len(p | t) if t else rule,
            "sensitivity": len(p & t) / len(t) if t else rule,
            "specificity": 1 - len(p - t) / (24 - len(t)) if len(t) < 24 else math.nan,
            "accuracy": 1 - len(p ^ t) / 24,
        }
        for metric, value in expected.items():
            assert scores[f"{metric}_{name}"] == pytest.approx(value, nan_ok=True)
        for metric in ("dice", "iou", "sensitivity", "hd95"):
            value = scores[f"{metric}_{name}"] if t else math.nan
            assert scores[f"{metric}_{name}_present"] == pytest.approx(value, nan_ok=True)
    for metric in ("dice", "iou", "hd95"):
        assert scores[metric] == pytest.approx(sum(scores[f"{metric}_{name}"] for name in REGIONS) / 3)
    assert "specificity_wt_present" not in scores


@pytest.mark.parametrize(
    ("size", "spacing"), [((30, 26), (1.0, 1.0)), ((31, 20), (0.5, 2.0)), ((16, 14, 12), (1.0, 1.5, 4.0))]
)
def test_hd95_is_that_of_distance_transforms(size: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    found, real = (torch.stack([region(*size, seed=seed + row) for row in range(4)]) for seed in (0, 10))
    found[3], real[3] = False, False
    found[3].view(-1)[:2], real[3].view(-1)[-1] = True, True  # corners of the image
    values = hd95(found, real, spacing=spacing)
    for row in range(4):
        expected = scipy_hd95(found[row].numpy(), real[row].numpy(), spacing)
        assert values[row] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(hd95(real, found, spacing=spacing), values)


def test_hd95_is_monais() -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    found, real = (torch.stack([region(14, 15, 9, seed=seed + row) for row in range(3)]) for seed in (20, 30))
    reference = compute_hausdorff_distance(
        found[:, None], real[:, None], include_background=True, percentile=95, spacing=[1.0, 1.0, 2.5]
    )
    torch.testing.assert_close(hd95(found, real, spacing=(1, 1, 2.5)), reference[:, 0].double(), rtol=1e-6, atol=0)


def test_any_regions_have_monais_values() -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.meaniou import compute_iou

    regions, spacing = {"anterior": (1,), "posterior": (2,), "both": (1, 2), "cyst": (3,)}, (1.0, 0.5, 2.0)
    found, real = (
        torch.stack([sum(region(9, 12, 8, seed=seed + row + 50 * k).byte() for k in range(4)) for row in range(3)])
        for seed in (0, 7)
    )
    scores = segmentation_scores(found, real, spacing=spacing, regions=regions)
    p, t = (
        torch.stack([torch.isin(part, torch.tensor(labels, dtype=torch.uint8)) for labels in regions.values()], dim=1)
        for part in (found, real)
    )
    assert bool(t.flatten(2).any(2).all())
    references = {
        "dice": compute_dice(p.float(), t.float()),
        "iou": compute_iou(p.float(), t.float()),
        "hd95": compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=list(spacing)),
    }
    for metric, reference in references.items():
        for column, name in enumerate(regions):
            torch.testing.assert_close(scores[f"{metric}_{name}"], reference[:, column].double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scores[metric], reference.double().mean(1), rtol=1e-6, atol=1e-6)


def test_hd95_of_a_moved_cube_is_the_move_in_mm() -> None:
    real, found = torch.zeros(2, 1, 30, 20, 20, dtype=torch.bool)
    real[:, 4:10, 5:11, 5:11] = True
    found[:, 9:15, 5:11, 5:11] = True
    assert hd95(found, real, spacing=(0.7, 1, 1)).item() == pytest.approx(5 * 0.7)
    assert hd95(real, real, spacing=(0.7, 1, 1)).item() == 0


def test_empty_regions_follow_the_rule_and_warn_nobody() -> None:
    something = region(12, 10, 8, seed=1)
    nothing = torch.zeros_like(something)
    found, real = torch.stack([nothing, something, nothing]), torch.stack([nothing, nothing, something])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = region_scores(found, real, spacing=(1, 2, 3))
    assert scores["dice"].tolist() == scores["iou"].tolist() == scores["sensitivity"].tolist() == [1, 0, 0]
    assert scores["hd95"].tolist() == pytest.approx([0, *[math.hypot(12, 20, 24)] * 2])
    assert scores["specificity"].tolist() == pytest.approx([1, 1 - float(something.float().mean()), 1])
    brats = torch.zeros(1, 240, 240, 155, dtype=torch.bool)
    assert hd95(brats, ~brats, spacing=(1, 1, 1)).item() == pytest.approx(373.1287, abs=1e-3)


def test_rows_do_not_know_each_other() -> None:
    found, real = (
        torch.randint(4, (3, 8, 7, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        for seed in (0, 1)
    )
    sizes = {"spacing": (1, 1, 2), "regions": REGIONS}
    together = segmentation_scores(found, real, **sizes)
    alone = [segmentation_scores(found[i : i + 1], real[i : i + 1], **sizes) for i in range(3)]
    assert len(together) == 33
    for name, values in together.items():
        torch.testing.assert_close(values, torch.cat([row[name] for row in alone]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="need equal shapes"):
        segmentation_scores(torch.zeros(1, 3, 3), torch.zeros(1, 3, 4), spacing=(1, 1), regions=REGIONS)
    with pytest.raises(ValueError, match="spacing of 3 axes"):
        segmentation_scores(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), spacing=(1, 1, 1), regions=REGIONS)
    with pytest.raises(ValueError, match="masks without a region"):
        segmentation_scores(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), spacing=(1, 1), regions={})
