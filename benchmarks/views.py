"""Views: the product against MONAI's per-sample transforms and against batched torch, on one thread.

Both sides make two views of every image with the same operations at the same probabilities and bounds: a flip of each
axis, one affine resampling (rotation, zoom, translation; border padding), gamma, scale, shift and noise. MONAI runs
as its users run it (metadata tracked), and in its strongest form (`set_track_meta(False)`). Its RandAffine draws the
angle always (its cost does not depend on the angle) and places the crop independently of its size. Everything is
checked before it is timed: the kernel against grid_sample, MONAI's and the product's views by their statistics.

    OMP_NUM_THREADS=1 python benchmarks/views.py [--rounds 5] [--quick] [--json FILE]
"""

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
import torch.nn.functional as F
import yaml
from harness import Race, machine, race, write
from torch import Tensor

from medfl.config import build
from medfl.views.compose import Views

CONFIG = Path(__file__).resolve().parents[1] / "configs/views/default.yaml"
SHAPES = [(64, 1, 28, 28, 28), (8, 1, 64, 64, 64), (256, 1, 28, 28), (64, 1, 64, 64), (16, 1, 224, 224)]
BAR: dict[tuple[int, ...], float] = {(64, 1, 28, 28, 28): 12.0}  # times MONAI's default recipe
FIGURES = ("median", "min", "max")
PRODUCT, EAGER, MONAI, STRONGEST = "kernel", "torch", "monai", "monai, no metadata"


def views(backend: str) -> Views:
    """The default recipe."""
    made = build(yaml.safe_load(CONFIG.read_text()) | {"backend": backend})
    if not isinstance(made, Views):
        raise TypeError(f"{CONFIG} names {type(made).__name__}, need Views.")
    return made


def images(shape: tuple[int, ...]) -> Tensor:
    """Smooth images in [-1, 1]."""
    coarse = torch.randn(*shape[:2], *[7] * (len(shape) - 2), generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, shape[2:], mode="bilinear" if len(shape) == 4 else "trilinear").tanh()


def monai_recipe(size: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The default recipe in MONAI's words, for one image."""
    from monai import transforms as T

    node = yaml.safe_load(CONFIG.read_text())
    where, tone = node["spatial"], node["intensity"]
    turn = where["rotation"]["high"] / 180 * torch.pi
    least = where["crop"]["low"]
    affine = T.RandAffine(
        prob=1.0,
        rotate_range=turn if len(size) == 2 else [turn] * 3,
        scale_range=[(least - 1, 0.0)] * len(size),
        translate_range=[side * (1 - least) / 4 for side in size],
        mode="bilinear",
        padding_mode="border",
    )
    gamma, noise = tone["gamma"], tone["noise"]
    return T.Compose(
        [
            *[T.RandFlip(prob=where["flip"], spatial_axis=axis) for axis in range(len(size))],
            affine,
            T.RandAdjustContrast(prob=gamma["probability"], gamma=(gamma["low"], gamma["high"])),
            T.RandScaleIntensity(factors=tone["scale"]["high"] - 1, prob=tone["scale"]["probability"]),
            T.RandShiftIntensity(offsets=tone["shift"]["high"], prob=tone["shift"]["probability"]),
            T.RandGaussianNoise(prob=noise["probability"], std=noise["high"], sample_std=False),
        ]
    )


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


def two_views(recipe: Callable[[Tensor], Tensor], batch: Tensor, *, tracked: bool) -> list[Tensor]:
    """Two views of every image, one image after the other, stacked as a loader would."""
    with metadata(tracked):
        return [torch.stack([recipe(image) for image in batch]) for _ in range(2)]


def check(shape: tuple[int, ...]) -> dict[str, float]:
    """Largest difference of the kernel and grid_sample, and how far MONAI's views lie from the product's.

    Raises:
        SystemExit: they are not the same work, so a race would mean nothing.
    """
    batch = images((32, *shape[1:]))
    kernel, reference = (torch.stack(views(backend)(batch, key=1)) for backend in (PRODUCT, EAGER))
    error = (kernel - reference).abs().max().item()
    peer = torch.stack([torch.as_tensor(view) for view in two_views(monai_recipe(shape[2:]), batch, tracked=True)])
    spread = abs(peer.std().item() / kernel.std().item() - 1)
    moved = abs((peer - batch).square().mean().item() / (kernel - batch).square().mean().item() - 1)
    if error > 1e-4 or peer.shape != kernel.shape or spread > 0.25 or moved > 0.35:
        raise SystemExit(
            f"{shape}: not the same work: kernel error {error:.1e}, spread {spread:.2f}, moved {moved:.2f}"
        )
    return {"kernel_error": error, "monai_spread": spread, "monai_moved": moved}


def contest(shape: tuple[int, ...], *, rounds: int) -> Race:
    """All four contestants on one batch."""
    batch, recipe = images(shape), monai_recipe(shape[2:])
    kernel, eager, keys = views(PRODUCT), views(EAGER), itertools.count()
    return race(
        {
            PRODUCT: lambda: kernel(batch, key=next(keys)),
            EAGER: lambda: eager(batch, key=next(keys)),
            MONAI: lambda: two_views(recipe, batch, tracked=True),
            STRONGEST: lambda: two_views(recipe, batch, tracked=False),
        },
        rounds=rounds,
    )


def row(shape: tuple[int, ...], *, rounds: int) -> dict[str, object]:
    """Checked, raced and printed."""
    checked, result = check(shape), contest(shape, rounds=rounds)
    voxels = 2 * torch.Size(shape).numel()
    ratios = {peer: result.ratio(peer, PRODUCT) for peer in (MONAI, STRONGEST, EAGER)}
    cells = "".join(f"{middle:>8.1f} ({low:.1f}..{high:.1f})".ljust(24) for middle, low, high in ratios.values())
    name = f"{'x'.join(map(str, shape[2:]))}, B={shape[0]}"
    print(f"{name:<18}{result.median(PRODUCT) * 1e3:>9.2f}{result.median(PRODUCT) / voxels * 1e9:>9.2f}{cells}")
    return {
        "shape": shape,
        "check": checked,
        "seconds": dict(result.seconds),
        "times_faster": {peer: dict(zip(FIGURES, ratio, strict=True)) for peer, ratio in ratios.items()},
        "bar": BAR.get(shape),
        "met": shape not in BAR or ratios[MONAI][0] >= BAR[shape],
    }


def first_call() -> float:
    """Seconds of the first views of this process: loading or, once per machine, compiling the kernel."""
    start = time.perf_counter()
    views(PRODUCT)(images((2, 1, 8, 8, 8)), key=0)
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="the shape with a bar only")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    loaded = first_call()
    print(
        f"first call {loaded:.2f} s; CPU time, 1 thread; times faster than: median (min..max) of {given.rounds} rounds"
    )
    print(f"{'two views of':<18}{'ms':>9}{'ns/voxel':>9}{MONAI:>10}{STRONGEST:>30}{'batched torch':>20}")
    rows = [row(shape, rounds=given.rounds) for shape in (list(BAR) if given.quick else SHAPES)]
    if given.json:
        write(given.json, {"machine": machine(), "first_call_seconds": loaded, "rows": rows})
    if not all(line["met"] for line in rows):
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
