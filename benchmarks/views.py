"""Views: the product against MONAI's transforms for one image at a time and against batched torch, on one thread.

Every recipe that a method takes by default, on both sides with the same operations, probabilities and bounds:

    default   SimCLR, BYOL, MoCo, SimSiam, MedCSS, DiSSECT     two views
    eight     DCL                                              two views
    crops     NSLF                                             one crop of half the side, four contrasts and a mask
    paired    fine-tuning on masks                             one view of image and mask

What MONAI lacks is told in `monai_views.py`. It runs as its users run it (metadata tracked), and in its strongest form
(`set_track_meta(False)`). Everything is checked before it is timed: the kernel against torch's grid_sample, MONAI's
and the product's views of `default` by their statistics, those of the others by their shapes.

    OMP_NUM_THREADS=1 python benchmarks/views.py [--rounds 5] [--quick] [--only RECIPE ...] [--json FILE]
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import monai_views
import torch
import torch.nn.functional as F
from harness import Race, figure, machine, met, race, write
from torch import Tensor

from medfl.config import build

SHAPES = [(64, 28, 28, 28), (8, 64, 64, 64), (256, 28, 28), (64, 64, 64), (16, 224, 224)]  # B, *S
QUICK = [(64, 28, 28, 28), (64, 64, 64)]
BARS = {(28, 28, 28): 15.0, (64, 64, 64): 6.0, (64, 64): 20.0, (224, 224): 2.5}  # times MONAI as its users run it
PRODUCT, EAGER, MONAI, STRONGEST = "kernel", "torch", "monai", "monai, no metadata"
Views = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Recipe:
    """A recipe on both sides."""

    name: str
    peer: Callable[[tuple[int, ...]], monai_views.ONE]
    channels: int = 1
    masks: int = 0
    count: int = 2  # views of an image
    backends: bool = True  # whether there is a kernel and a reference


RECIPES = [
    Recipe("default", monai_views.default),
    Recipe("eight", monai_views.eight),
    Recipe("crops", monai_views.crops, channels=4, masks=1, count=1, backends=False),
    Recipe("paired", monai_views.paired, masks=1, count=1),
]


def product(recipe: Recipe, size: tuple[int, ...], backend: str = PRODUCT) -> Views:
    """The product's views."""
    node = monai_views.settings(recipe.name)
    if recipe.backends:
        node["backend"] = backend
    if "channels" in node:
        node["channels"] = recipe.channels
    if recipe.name == "crops":
        node |= {"size": size[0] // 2, "depth": None}
    made: Views = build(node)
    return made


def images(recipe: Recipe, shape: tuple[int, ...]) -> Tensor:
    """Smooth images in [-1, 1], with a mask of about a tenth of the voxels as last channel where the recipe has one."""
    batch, *size = shape
    drawn = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, recipe.channels + recipe.masks, *[7] * len(size), generator=drawn)
    smooth = F.interpolate(coarse, tuple(size), mode="bilinear" if len(size) == 2 else "trilinear").tanh()
    if recipe.masks:
        smooth[:, recipe.channels :] = (smooth[:, recipe.channels :] > 0.6).float()
    return smooth


def of_each(view: monai_views.ONE, batch: Tensor, *, count: int, tracked: bool) -> list[Tensor]:
    """Views of every image, one image after the other, stacked as a loader would."""
    with monai_views.metadata(tracked):
        return [torch.stack([view(image) for image in batch]) for _ in range(count)]


