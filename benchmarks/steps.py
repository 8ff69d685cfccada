"""A whole pretraining step of each method over the bare forward and backward of its encoder on the same views.

The step is the product's own loop (views, loss, optimizer, moving averages), one thread, CPU time. The bound, raced
beside it, is the encoder alone: forward of the very views that the step trains on, a gradient of ones, backward; for
a method with a momentum network also that network's forward of the views that it sees. Views are timed apart and are
part of the step.

    PYTHONPATH=. python benchmarks/steps.py [--rounds 5] [--only NAME ...] [--shapes 2d 3d] [--json FILE] [WORD ...]

What stands after the options is added to the study's words.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import studies
import torch
from harness import figure, machine, race, write
from torch import Tensor

from medfl import config
from medfl.methods.base import Method
from medfl.site import Site
from medfl.training import Plan, Task, train_locally

BARS = {"simclr": 1.08, "medcss": 1.08, "dissect": 1.25, "dcl": 1.25}
SHAPES = {
    "2d": ("data.spatial_dims=2", "data.size=64", "training.batch_size=64", "encoder=resnet18"),
    "3d": (
        "data.spatial_dims=3",
        "data.size=28",
        "training.batch_size=16",
        "encoder=resnet18",
        "encoder.stem=imagenet",
    ),
}
ONE_CELL = {("dcl", "3d"): ("encoder.stem=small", "training.batch_size=4")}  # its head needs a map of two cells
COMMON = ("sites=iid", "sites.count=1", "training.threads=1", "data.count=160", "training.steps=1")
STEP, BOUND, VIEWS, UPDATE = "step", "encoder", "views", "optimizer and averages"
FIGURES = ("median", "min", "max")


def opened(method: str, shape: str, words: list[str]) -> Site:
    """A site of this method, its codebooks set."""
    return studies.opened([f"method={method}", *SHAPES[shape], *COMMON, *ONE_CELL.get((method, shape), ()), *words])


def passes(method: Method, views: list[Tensor]) -> list[tuple[torch.nn.Module, Tensor, bool]]:
    """(network, views as one batch, whether it learns) of every pass that a step cannot go without."""
    both = torch.cat(views[:2])
    if hasattr(method, "key_encoder"):  # a query of one view and the local stream's two, and the keys of one view
        queried = getattr(method, "_queried", lambda given: given[:1])(views)
        return [(method.encoder, torch.cat(queried), True), (method.key_encoder, views[1], False)]
    if hasattr(method, "target_encoder"):
        return [(method.encoder, both, True), (method.target_encoder, both, False)]
    return [(method.encoder, both, True)]


def bound(method: Method, views: list[Tensor]) -> Callable[[], None]:
    """The passes alone."""
    wanted = passes(method, views)

    def run() -> None:
        for network, images, learns in wanted:
            with torch.set_grad_enabled(learns):
                features = network(images)
            if learns:
                features.backward(torch.ones_like(features))
        method.zero_grad(set_to_none=True)

    return run


def contest(site: Site, *, rounds: int) -> dict[str, object]:
    """The step against its bound."""
    method, shop = site.shop.method, site.shop
    training = shop.study.training
    optimizer = config.build(training.optimizer, parameters=method.trainable())
    plan = Plan(0, site.data.name, 1, 10**6, 1, training.batch_size, training.warmup, training.schedule)
    task: Task = site.task
    chosen = torch.arange(training.batch_size)
    fixed = task.batch(chosen, 0, shop.where, count=method.views)
    numbers = iter(range(1, 10**9))

    def step() -> None:
        train_locally(method, task, optimizer, replace(plan, round=next(numbers)), shop.where)

    method.train()
    step()  # gradients and optimizer state are there
    raced = race(
        {
            STEP: step,
            BOUND: bound(method, fixed),
            VIEWS: lambda: task.batch(chosen, next(numbers), shop.where, count=method.views),
        },
        rounds=rounds,
    )
    ratio = dict(zip(FIGURES, raced.ratio(STEP, BOUND), strict=True))
    views = dict(zip(FIGURES, raced.ratio(VIEWS, BOUND), strict=True))
    return {"seconds": dict(raced.seconds), "step_over_encoder": ratio, "views_over_encoder": views}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", nargs="*", default=list(BARS))
    options.add_argument("--shapes", nargs="*", default=list(SHAPES))
    options.add_argument("--json", type=Path)
    options.add_argument("words", nargs="*")
    given = options.parse_intermixed_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'':<14}{'step, ms':>10}{'encoder, ms':>13}{'step / encoder':>24}{'views / encoder':>17}{'bar':>7}")
    for shape in given.shapes:
        for name in given.only:
            found = contest(opened(name, shape, given.words), rounds=given.rounds)
            seconds, ratio, views = found["seconds"], found["step_over_encoder"], found["views_over_encoder"]
            median = {key: sorted(values)[len(values) // 2] * 1e3 for key, values in seconds.items()}
            shown = "{median:.3f} ({min:.3f}..{max:.3f})".format(**ratio)
            print(
                f"{name + ' ' + shape:<14}{median[STEP]:>10.0f}{median[BOUND]:>13.0f}{shown:>24}"
                f"{views['median']:>17.3f}{BARS.get(name, 0):>7.2f}",
                flush=True,
            )
            rows.append({"method": name, "shape": shape, "bar": BARS.get(name), **found})
    if given.json:
        figures = [
            figure(f"steps {row['method']} {row['shape']} / encoder", tuple(row["step_over_encoder"].values()),  # type: ignore[arg-type,attr-defined]
                   bar=row["bar"], better="lower")  # type: ignore[arg-type]
            for row in rows
        ]  # fmt: skip
        write(given.json, {"machine": machine(), "figures": figures, "rows": rows})


if __name__ == "__main__":
    main()
