"""A whole epoch of SimCLR: the product's own loop against the usual recipe, on one thread.

The usual recipe is MONAI's transforms for one image at a time behind a DataLoader, float32, one forward for each view,
lightly's NT-Xent (a plain one where lightly is missing) and torch's AdamW as it comes. Its strongest form has MONAI
without metadata, the product's precision and order of channels, one forward for both views and the fused AdamW: it
differs in the views alone. Network, images, batches and operations of the views are the same on both sides.

The product computes in bf16 in 2D (`training.precision=bf16`), at 64 pixels with channels last
(`training.channels_last=always`), where that is faster. In 3D it stays in float32: torch's gradients of Conv3d in bf16
are wrong on a CPU. The floor is the product's loop on views that are already there.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/epoch.py [--rounds 5] [--quick] [--json FILE]
"""

import argparse
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
import torch.nn.functional as F
from harness import Race, figure, machine, met, race, write
from monai_views import default, metadata
from peers import allow_torchvision, installed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medfl import config
from medfl.methods.simclr import SimCLR
from medfl.site import open_site
from medfl.training import Device, Plan, Task, train_locally
from medfl.workshop import Workshop

BAR, FLOOR_BAR = 2.2, 1.03  # times the product, of the usual recipe; of the floor
PRODUCT, SINGLE, FLOOR = "product", "product in float32", "floor"
RECIPE, STRONGEST = "usual recipe", "strongest recipe"
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """What is trained on."""

    name: str
    dims: int
    size: int
    batch: int
    images: int
    bf16: bool
    last: bool = False  # channels

    @property
    def form(self) -> torch.memory_format:
        return torch.channels_last if self.last else torch.contiguous_format


CASES = [
    Case("2D 28 px", 2, 28, 64, 256, bf16=True),
    Case("2D 64 px", 2, 64, 32, 64, bf16=True, last=True),
    Case("3D 28", 3, 28, 32, 32, bf16=False),
]


def opened(case: Case) -> tuple[Workshop, Tensor]:
    """The product's method, views and device, and the images of one site."""
    words = [
        "method=simclr", "encoder=resnet18", f"data.spatial_dims={case.dims}", f"data.size={case.size}",
        f"training.batch_size={case.batch}", "training.threads=1", "sites=iid", "sites.count=1",
        f"data.count={2 * case.images}", *(["encoder.stem=imagenet"] if case.dims == 3 else []),
    ]  # fmt: skip
    site = open_site(config.compose(words).source, 0)
    return site.shop, site.images[: case.images].contiguous()


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image by a recipe for one image."""

    def __init__(self, images: Tensor, recipe: Callable[[Tensor], Tensor]) -> None:
        self.images, self.recipe = images, recipe

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first, second = (torch.as_tensor(self.recipe(self.images[index])) for _ in range(2))
        return first, second


def contrast(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The peer's NT-Xent of two batches of embeddings."""
    if installed("lightly"):
        allow_torchvision()
        from lightly.loss import NTXentLoss

        return NTXentLoss(temperature=temperature)

    def plain(first: Tensor, second: Tensor) -> Tensor:
        z = F.normalize(torch.cat([first, second]).float(), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(first)))

    return plain


def peer_loss(method: SimCLR, views: tuple[Tensor, Tensor], *, forwards: int) -> Tensor:
    """The peer's loss of two views; batch norm sees each view by itself in two forwards, both together in one."""
    if forwards == 2:
        first, second = (method.projector(method.encoder(view)) for view in views)
    else:
        first, second = method.projector(method.encoder(torch.cat(views))).chunk(2)
    return contrast(method.temperature)(first.float(), second.float())


def peer_epoch(case: Case, method: SimCLR, images: Tensor, *, strongest: bool) -> Callable[[], None]:
    """An epoch as a user of the libraries would write it, or in its strongest form."""
    loader = DataLoader(Pairs(images, default(images.shape[2:])), batch_size=case.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3, weight_decay=1e-4, fused=strongest or None)

    def run() -> None:
        method.train()
        with metadata(tracked=not strongest):
            for pair in loader:
                views = tuple(view.contiguous(memory_format=case.form) for view in pair) if strongest else pair
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=strongest and case.bf16):
                    loss = peer_loss(method, views, forwards=1 if strongest else 2)
                loss.backward()
                optimizer.step()

    return run


