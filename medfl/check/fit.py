"""One real round on this site's own images, cut short: does it run, how long would it take, what would it need."""

import csv
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from medfl import config, seeding, server_books
from medfl.check.finding import Finding
from medfl.check.listing import Listing
from medfl.check.scope import Scope
from medfl.errors import MedflError
from medfl.gate import Update
from medfl.messages import Broadcast, sizes_of
from medfl.rounds import order_of
from medfl.server_state import Blueprint, Server
from medfl.site import Site
from medfl.study import Study
from medfl.training import Plan, train_locally
from medfl.workshop import sites_of, workshop

STEPS = 2  # timed, after a first one
BATCHES = 2  # that the sample of the images fills
LEAST = 48  # images of the sample
SHOWN = 16
LONG = 60.0  # minutes of a round, beyond which it is worth saying


@dataclass(frozen=True)
class Fit:
    """What a round took here, and how the training sees these images."""

    step: float  # s
    rest: float  # s of a round beside its steps: the refresh pass
    batch: int  # images of a step
    down: int  # bytes of a broadcast
    up: int  # bytes of an answer
    peak: float  # bytes of memory
    views: Tensor  # (n, C, *S), in about [-1, 1]


def sample(rows: Sequence[int], splits: Sequence[str], labels: Sequence[int], count: int) -> list[int]:
    """Rows that stand for all: in turn of each split and label, whole data lists where they are short."""
    cells: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row in rows:
        cells[splits[row], labels[row]].append(row)
    chosen: list[int] = []
    depth = 0
    while len(chosen) < min(count, len(rows)):
        chosen += [members[depth] for members in cells.values() if depth < len(members)]
        depth += 1
    return sorted(chosen)


def number(study: Study) -> int:
    """Images of the sample; a third of them are not for training."""
    return max(LEAST, round(1.5 * BATCHES * study.training.batch_size))


def run(scope: Scope, listing: Listing | None, rows: Sequence[int], splits: Sequence[str], *, train: int | None) -> Fit:
    """
    Args:
        rows: of the sample; `splits` of all rows.
        train: training images of the whole site; None: the sample is all of it.

    Raises:
        MedflError, RuntimeError (too little memory) or another: whatever would stop a round here.
    """
    with tempfile.TemporaryDirectory(prefix="medfl-check-") as folder:
        study = _short(scope.study, Path(folder), listing, rows, splits)
        data = sites_of(study)[0]
        site = Site(workshop(study.source), data, {data.name: len(data.train)})
        return _measured(study, site, len(site.images) if train is None else train)


def _short(study: Study, folder: Path, listing: Listing | None, rows: Sequence[int], splits: Sequence[str]) -> Study:
    """The study on the sample alone, with its state in `folder`."""
    tree: dict[str, Any] = yaml.safe_load(study.source)
    tree["run"] |= {"dir": str(folder), "state_dir": str(folder)}
    tree["training"]["synthetic"] = 0.0
    tree["privacy"]["max_epsilon"] = None  # nothing of this round is released
    tree["sites"]["min_images"] = 1
    if listing is not None:
        path, column = folder / "sample.csv", listing.columns.get("split", "medfl_split")
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*listing.rows[0], *({column} - listing.rows[0].keys())])
            writer.writeheader()
            writer.writerows({**listing.rows[row], column: split} for row, split in _apart(listing, rows, splits))
        slabs = tree["data"].get("slab_splits")
        tree["data"] |= {"datalist": str(path)} | ({} if slabs else {"split": column})
    return config.parse(yaml.safe_dump(tree, sort_keys=False))


def _apart(listing: Listing, rows: Sequence[int], splits: Sequence[str]) -> list[tuple[int, str]]:
    """Rows with their splits, a patient's first one for all: that patients overlap is told elsewhere."""
    first: dict[str, str] = {}
    patients = listing.patients
    return [(row, first.setdefault(patients[row], splits[row])) for row in rows]


