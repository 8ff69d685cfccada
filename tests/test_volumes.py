import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medfl import config
from medfl.allowed import METRIC
from medfl.data.sample import UNLABELLED, SiteData, Split, slab_of
from medfl.data.subject import REGIONS
from medfl.errors import ConfigError
from medfl.evaluation.at_site import probe
from medfl.evaluation.fusion_metrics import FUSION
from medfl.evaluation.volumes import Table, fusion, mean_of_present, segmentation, windowed
from medfl.methods.base import Method
from medfl.study import Evaluation
from tests.test_fusion_metrics import textures

CPU = torch.device("cpu")
SIZE = (42, 41, 5)
PLAN = Evaluation(
    protocols=("fusion", "segmentation"),
    regularization=(1.0,),
    neighbours=3,
    resamples=50,
    batch_size=2,
    window=None,
    fractions=(1.0,),
    counts=None,
    pictures="none",
)


class Net(nn.Module):
    """Fuses by the maximum; segments by thresholds of the first modality. (B, M, *S) -> (B, 2)."""

    def fuse(self, images: Tensor) -> Tensor:
        return images.amax(1, keepdim=True)

    def segment(self, images: Tensor) -> Tensor:
        levels = torch.tensor([0.0, 0.3, 0.6, 0.9]).view(1, 4, *[1] * (images.ndim - 2))
        return -(images[:, :1] - levels).abs()

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(2).mean(2)


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def method(encoder: nn.Module) -> Method:
    found = Method()
    found.encoder = encoder
    return found.eval()


def site(images: Tensor, masks: Tensor | None, classes: tuple[str, ...] = ()) -> SiteData:
    count = len(images)
    split = Split(images, torch.arange(count) % 2 if classes else -torch.ones(count).long(), names(count), masks)
    regions = {} if masks is None else REGIONS
    return SiteData("A", split, split, split, classes, (1.0,) * (images.ndim - 2), "", held_out=False, regions=regions)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"patient-{i}" for i in range(count))


def subjects(count: int = 3, size: tuple[int, ...] = SIZE) -> Tensor:
    return textures(3 * count, *size).view(count, 3, *size)


def truth(images: Tensor) -> Tensor:
    return Net().segment(images).argmax(1).to(torch.uint8)


# windows


@pytest.mark.parametrize(
    ("size", "window"), [((40, 33), (16, 10)), ((20, 18, 12), (8, 18, 7)), ((20, 18, 12), (64, 8, 9)), ((9, 9), None)]
)
def test_windows_give_back_what_a_local_network_makes(size: tuple[int, ...], window: tuple[int, ...] | None) -> None:
    plan = dataclasses.replace(PLAN, window=window)
    x = torch.rand(3, 2, *size, generator=torch.Generator().manual_seed(0))

    def network(part: Tensor) -> Tensor:
        assert all(side <= w for side, w in zip(part.shape[2:], window or size, strict=True))
        return torch.cat([part.sum(1, keepdim=True), torch.full_like(part, 0.5)], 1)

    made = windowed(network, x, plan)
    torch.testing.assert_close(made[:, :1], x.sum(1, keepdim=True), rtol=0, atol=2e-6)
    torch.testing.assert_close(made[:, 1:], torch.full_like(x, 0.5), rtol=0, atol=1e-6)


def test_windows_are_blended_and_weigh_their_middle_most() -> None:
    plan, calls = dataclasses.replace(PLAN, window=(8,) * 2, batch_size=1), iter(range(100))
    made = windowed(lambda part: torch.full_like(part, next(calls)), torch.zeros(1, 1, 8, 16), plan)
    line = made[0, 0, 4]
    assert bool((line.diff() >= 0).all())
    assert line[0] == 0
    assert line[-1] == 2  # windows at 0, 4 and 8
    assert line[7] == pytest.approx(1, abs=0.1)


def test_a_window_of_other_axes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got \[8, 8\] for images of 3 axes"):
        windowed(lambda part: part, torch.zeros(1, 1, 8, 8, 8), dataclasses.replace(PLAN, window=(8, 8)))


# tables


@pytest.mark.parametrize("size", [(44, 42), SIZE])
def test_fusion_scores_each_image_with_at_least_two_modalities(size: tuple[int, ...]) -> None:
    x = subjects(4, size)
    x[0, :2] = 0  # one modality
    x[2, 1] = 0
    tables = fusion(Net(), site(x, None).test, PLAN, CPU)
    assert tables.keys() == {"fusion", "average"}
    fused = {"fusion": x.amax(1, keepdim=True), "average": mean_of_present(x)}
    for protocol, table in tables.items():
        assert table.patients == names(4)[1:]
        for name, metric in FUSION.items():
            expected = metric(fused[protocol][1:], x[1:])
            np.testing.assert_allclose(table.columns[name], expected.numpy(), rtol=1e-6)


def test_the_mean_is_over_what_is_there() -> None:
    x = torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    x[0, 1] = 0
    x[1] = 0
    made = mean_of_present(x)
    torch.testing.assert_close(made[0, 0], (x[0, 0] + x[0, 2]) / 2)
    torch.testing.assert_close(made[1], torch.zeros(1, 5, 4))
    torch.testing.assert_close(made[2, 0], x[2].mean(0))


