"""Synthetic images of one site: a latent diffusion model of its training images, curated, kept on the site's own disk.

Neither images nor weights leave. What is answered are counts and the figures of the copy test.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from medfl import config, seeding
from medfl.data.sample import SiteData
from medfl.errors import DataError
from medfl.files import sha256, write_bytes, write_tensors
from medfl.methods.base import Method
from medfl.study import Study
from medfl.training import Device, Plan, Task, Views, train_locally

log = logging.getLogger("medfl.synthesis")
IMAGES, RECORD, SHEET = "images.safetensors", "curation.json", "contact_sheet.png"
EVERY = 15.0  # s between two lines of progress
FEATURE_BATCH = 128
SAMPLED = 4  # times the batch of the training: without gradients it fits, and takes two thirds of the time on a CPU


def folder_of(state_dir: str, site: str) -> Path:
    """Where a site keeps its synthetic images."""
    return Path(state_dir) / "synthetic" / site


def make(study: Study, data: SiteData, images: Tensor, views: Views, where: Device) -> dict[str, float]:
    """Train, sample, curate and write; where the same was done before, nothing. Returns what may be answered.

    Args:
        images: the site's training images (N, C, *S).

    Raises:
        DataError: too few images.
    """
    from medfl.synthesis.curation import curate  # MONAI and matplotlib: seconds, which no other message should pay
    from medfl.synthesis.sampling import sample
    from medfl.synthesis.sheet import contact_sheet
    from medfl.synthesis.training import train

    plan, folder = study.synthesis, folder_of(study.state_dir, data.name)
    seed, real = seeding.key(study.seed, "synthesis", data.name), data.train.images
    fingerprint = hashlib.sha256(f"{plan} {seed} {tuple(real.shape)} {float(real.double().sum())}".encode()).hexdigest()
    record = read_record(folder)
    if record.get("fingerprint") == fingerprint:
        return _answered(record)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    told, budget = _Told(data.name), max(1, round(plan.budget * len(real)))
    model = train(
        images, plan, where, folder=folder / "training", held_out=_held_out(data.train.patients, plan.held_out, seed),
        seed=seeding.key(seed, "diffusion"), report=told.step,
    )  # fmt: skip
    model.save(folder / "model")
    candidates = sample(
        model, count=round(plan.candidates * budget), steps=plan.sampler_steps, seed=seeding.key(seed, "sample"),
        batch_size=SAMPLED * plan.batch_size, where=where, report=lambda done, n: told.step("sampling", done, n),
    )  # fmt: skip
    log.info("synthesis at %s: pretraining the features, then curating %d images", data.name, len(candidates))
    features = _features(study, data.name, Task(images, None, views), where)
    others = torch.cat([data.val.images, data.test.images])
    found = curate(candidates, real, others, features, keep=budget, seed=seeding.key(seed, "curation"))
    contact_sheet(folder / SHEET, candidates, found, real=real)
    digest = write_tensors(folder / IMAGES, {"images": candidates[found.kept]})
    record = {"site": data.name, **found.record(), "sha256": digest, "fingerprint": fingerprint}
    write_bytes(folder / RECORD, json.dumps(record, indent=1).encode())  # last: it says that all of it is there
    return _answered(record)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished curation; empty where there is none."""
    path = folder / RECORD
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return found


def load(state_dir: str, site: str, count: int) -> Tensor:
    """The `count` most realistic synthetic images (count, C, *S) of a site.

    Raises:
        DataError: they were never made, are fewer, or are damaged.
    """
    folder = folder_of(state_dir, site)
    record = read_record(folder)
    if not record:
        raise DataError(
            f"site '{site}': training.synthetic asks for synthetic images, and none were made. Run the stage "
            "synthesize first (medfl synthesize), with the same run.state_dir."
        )
    if sha256(folder / IMAGES) != record["sha256"]:
        raise DataError(
            f"site '{site}': {IMAGES} is damaged. Remove {folder} there and run the stage synthesize again."
        )
    images = load_file(folder / IMAGES)["images"]
    if len(images) < count:
        raise DataError(
            f"site '{site}': training.synthetic asks for {count} images, the curation kept {len(images)}. Lower "
            "training.synthetic, or raise synthesis.candidates and synthesis.budget."
        )
    return images[:count]


def _answered(record: dict[str, Any]) -> dict[str, float]:
    """Counts, and the figures of the copy test: nothing of a single image."""
    counts = {f"synthesis/{_word(reason)}": float(number) for reason, number in record["counts"].items()}
    parts = {"value": "share", "low": "share_low", "high": "share_high"}
    shares = {f"synthesis/copy_share/{name}": record["copies"][part] for name, part in parts.items()}
    return (
        counts
        | {name: value for name, value in shares.items() if value is not None}
        | {"synthesis/exportable": float(record["exportable"])}
    )


def _word(reason: str) -> str:
    return reason.replace(": ", "_").replace(" ", "_")


def _held_out(patients: Sequence[str], share: float, seed: int) -> list[int]:
    """Places of the images of a share of the patients, at least one patient if there is any share."""
    names = sorted(set(patients), key=lambda patient: seeding.key(seed, patient))
    chosen = set(names[: max(1, round(share * len(names)))] if share and len(names) > 1 else ())
    return [place for place, patient in enumerate(patients) if patient in chosen]


def _features(study: Study, site: str, task: Task, where: Device) -> Callable[[Tensor], Tensor]:
    """An encoder pretrained on this site's images alone: realism and copies are judged by it."""
    plan = study.synthesis
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key(study.seed, "synthesis", site, "features"))
        method: Method = config.build(plan.features)
    method.to(where.device)
    optimizer = config.build(study.training.optimizer, parameters=method.trainable())
    steps = Plan(study.seed, site, 1, 1, plan.feature_steps, study.training.batch_size, study.training.warmup)
    train_locally(method, task, optimizer, steps, where)
    method.eval()

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        parts = [method.encoder(part.to(where.device)).float().cpu() for part in torch.split(images, FEATURE_BATCH)]
        return torch.cat(parts)

    return features


class _Told:
    """Progress in the site's log: what is being done, its loss, and the time that this phase still takes."""

    def __init__(self, site: str) -> None:
        self.site, self.phase, self.began, self.first, self.last = site, "", 0.0, 0, 0.0

    def step(self, phase: str, done: int, count: int, loss: float | None = None) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self.phase, self.began, self.first = phase, now, done
        elif now - self.last < EVERY and done < count:
            return
        self.last = now
        left = (now - self.began) / max(1, done - self.first) * (count - done)
        time_left = f", {int(left // 60)}:{int(left % 60):02d} left" if done > self.first else ""
        lost = "" if loss is None else f", loss {loss:.4f}"
        log.info("synthesis at %s: %s %d/%d%s%s", self.site, phase, done, count, lost, time_left)
