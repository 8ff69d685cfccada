"""Pretraining on a GPU: images a second of every method, and how much of the card it uses.

    PYTHONPATH=. python benchmarks/gpu.py [--only NAME ...] [--shapes NAME ...] [--steps 20] [--device cuda | cpu]
        [--small] [--json FILE]

The step is the product's own loop, one site, images on the device. Beside images a second:

- of the bf16 matrix rate: operations of a step (torch's counter: convolutions and products) per second, over those of
  8192 x 8192 products on the same card;
- of the memory bandwidth: what every operation of a step reads and writes, if nothing is fused, per second, over that
  of a triad on the same card; the cache serves a part of it;
- busy: time in kernels, of the time of some steps in a row;
- MONAI: the same loop on views by MONAI's transforms, one image at a time, in a DataLoader with a process for every
  core. Nothing else differs.

Without a GPU nothing is measured, and the table says so; `--device cpu --small` shows that the script works.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import monai_views
import studies
import torch
from harness import figure, machine, met, not_run, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from medfl import config
from medfl.site import Site
from medfl.training import Plan, Task, train_locally

SHAPES = {
    "2D 224 px, ResNet-18": ("data=phantom", "data.size=224", "encoder=resnet18", "training.batch_size=128"),
    "2D 224 px, ResNet-50": ("data=phantom", "data.size=224", "encoder=resnet50", "training.batch_size=64"),
    "3D 64, ResNet-18": ("data=phantom", "data.spatial_dims=3", "data.size=64", "encoder=resnet18",
                         "training.batch_size=16"),
    "3D 80 x 80 x 64, U-Nets": ("data=brain", "data.spatial_dims=3", "data.size=160", "data.depth=128", "views.size=80",
                                "views.depth=64", "training.batch_size=4", "data.count=16",
                                "sites.min_images=8"),
}  # fmt: skip
NSLF = "3D 80 x 80 x 64, U-Nets"
SMALL = {
    "2D 224 px, ResNet-18": ("data.size=32", "training.batch_size=8"),
    "2D 224 px, ResNet-50": ("data.size=32", "training.batch_size=8"),
    "3D 64, ResNet-18": ("data.size=24", "training.batch_size=4"),
    NSLF: ("data.size=32", "data.depth=32", "views.size=16", "views.depth=16", "training.batch_size=2",
           "method.base_width=2"),
}  # fmt: skip
METHODS = ("simclr", "medcss", "dissect", "dcl", "byol")
COMMON = ("sites=iid", "sites.count=1", "data.count=320", "training.threads=1", "training.steps=1")
BUSY, FASTER = 0.9, 20.0
SIDE, LENGTH = 8192, 1 << 28  # of the matrices; floats of a vector


class Moved(TorchDispatchMode):
    """Bytes that operations read and write, views and empty tensors apart."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        out = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        if not func.is_view and "empty" not in str(func):
            self.bytes += sum(tensor.nbytes for tensor in (*read, *written))
        return out


def opened(method: str, shape: str, device: str, *, small: bool) -> Site:
    """A site of this method, its codebooks set."""
    words = [f"method={method}", *COMMON, *SHAPES[shape], *(SMALL[shape] if small else ())]
    return studies.opened([*words, f"training.device={device}"])


def looped(site: Site, task: Task) -> Callable[[int], None]:
    """So many steps of the product's loop, which ends by reading its losses: the device is done then."""
    training, shop = site.shop.study.training, site.shop
    optimizer = config.build(training.optimizer, parameters=shop.method.trainable())
    plan = Plan(0, site.data.name, 1, 10**6, 1, training.batch_size, training.warmup, training.schedule)
    rounds = itertools.count(1)

    def run(steps: int) -> None:
        train_locally(shop.method, task, optimizer, replace(plan, round=next(rounds), steps=steps), shop.where)

    return run


def seconds(run: Callable[[int], None], steps: int) -> float:
    """Of one step."""
    start = time.perf_counter()
    run(steps)
    return (time.perf_counter() - start) / steps


class Views(Dataset[list[Tensor]]):
    """The views of each image by MONAI's recipe, for a method that takes `count`."""

    def __init__(self, images: Tensor, recipe: str, count: int) -> None:
        self.images, self.count = images, count
        self.recipe = getattr(monai_views, recipe)(tuple(images.shape[2:]))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return [self.recipe(self.images[index]).as_subclass(Tensor) for _ in range(self.count)]


def endless(loader: DataLoader[list[Tensor]]) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


