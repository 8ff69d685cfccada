"""The product's recipes of views in MONAI's words, for one image at a time, with the numbers of `configs/views`.

Missing in MONAI, so left out of its side, which is then the cheaper one: leaving a modality out by chance (`crops`),
and Poisson noise (`eight`; Gaussian noise stands in for it). Its RandAffine draws the angle always, and places the crop
independently of its size. `eight` crops, resizes and turns in two resamplings, where the product has one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

CONFIGS = Path(__file__).resolve().parents[1] / "configs/views"
ONE = Callable[[Tensor], Tensor]  # a view of one image (C, *S)
MASKS = 1  # the last channel of a paired image


def settings(recipe: str) -> dict[str, Any]:
    """A recipe's file, with those that it begins with."""
    node = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    bases = [settings(base) for base in node.pop("defaults", []) if base != "_self_"]
    return _merged(*bases, node)


def _merged(*nodes: dict[str, Any]) -> dict[str, Any]:
    """Nodes, the later on top."""
    made: dict[str, Any] = {}
    for node in nodes:
        for key, value in node.items():
            deeper = isinstance(value, dict) and isinstance(made.get(key), dict)
            made[key] = _merged(made[key], value) if deeper else value
    return made


def _affine(where: dict[str, Any], size: Sequence[int], **words: object) -> Any:
    from monai import transforms as T

    turn, least = where["rotation"]["high"] / 180 * torch.pi, where["crop"]["low"]
    shift = [side * (1 - least) / 4 for side in size]
    make = T.RandAffined if "keys" in words else T.RandAffine
    return make(
        prob=1.0,
        rotate_range=turn if len(size) == 2 else [turn] * 3,
        scale_range=[(least - 1, 0.0)] * len(size),
        translate_range=shift,
        padding_mode="border",
        **words,
    )


def default(size: Sequence[int]) -> ONE:
    """`default`: flips, one affine resampling, gamma, scale, shift, noise."""
    from monai import transforms as T

    node = settings("default")
    where, tone = node["spatial"], node["intensity"]
    gamma, noise = tone["gamma"], tone["noise"]
    made: ONE = T.Compose(
        [
            *[T.RandFlip(prob=where["flip"], spatial_axis=axis) for axis in range(len(size))],
            _affine(where, size, mode="bilinear"),
            T.RandAdjustContrast(prob=gamma["probability"], gamma=(gamma["low"], gamma["high"])),
            T.RandScaleIntensity(factors=tone["scale"]["high"] - 1, prob=tone["scale"]["probability"]),
            T.RandShiftIntensity(offsets=tone["shift"]["high"], prob=tone["shift"]["probability"]),
            T.RandGaussianNoise(prob=noise["probability"], std=noise["high"], sample_std=False),
        ]
    )
    return made


def paired(size: Sequence[int]) -> ONE:
    """`paired`: image and mask moved alike, the image's grey values changed."""
    from monai import transforms as T

    node = settings("paired")
    where, tone = node["spatial"], node["intensity"]
    gamma, noise = tone["gamma"], tone["noise"]
    chain = T.Compose(
        [
            _affine(where, size, keys=["image", "mask"], mode=["bilinear", "nearest"]),
            T.RandAdjustContrastd(["image"], prob=gamma["probability"], gamma=(gamma["low"], gamma["high"])),
            T.RandScaleIntensityd(["image"], factors=tone["scale"]["high"] - 1, prob=tone["scale"]["probability"]),
            T.RandShiftIntensityd(["image"], offsets=tone["shift"]["high"], prob=tone["shift"]["probability"]),
            T.RandGaussianNoised(["image"], prob=noise["probability"], std=noise["high"]),
        ]
    )

    def view(both: Tensor) -> Tensor:
        made = chain({"image": both[:-MASKS], "mask": both[-MASKS:]})
        return torch.cat([torch.as_tensor(made["image"]), torch.as_tensor(made["mask"])])

    return view


def crops(size: Sequence[int]) -> ONE:
    """`crops` of half the side: around a lesion by chance, the first axis mirrored."""
    from monai import transforms as T

    node = settings("crops")
    chain = T.Compose(
        [
            T.RandCropByPosNegLabeld(
                ["image", "mask"],
                label_key="mask",
                spatial_size=[side // 2 for side in size],
                pos=node["foreground"],
                neg=1 - node["foreground"],
                num_samples=1,
            ),
            T.RandFlipd(["image", "mask"], prob=node["flip"], spatial_axis=0),
        ]
    )

    def view(both: Tensor) -> Tensor:
        made = chain({"image": both[:-MASKS], "mask": both[-MASKS:]})[0]
        return torch.cat([torch.as_tensor(made["image"]), torch.as_tensor(made["mask"])])

    return view


def eight(size: Sequence[int]) -> ONE:
    """`eight`: a resized crop, then some of seven others in random order."""
    from monai import transforms as T

    node = settings("eight")
    where, tone = node["spatial"], node["tone"]
    plane = len(size) == 2
    least = where["area"][0] ** 0.5 if plane else where["side"][0]
    turn = where["rotation_2d" if plane else "rotation_3d"][1] / 180 * torch.pi
    factor, low, high = tone["brightness"][1] - 1, *(100 * part for part in tone["percentiles"])
    jitter = [
        T.RandScaleIntensity(prob=1.0, factors=factor),
        T.RandScaleIntensityFixedMean(prob=1.0, factors=factor),
        *([] if plane else [T.RandAdjustContrast(prob=1.0, gamma=tuple(tone["jitter"]["gamma"]))]),
    ]
    ranges = {"range_x": turn} if plane else {"range_x": turn, "range_y": turn, "range_z": turn}
    choices = [
        T.RandRotate(prob=1.0, padding_mode="border", **ranges),
        T.Compose(jitter),
        T.ScaleIntensityRangePercentiles(low, high, 0.0, 1.0, clip=True),
        T.HistogramNormalize(num_bins=256, min=0, max=1),
        T.RandGaussianSharpen(prob=1.0),
        T.RandScaleIntensity(prob=1.0, factors=factor),
        T.RandGaussianNoise(prob=1.0, std=0.1),
    ]
    chain = T.Compose(
        [
            T.RandSpatialCrop([int(least * side) for side in size], max_roi_size=list(size), random_size=True),
            T.Resize(list(size), mode="bilinear" if plane else "trilinear"),
            T.SomeOf(choices, num_transforms=tuple(node["chosen"])),
        ]
    )

    def view(image: Tensor) -> Tensor:
        return torch.as_tensor(chain((image + 1) / 2)).clamp(0, 1) * 2 - 1

    return view


@contextlib.contextmanager
def metadata(tracked: bool) -> Iterator[None]:
    """MONAI with or without metadata tracking."""
    from monai.data import get_track_meta, set_track_meta

    before = get_track_meta()
    set_track_meta(tracked)
    try:
        yield
    finally:
        set_track_meta(before)