def check(recipe: Recipe, shape: tuple[int, ...]) -> dict[str, float]:
    """Largest difference of the kernel and grid_sample, and how far MONAI's views lie from the product's.

    Raises:
        SystemExit: they are not the same work, so a race would mean nothing.
    """
    size, batch = shape[1:], images(recipe, (32, *shape[1:]))
    made = torch.cat(product(recipe, size)(batch, key=1, count=recipe.count))
    peer = torch.cat(of_each(recipe.peer(size), batch, count=recipe.count, tracked=True))
    found = {"monai_spread": abs(torch.as_tensor(peer).std().item() / made.std().item() - 1)}
    if recipe.backends:
        reference = torch.cat(product(recipe, size, EAGER)(batch, key=1, count=recipe.count))
        far = (made - reference).abs() > 1e-4  # a mask, a level of a histogram: a rounding can decide a voxel
        found["kernel_error"] = far.float().mean().item()
    if recipe.name == "default":
        start = batch.repeat(recipe.count, *[1] * (batch.ndim - 1))
        moved = [(torch.as_tensor(views) - start).square().mean().item() for views in (peer, made)]
        found["monai_moved"] = abs(moved[0] / moved[1] - 1)
    bounds = {"monai_spread": 0.25, "monai_moved": 0.35, "kernel_error": 0.0 if recipe.name == "default" else 1e-2}
    if recipe.name == "eight":
        bounds["monai_spread"] = 1.0  # its choices are the same, their ranges are not
    wrong = [name for name, value in found.items() if value > bounds[name]]
    if peer.shape != made.shape or wrong:
        raise SystemExit(f"{recipe.name} {shape}: not the same work: {found}, {peer.shape} and {made.shape}")
    return found


def contest(recipe: Recipe, shape: tuple[int, ...], *, rounds: int) -> Race:
    """All contestants on one batch."""
    size, batch, keys = shape[1:], images(recipe, shape), itertools.count()
    view, forms = recipe.peer(size), [PRODUCT, *([EAGER] if recipe.backends else [])]

    def ours(backend: str) -> Callable[[], list[Tensor]]:
        made = product(recipe, size, backend)
        return lambda: made(batch, key=next(keys), count=recipe.count)

    def theirs(*, tracked: bool) -> Callable[[], list[Tensor]]:
        return lambda: of_each(view, batch, count=recipe.count, tracked=tracked)

    peers = {MONAI: theirs(tracked=True), STRONGEST: theirs(tracked=False)}
    return race({form: ours(form) for form in forms} | peers, rounds=rounds)


def row(recipe: Recipe, shape: tuple[int, ...], *, rounds: int) -> dict[str, object]:
    """Checked, raced and printed."""
    checked, result = check(recipe, shape), contest(recipe, shape, rounds=rounds)
    voxels = recipe.count * (recipe.channels + recipe.masks) * torch.Size(shape).numel()
    ratios = {peer: result.ratio(peer, PRODUCT) for peer in (MONAI, STRONGEST, EAGER) if peer in result.seconds}
    cells = "".join(f"{middle:>8.1f} ({low:.1f}..{high:.1f})".ljust(24) for middle, low, high in ratios.values())
    name = f"{recipe.name} {'x'.join(map(str, shape[1:]))}"
    milliseconds, each = result.median(PRODUCT) * 1e3, result.median(PRODUCT) / voxels * 1e9
    print(f"{name + f', B={shape[0]}':<26}{milliseconds:>9.2f}{each:>9.2f}{cells}", flush=True)
    figures = [figure(f"views {name} / MONAI", ratios[MONAI], bar=BARS.get(shape[1:]), better="higher")]
    figures.append(figure(f"views {name} / MONAI without metadata", ratios[STRONGEST], better="higher"))
    return {
        "recipe": recipe.name,
        "shape": shape,
        "check": checked,
        "seconds": dict(result.seconds),
        "figures": figures,
    }


def first_call() -> float:
    """Seconds of the first views of this process: loading or, once per machine, compiling the kernel."""
    start = time.perf_counter()
    product(RECIPES[0], (8, 8, 8))(images(RECIPES[0], (2, 8, 8, 8)), key=0)
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="the default recipe at one size of each dimension")
    options.add_argument("--only", nargs="*", default=[recipe.name for recipe in RECIPES])
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    loaded = first_call()
    print(
        f"first call {loaded:.2f} s; CPU time, 1 thread; times faster than: median (min..max) of {given.rounds} rounds"
    )
    print(f"{'views':<26}{'ms':>9}{'ns/value':>9}{MONAI:>10}{STRONGEST:>30}{'batched torch':>20}")
    recipes = RECIPES[:1] if given.quick else [recipe for recipe in RECIPES if recipe.name in given.only]
    shapes = QUICK if given.quick else SHAPES
    rows = [row(recipe, shape, rounds=given.rounds) for recipe in recipes for shape in shapes]
    figures = [entry for line in rows for entry in line.pop("figures")]
    if given.json:
        write(given.json, {"machine": machine(), "first_call_seconds": loaded, "figures": figures, "rows": rows})
    if not all(map(met, figures)):
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