def peer(site: Site, recipe: str, workers: int) -> Task:
    """The site's task with views from a DataLoader in place of the product's."""
    task, method, where = site.task, site.shop.method, site.shop.where
    images = task.images.cpu()
    if method.segments and task.masks is not None:
        images = torch.cat([images, task.masks.cpu()[:, None].float()], dim=1)
    batch = site.shop.study.training.batch_size
    loader = DataLoader(
        Views(images, recipe, method.views), batch, shuffle=True, drop_last=True, num_workers=workers,
        pin_memory=where.device.type == "cuda", persistent_workers=workers > 0,
    )  # fmt: skip
    batches = endless(loader)
    return replace(
        task,
        views=lambda _images, *, key, count: [v.to(where.device, non_blocking=True) for v in next(batches)],  # noqa: ARG005
    )


def floors(device: torch.device, *, small: bool) -> dict[str, float]:
    """Operations a second of bf16 products, bytes a second of a triad."""
    side, length = (512, 1 << 20) if small else (SIDE, LENGTH)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    x, y, z = (torch.ones(length, device=device) for _ in range(3))
    return {
        "matrix": 2 * side**3 / timed(lambda: torch.mm(a, b), device),
        "memory": 12 * length / timed(lambda: torch.add(x, y, alpha=0.5, out=z), device),
    }


def timed(run: Callable[[], object], device: torch.device, *, repeats: int = 20) -> float:
    """Seconds of one run."""
    for _ in range(3):
        run()
    waited(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    waited(device)
    return (time.perf_counter() - start) / repeats


def waited(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy(run: Callable[[int], None], steps: int) -> float:
    """Share of the time of some steps that a GPU spends in kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        spent = seconds(run, steps) * steps
    return sum(event.self_device_time_total for event in found.key_averages()) / 1e6 / spent


def contest(method: str, shape: str, given: argparse.Namespace, floor: dict[str, float]) -> dict[str, float]:
    """All figures of one method and shape."""
    site = opened(method, shape, given.device, small=given.small)
    where, batch = site.shop.where, site.shop.study.training.batch_size
    run = looped(site, site.task)
    run(5)  # kernels are chosen, the optimizer's state is there
    with FlopCounterMode(display=False) as counted, Moved() as moved:
        run(1)
    step = sorted(seconds(run, given.steps) for _ in range(3))[1]
    recipe = {"nslf": "crops", "dcl": "eight"}.get(method, "default")
    other = looped(site, peer(site, recipe, os.cpu_count() or 1 if where.device.type == "cuda" else 0))
    other(1)
    found = {
        "images per second": batch / step,
        "milliseconds per step": 1e3 * step,
        "of the bf16 matrix rate": counted.get_total_flops() / step / floor["matrix"],
        "of the memory bandwidth": moved.bytes / step / floor["memory"],
        "times MONAI": seconds(other, max(2, given.steps // 5)) / step,
    }
    if where.device.type == "cuda":
        found["busy"] = busy(run, given.steps)
        found["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    return found


def figures_of(name: str, found: dict[str, float]) -> list[dict[str, object]]:
    """The ratios among a row's figures."""
    kinds = {"of the bf16 matrix rate": None, "of the memory bandwidth": None, "busy": BUSY, "times MONAI": FASTER}
    return [
        figure(f"gpu {name}, {kind}", (found[kind],) * 3, bar=bar, better="higher")
        for kind, bar in kinds.items()
        if kind in found
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="*", default=[*METHODS, "nslf"])
    options.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--small", action="store_true", help="a few voxels")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    rows, figures = [], []
    if given.device == "cuda" and not torch.cuda.is_available():
        figures.append(not_run("gpu", "this machine shows no CUDA device"))
        print("not run: this machine shows no CUDA device")
    else:
        floor = floors(torch.device(given.device), small=given.small)
        print(f"bf16 products {floor['matrix'] / 1e12:.1f} TFLOP/s, triad {floor['memory'] / 1e9:.0f} GB/s")
        for shape, method in itertools.product(given.shapes, given.only):
            if (shape == NSLF) != (method == "nslf"):
                continue
            name, found = f"{method} {shape}", contest(method, shape, given, floor)
            rows.append({"name": name, **found})
            figures += figures_of(name, found)
            print(f"{name:<36}" + ", ".join(f"{kind} {value:.3g}" for kind, value in found.items()), flush=True)
    if given.json:
        write(given.json, {"machine": machine(), "figures": figures, "rows": rows})
    if not all(map(met, figures)):
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