def test_segmentation_scores_each_labelled_image() -> None:
    x = subjects(4)
    masks = truth(x)
    masks[1] = UNLABELLED
    masks[2] = 0
    table = segmentation(Net(), site(x, masks).test, PLAN, CPU, spacing=(1, 1, 1), regions=REGIONS)
    assert table.patients == ("patient-0", "patient-2", "patient-3")
    assert table.columns["dice_wt"].tolist() == [1, 0, 1]
    assert table.columns["hd95_wt"].tolist() == pytest.approx([0, math.hypot(*SIZE), 0])
    np.testing.assert_array_equal(table.columns["dice_wt_present"], [1, math.nan, 1])
    assert segmentation(Net(), site(x, None).test, PLAN, CPU, spacing=(1, 1, 1), regions={}) == Table({}, ())
    parts = {"low": (1,), "high": (2, 3)}
    other = segmentation(Net(), site(x, masks).test, PLAN, CPU, spacing=(1, 1, 1), regions=parts).columns
    assert (other["dice_low"].tolist(), other["iou_high"].tolist()) == ([1, 0, 1], [1, 0, 1])
    assert other["dice"].tolist() == [1, 0, 1]
    assert not [name for name in other if "wt" in name]


def test_averages_leave_out_what_is_undefined() -> None:
    values = np.array([0.2, math.nan, 0.6, 0.7, 0.1])
    table = Table({"some": values, "none": np.full(5, math.nan)}, ("a", "a", "b", "c", "d"))
    found = table.averages(resamples=2000, seed=3)
    assert found["some"].value == pytest.approx(0.4)
    assert found["none"].value is None
    assert found["n_test"].value == 5
    rng, patients = np.random.default_rng(0), [values[:2], values[2:3], values[3:4], values[4:]]
    draws = [np.nanmean(np.concatenate([patients[i] for i in rng.integers(4, size=4)])) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["some"].low == pytest.approx(low, abs=0.03)
    assert found["some"].high == pytest.approx(high, abs=0.03)
    assert Table({}, ()).averages(resamples=5, seed=0) == {}


def test_slabs_of_one_brain_are_resampled_together() -> None:
    values = np.repeat(np.random.default_rng(1).random(6), 4)  # the slabs of a brain are alike
    people = [f"p slab {n}" for n in range(6)]  # ids that look like slabs themselves
    slabs = Table({"dice": values}, tuple(slab_of(person, n) for person in people for n in range(4)))
    whole = Table({"dice": values}, tuple(person.replace(" slab ", "-") for person in people for _ in range(4)))
    assert slabs.averages(resamples=500, seed=3) == whole.averages(resamples=500, seed=3)


# at a site


def test_the_probe_names_what_may_leave_and_pairs_the_protocols() -> None:
    x = subjects(4)
    x[3, :2] = 0
    metrics, predictions = probe(method(Net()), site(x, truth(x)), PLAN, CPU, seed=0)
    assert predictions == {}
    assert all(METRIC.fullmatch(name) and math.isfinite(value) for name, value in metrics.items())
    assert {name.split("/")[0] for name in metrics} == {"fusion", "average", "segmentation"}
    assert metrics["segmentation/dice_wt/value"] == 1
    assert metrics["fusion/n_test/value"] == 3
    assert metrics["segmentation/n_test/value"] == 4
    whole = Method()
    whole.encoder = Plain()
    whole.segment = Net().segment
    alone = probe(whole.eval(), site(x, truth(x)), dataclasses.replace(PLAN, protocols=("segmentation",)), CPU, seed=0)[
        0
    ]
    assert alone == {name: value for name, value in metrics.items() if name.startswith("segmentation")}
    expected = float(FUSION["ssim"](x[:3].amax(1, keepdim=True), x[:3]).mean())
    assert metrics["fusion/ssim/value"] == pytest.approx(expected, abs=1e-6)
    assert metrics["average/ssim/low"] < metrics["average/ssim/value"] < metrics["average/ssim/high"]


def test_a_site_with_nothing_to_score_says_nothing() -> None:
    x = subjects(2)
    x[:, 1:] = 0
    for data in (site(x, None), site(x, torch.full_like(truth(x), UNLABELLED)), site(x[:0], None)):
        assert probe(method(Net()), data, PLAN, CPU, seed=0) == ({}, {})


def test_other_protocols_stay_and_need_classes() -> None:
    x = subjects(8, (44, 42))
    plan = dataclasses.replace(PLAN, protocols=("knn", "fusion"))
    without = probe(method(Net()), site(x, None), plan, CPU, seed=0)[0]
    both = probe(method(Net()), site(x, None, ("a", "b")), plan, CPU, seed=0)[0]
    assert {name.split("/")[0] for name in without} == {"fusion", "average"}
    assert {name.split("/")[0] for name in both} == {"fusion", "average", "knn"}
    assert {name: both[name] for name in without} == without


@pytest.mark.parametrize(("protocol", "task"), [("fusion", "fuse"), ("segmentation", "segment")])
def test_an_encoder_that_cannot_is_refused(protocol: str, task: str) -> None:
    plan = dataclasses.replace(PLAN, protocols=(protocol,))
    with pytest.raises(ConfigError, match=f"'{protocol}'.* cannot {task} images"):
        probe(method(Plain()), site(subjects(2), None), plan, CPU, seed=0)


def test_the_window_is_a_setting() -> None:
    plan: Callable[..., Evaluation] = lambda *more: config.compose(["evaluation=multimodal", *more]).evaluation  # noqa: E731
    assert plan().protocols == ("fusion", "segmentation")
    assert plan().window is None
    assert plan("evaluation.window=[80,80,32]").window == (80, 80, 32)
    with pytest.raises(ConfigError, match=r"evaluation\.window: got \[80, 0\]"):
        plan("evaluation.window=[80,0]")
    with pytest.raises(ConfigError, match=r"evaluation\.window: got 80"):
        plan("evaluation.window=80")
