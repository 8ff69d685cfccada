"""Does one patient ever move a private sum by more than the bound: random and optimised neighbours, and the noise.

    python benchmarks/private_bounds.py [--random 10000] [--optimised 200] [--cases NAME ...] [--json FILE]

A neighbour is a data set with one patient more. For each, the clipped sum of the product's own `PrivateGradients` is
taken with and without that patient, all units taking part and no noise added; the change's length is told in units of
the bound, C for the mechanism patient and 2C for group. Patients are random images of any brightness, of one to three
images each; optimised ones climb from a random start by 30 random changes that make the change larger. The control
clips both views of a patient apart, as concatenated views would be: it must pass the bound.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from harness import machine, write
from torch import Tensor

from medfl import config
from medfl.methods.base import Method
from medfl.privacy.gradients import PrivateGradients, clipped_sum
from medfl.privacy.units import Units
from medfl.training import Device, Plan, Task

CPU, PLAN = Device(torch.device("cpu"), bf16=False, channels_last=False), Plan(0, "a", 1, 1, 4, 8, 0.0)
CASES = {"patient": ("task", "classification"), "patient, two views": ("method", "byol"), "group": ("method", "medcss")}
SMALL = {"medcss": ("method.align.hidden=16",), "byol": ("method.hidden=32", "method.width=16")}
OTHERS, MOST, CLIMB = 3, 3, 30  # other patients, images of a patient, changes tried
Sum = Callable[[Tensor], Tensor]  # images of the new patient -> the sum with it


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--random", type=int, default=10_000)
    parser.add_argument("--optimised", type=int, default=200)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| mechanism, method | neighbours | largest change, of the bound | of optimised ones | control |")
    print("|---|---|---|---|---|")
    for name, (group, kind) in ((name, CASES[name]) for name in given.cases):
        began = time.perf_counter()
        row = measured(name, group, kind, given.random, given.optimised)
        rows.append(row | {"seconds": time.perf_counter() - began})
        control = f"{row['control']:.2f}" if "control" in row else "–"
        print(f"| {name}, {kind} | {given.random} + {given.optimised} | {row['random']:.4f} | {row['optimised']:.4f} | "
              f"{control} |", flush=True)  # fmt: skip
    if given.json:
        write(given.json, {"machine": machine(), "random": given.random, "optimised": given.optimised, "rows": rows})


def measured(name: str, group: str, kind: str, random: int, optimised: int) -> dict[str, object]:
    study = config.compose([f"{group}={kind}", "data=phantom", "data.size=16", "encoder=tiny", "encoder.base_width=4",
                            "privacy=group", *SMALL.get(kind, ())])  # fmt: skip
    torch.manual_seed(0)
    node = dict(study.method if group == "method" else study.task)
    method = config.build(node | ({"classes": 2} if group == "task" else {}))
    method.isolate()
    method.train()
    if group == "task":
        torch.nn.init.normal_(method.head.weight)
    privacy = replace(study.privacy, mechanism="patient" if name != "group" else "group", clip=0.1, images=9)
    bound = privacy.clip * (1 if name != "group" else 2)
    draw, most = torch.Generator().manual_seed(1), 0.0
    found: dict[str, object] = {"mechanism": name, "method": kind}
    for start in range(0, random, 100):
        total, base = neighbours(method, privacy, draw)
        for _ in range(min(100, random - start)):
            most = max(most, float((total(patient(draw)) - base).norm()) / bound)
    found["random"], best = most, 0.0
    for _ in range(optimised):
        total, base = neighbours(method, privacy, draw)
        image = patient(draw)
        change = float((total(image) - base).norm())
        for _ in range(CLIMB):
            other = image + torch.randn(image.shape, generator=draw) * float(image.abs().mean())
            if (moved := float((total(other) - base).norm())) > change:
                image, change = other, moved
        best = max(best, change / bound)
    found["optimised"] = best
    if kind == "byol":
        found["control"] = max(apart(method, patient(draw)[:1], privacy.clip) / bound for _ in range(200))
    return found


def patient(draw: torch.Generator) -> Tensor:
    """Images (n, 1, 16, 16) of one patient, of any brightness."""
    count = int(torch.randint(1, MOST + 1, (), generator=draw))
    scale = 10 ** float(4 * torch.rand((), generator=draw) - 2)
    return torch.randn(count, 1, 16, 16, generator=draw) * scale


def neighbours(method: Method, privacy: object, draw: torch.Generator) -> tuple[Sum, Tensor]:
    """The sum over some patients as a function of one more, in a bucket with others, and the sum without it."""
    others = [patient(draw) for _ in range(OTHERS)]

    def summed(images: list[Tensor]) -> Tensor:
        stacked = torch.cat(images)
        ends = torch.tensor([len(part) for part in images]).cumsum(0).tolist()
        rows = tuple(torch.arange(end - len(part), end) for end, part in zip(ends, images, strict=True))
        apart_ = privacy.mechanism == "patient"
        members = tuple((place,) for place in range(len(rows))) if apart_ else ((0, *range(2, len(rows))), (1,))
        members = tuple(tuple(place for place in unit if place < len(rows)) for unit in members)
        task = Task(stacked, torch.arange(len(stacked)) % 2, views, torch.arange(len(stacked)))
        with PrivateGradients(method, task, PLAN, CPU, privacy, Units(rows, members, 1.0)) as gradients:
            parts = gradients.of_units(torch.arange(len(members)), 0.0)
            return torch.stack([clipped_sum(part, privacy.clip) for part in parts]).sum(0)

    return lambda new: summed([*others, new]), summed(others)


def views(images: Tensor, *, key: int, count: int) -> list[Tensor]:
    del key
    return [images if not place else images.flip(-1) * 0.9 for place in range(count)]


def apart(method: Method, image: Tensor, clip: float) -> float:
    """What a patient moves the sum by if the rows of its two views are clipped apart."""
    parts = []
    for view in views(image, key=0, count=2):
        total = method([view, view], 0.0)["total"]
        found = torch.autograd.grad(total, method.trainable(), allow_unused=True)
        parts.append(torch.cat([g.flatten() for g in found if g is not None])[None])
    return float(torch.stack([clipped_sum(part, clip) for part in parts]).sum(0).norm())


if __name__ == "__main__":
    main()