def epoch(case: Case, shop: Workshop, images: Tensor, *, bf16: bool, ready: bool) -> Callable[[], None]:
    """The product's epoch; `ready` takes views that are already there."""
    where, training = Device(torch.device("cpu"), bf16=bf16, channels_last=case.last), shop.study.training
    method = copy.deepcopy(shop.method).to(memory_format=case.form)
    optimizer = config.build(training.optimizer, parameters=method.trainable())
    fixed = shop.views(images[: case.batch], key=0)
    task = Task(images, None, (lambda _images, *, key, count: fixed) if ready else shop.views)  # noqa: ARG005
    plan = Plan(0, "site", 1, 10**6, len(images) // case.batch, case.batch, training.warmup)
    numbers = iter(range(1, 10**6))
    return lambda: train_locally(method, task, optimizer, replace(plan, round=next(numbers)), where)


def check(method: SimCLR, views: list[Tensor]) -> dict[str, float]:
    """Largest difference of loss and gradients between both sides, of the same views and weights, in one forward.

    In two forwards batch norm sees other batches, so training mode gives another loss: that form is compared with the
    norms at rest.

    Raises:
        SystemExit: they are not the same loss, so a race would mean nothing.
    """
    found = {}
    for forwards, training in ((1, True), (2, False)):
        method.train(training)
        ours = method(views, 0.0)["total"]
        theirs = peer_loss(method, (views[0], views[1]), forwards=forwards)
        pairs = zip(*(torch.autograd.grad(loss, method.trainable()) for loss in (ours, theirs)), strict=True)
        gradient = max(((a - b).norm() / (a.norm() + 1e-3)).item() for a, b in pairs)
        found |= {f"loss, {forwards}": abs((ours - theirs).item()), f"gradient, {forwards}": gradient}
    if max(found["loss, 1"], found["loss, 2"]) > TOLERANCE or max(found.values()) > 100 * TOLERANCE:
        raise SystemExit(f"not the same loss: {found}")
    return found


def contest(case: Case, *, rounds: int) -> tuple[dict[str, float], Race]:
    """All forms of the epoch, each with a network of its own."""
    shop, images = opened(case)
    method = shop.method
    checked = check(method, [view[:8] for view in shop.views(images[: case.batch], key=1)])
    runs = {
        PRODUCT: epoch(case, shop, images, bf16=case.bf16, ready=False),
        FLOOR: epoch(case, shop, images, bf16=case.bf16, ready=True),
        RECIPE: peer_epoch(case, copy.deepcopy(method), images, strongest=False),
        STRONGEST: peer_epoch(case, copy.deepcopy(method).to(memory_format=case.form), images, strongest=True),
    }
    if case.bf16:
        runs[SINGLE] = epoch(case, shop, images, bf16=False, ready=False)
    return checked, race(runs, rounds=rounds)


def row(case: Case, *, rounds: int) -> dict[str, object]:
    """Checked, raced and printed."""
    checked, raced = contest(case, rounds=rounds)
    single = SINGLE if case.bf16 else PRODUCT
    wanted = [
        ("recipe", RECIPE, PRODUCT, BAR, "higher"),
        ("recipe, both float32", RECIPE, single, None, "higher"),
        ("strongest recipe", STRONGEST, PRODUCT, None, "higher"),
        ("product over floor", PRODUCT, FLOOR, FLOOR_BAR, "lower"),
    ]
    figures = [
        figure(f"epoch {case.name} / {name}", raced.ratio(slower, faster), bar=bar, better=better)
        for name, slower, faster, bar, better in wanted
    ]
    print(f"{case.name}, {case.images} images, batches of {case.batch}; {checked}")
    for name in raced.seconds:
        print(f"  {name:<22}{raced.median(name) * 1e3:>9.0f} ms")
    for entry in figures:
        print("  {name:<46}{ratio[median]:>7.2f} ({ratio[min]:.2f}..{ratio[max]:.2f})  bar {bar}".format(**entry))
    return {"case": vars(case), "check": checked, "seconds": dict(raced.seconds), "figures": figures}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="the smallest case only")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row(case, rounds=given.rounds) for case in (CASES[:1] if given.quick else CASES)]
    figures = [entry for line in rows for entry in line.pop("figures")]
    if given.json:
        write(given.json, {"machine": machine(), "lightly": installed("lightly"), "figures": figures, "rows": rows})
    if not all(map(met, figures)):
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