def _measured(study: Study, site: Site, train: int) -> Fit:
    server = Server.start(study, "federated", Blueprint.of(study), None)
    order = order_of(study, server, 1, 1)
    if server.blueprint.books and study.privacy.on:
        server.set_books(server_books.public(study, server.tensors()))
    elif server.blueprint.books:
        centres = site.seed_codebooks(Broadcast(order, server.flat))
        update = Update(site.data.name, centres.flat, len(site.images), {}, 0.0)
        books = server_books.first(server.books.kinds, [update], server.blueprint.seeds, study.seed)
        server.set_books(books)
    form = site.shop.down
    sent = form.encode(server.flat)
    answer = site.train(Broadcast(replace(order, layout=form.digest), sent))  # with what the first round takes longer
    began = time.perf_counter()
    site.refresh(Broadcast(order, server.flat))
    refresh, most = time.perf_counter() - began, study.rounds.refresh_volumes
    rest = refresh * min(train, most) / min(len(site.images), most)
    records = answer.to_record(), Broadcast(order, sent).to_record()
    up, down = (sum(sizes_of(record).values()) for record in records)
    batch = min(len(site.task.images), study.training.batch_size)
    return Fit(_step(study, site), rest, batch, down, up, _peak(site), _views(study, site))


def _step(study: Study, site: Site) -> float:
    """Seconds of a step, of those after the first round's."""
    shop, plan = site.shop, study.training
    optimizer = config.build(plan.optimizer, parameters=shop.method.trainable())
    short = Plan(study.seed, site.data.name, 1, study.rounds.count, STEPS, plan.batch_size, plan.warmup, plan.schedule)
    began = time.perf_counter()
    train_locally(shop.method, site.task, optimizer, short, shop.where)  # reads its losses back, so all is done
    return (time.perf_counter() - began) / STEPS


def _peak(site: Site) -> float:
    if site.shop.where.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(site.shop.where.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _views(study: Study, site: Site) -> Tensor:
    method, task = site.shop.method, site.task
    draw = seeding.generator(study.seed, "check")
    chosen = torch.randperm(len(task.images), generator=draw)[:SHOWN]
    views = task.batch(chosen, seeding.key(study.seed, "check"), site.shop.where, count=method.views,
                       masked=method.segments)  # fmt: skip
    images = views[0][:, :-1] if method.segments else views[0]
    return images.detach().float().cpu()


def minutes(fit: Fit, study: Study, speed: float | None) -> float:
    """Of one round, without waiting for others; the way down as fast as the way up.

    Args:
        speed: bytes per second; None: nothing for the network.
    """
    wire = 0.0 if speed is None else (fit.up + fit.down) / speed
    return (study.training.steps * fit.step + fit.rest + wire) / 60


def span(minutes: float) -> str:
    """A time for people."""
    if minutes < 1:
        return f"{minutes * 60:.0f} s"
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"


def findings(scope: Scope, fit: Fit, speed: float | None) -> list[Finding]:
    study, took = scope.study, minutes(fit, scope.study, speed)
    plan = study.training
    whole = f"{span(took * study.rounds.count)} for {study.rounds.count} rounds"
    total = f"about {span(took)} per round of {plan.steps} steps, {whole}"
    wire = {"up_mb": round(fit.up / 1e6, 2), "down_mb": round(fit.down / 1e6, 2)}
    counts: Mapping[str, float] = {"minutes": round(took, 2), "with_network": int(speed is not None), **wire}
    slow = took > LONG or took * 60 > study.rounds.deadline
    time_ = Finding("fit", "time", "pass", total, counts=counts)
    if slow:
        why = f"The study waits {study.rounds.deadline / 60:.0f} minutes for a round at most."
        time_ = Finding("fit", "time", "warn", total, why, "A GPU, more cores, or a smaller data.size.", counts)
    rate = f"{fit.step:.2f} s per step of {fit.batch} images, {fit.peak / 1e9:.1f} GB of memory at most"
    most, cost = scope.site.policy.most_bytes, {"seconds": round(fit.step, 3), "peak_gb": round(fit.peak / 1e9, 2)}
    return [
        Finding("fit", "step", "pass", rate, counts=cost),
        time_,
        Finding("fit", "bytes", "pass" if fit.up <= most else "fail",
                f"each round brings {fit.down / 1e6:.1f} MB and sends {fit.up / 1e6:.1f} MB", counts=wire,
                why="" if fit.up <= most else "policy.most_bytes allows less.",
                fix="" if fit.up <= most else "Raise it in site.yaml if you agree."),
    ]  # fmt: skip


def failed(error: Exception) -> Finding:
    """What stopped the round."""
    first = next(iter(str(error).splitlines()), "")
    if not isinstance(error, MedflError):
        first = f"{type(error).__name__}: {first}"
    memory = isinstance(error, RuntimeError | MemoryError) and "memory" in first.lower()
    fix = "Free the GPU, or ask the study lead for a smaller batch." if memory else "Repair what the line above says."
    why = "This is the very step that the study would run here."
    return Finding("fit", "step", "fail", "No training step could be made.", why, fix, {"seconds": 0}, [first])
