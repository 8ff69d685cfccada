"""The audit of a finished simulation: one site is attacked, the one with the fewest patients."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfl import arms, config, export, seeding, server_books
from medfl.audit.canaries import Marked, lower_bound
from medfl.audit.inversion import Inverted, gradient, invert, judged
from medfl.audit.membership import confidence, inference, likeness
from medfl.errors import ConfigError
from medfl.files import write_bytes
from medfl.finetuning import Task, derive
from medfl.methods.base import Method
from medfl.privacy.accounting import PATIENT, Release, spent
from medfl.privacy.ledger import WHAT, Ledger
from medfl.run_folder import RunFolder
from medfl.site import Site, open_site
from medfl.study import Study
from medfl.training import Plan, train_locally
from medfl.workshop import new_method, sites_of

FILE = "audit.json"
TUNED = "federated_finetune:federated:1"
MOST = 1000  # images of each kind
LEAST = 30  # images of the validation split
SHOWN, GUESSES = 64, 16  # images that an inverted one is compared with
Say = Callable[[str], None]


def audit(folder: RunFolder, *, canaries: int, seed: int, say: Say) -> dict[str, Any]:
    """Attack a run and write audit.json.

    Raises:
        ConfigError: a run among real sites, whose images are not here, or one that has not finished.
    """
    study = config.parse(folder.config())
    if study.study_id:
        raise ConfigError(
            f"{folder.path} is of real sites, and their images are not here. Audit a simulation of the same study: "
            "medfl simulate with its overrides."
        )
    sites = sites_of(study)
    able = [place for place, one in enumerate(sites) if not one.held_out]
    place = min(able, key=lambda one: len(set(sites[one].train.patients)))
    site = open_site(study.source, place)
    people = len(set(site.data.train.patients))
    found: dict[str, Any] = {"site": site.data.name, "patients": people, "seed": seed}
    if study.privacy.on:
        say(f"{canaries} canaries in the training of {site.data.name}")
        found["canaries"] = marked(study, site, canaries, seed)
        found["ledger"] = ledger_findings(folder, study)
    say("membership of single patients")
    found["membership"] = members(folder, study, site)
    if site.data.exclusive:
        say("images from updates")
        found["inversion"] = inversions(folder, study, site, seed)
    write_bytes(folder.path / FILE, json.dumps(found, indent=1).encode())
    return found


def marked(study: Study, site: Site, canaries: int, seed: int, kind: type[Marked] = Marked) -> dict[str, Any]:
    """The lower bound on ε of all the pretraining of one site, beside what is claimed for the same steps.

    Unit: what is clipped, a patient or a bucket. The site trains alone; with others the noise would be larger.
    """
    guard, where, plan = site.guard, site.shop.where, study.training
    if guard is None:
        raise ConfigError("privacy=none: there is no ε to look for. Take privacy=patient or privacy=group.")
    method, units = _fresh(study, site), guard.units(site.task)
    optimizer = config.build(plan.optimizer, parameters=method.trainable())
    before: Marked | None = None
    for number in range(1, study.rounds.count + 1):
        round_ = Plan(study.seed, site.data.name, number, study.rounds.count, plan.steps, plan.batch_size, plan.warmup,
                      plan.schedule)  # fmt: skip
        with kind(method, site.task, round_, where, study.privacy, units) as gradients:
            gradients.follow(before) if before else gradients.mark(canaries, seed=seed)
            train_locally(method, site.task, optimizer, round_, where, gradients)
        before = gradients
    if before is None:
        raise ConfigError("rounds.count: there is no round to audit.")
    steps, delta = study.rounds.count * plan.steps, min(guard.delta, 0.01 / canaries)  # a larger δ hides what is found
    claim = spent([Release(PATIENT, study.privacy.noise, units.rate, steps)], delta)
    lower = lower_bound(before.seen, before.part, delta)
    unit = "patient" if study.privacy.mechanism == "patient" else "bucket"
    held = lower.epsilon <= claim.epsilon
    return {"unit": unit, "claim": claim.epsilon, "delta": delta, "steps": steps, "held": held} | asdict(lower)


def _fresh(study: Study, site: Site) -> Method:
    """The method as the first round starts it."""
    method = new_method(study)
    if method.codebooks():
        for name, book in server_books.public(study, method.state_dict()).items():
            method.codebooks()[name].set(book.counts, book.sums)
    method.to(site.shop.where.device).isolate()
    return method


def ledger_findings(folder: RunFolder, study: Study) -> list[str]:
    """Releases that the run saw and a site's ledger does not have: somebody took ε back."""
    found = []
    answered: dict[str, set[tuple[str, int]]] = {}
    for event in folder.events():
        if event["name"] == "site/epsilon_rdp" and event["site"]:
            answered.setdefault(event["site"], set()).add((event["arm"], event["round"]))
    for site, rounds in sorted(answered.items()):
        lines = [line for line in Ledger.of(Path(study.state_dir), site).lines() if line.get("what") == WHAT]
        lacking = rounds - {(line.get("arm"), line.get("round")) for line in lines}
        if lacking:
            found.append(
                f"site '{site}': its ledger lacks {len(lacking)} of the {len(rounds)} releases that this run saw, "
                "so its ε is too small."
            )
    return found


def members(folder: RunFolder, study: Study, site: Site) -> dict[str, Any]:
    """Training images against others of the same site, by the encoder and, where there is one, by a classifier.

    Others are of the validation split, which most data sets drew from the same source, or of the test split where that
    is small. What the untrained encoder tells of them is no trace of training.
    """
    rest, where = site.data.val if len(site.data.val) >= LEAST else site.data.test, site.shop.where.device
    train, other = site.images[:MOST], rest.images[:MOST].to(site.images.device)
    key, found = seeding.key(study.seed, "audit", site.data.name), {}
    encoders = {"untrained encoder": new_method(study).encoder, "encoder": export.load_encoder(folder.arm("federated"))}
    for name, encoder in encoders.items():
        pair = [likeness(encoder.to(where), part.to(where), site.shop.views, key=key) for part in (train, other)]
        found[name] = asdict(inference(*pair))
    if (tuned := _tuned(folder, study, site)) is not None:
        parts = [(train, site.data.train.labels[:MOST]), (other, rest.labels[:MOST])]
        scores = [
            confidence(tuned.classify, images.to(where)[labels >= 0], labels[labels >= 0].to(where))  # type: ignore[arg-type]
            for images, labels in parts
        ]
        found["classifier"] = asdict(inference(*scores))
    return found


def _task(study: Study, site: Site) -> Method | None:
    """The study's classification task for this site's classes."""
    if "classes" not in study.task or not site.data.exclusive or "finetune" not in study.stages:
        return None
    task = Task(tuple(site.data.exclusive), 0)
    return new_method(derive(study, task, protocol="federated_finetune", fraction=study.finetune.fractions[0]))


def _tuned(folder: RunFolder, study: Study, site: Site) -> Method | None:
    method = _task(study, site)
    if method is None or not arms.finished(folder, TUNED):
        return None
    method.load_state_dict(arms.weights(folder, TUNED, "finetune"), strict=False)
    return method.to(site.shop.where.device).eval()


def inversions(folder: RunFolder, study: Study, site: Site, seed: int) -> dict[str, Any]:
    """An image from the update of one image and one step, which the sites' policy forbids, and from a round's update.

    Attacked is the fine-tuning of the run's encoder: its loss is the attacker's own too.
    """
    method = _task(study, site)
    if method is None:
        return {}
    weights = arms.weights(folder, "federated")
    method.load_state_dict({n: t for n, t in weights.items() if n.startswith(export.PREFIX)}, strict=False)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if name.startswith("head."):  # a head of zeros lets nothing through
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    method.to(site.shop.where.device).eval()
    rows = torch.randperm(len(site.images), generator=draw)[:SHOWN]
    image, label = site.images[rows[:1]], site.data.train.labels[rows[:1]].clamp_min(0)
    others = site.data.test.images[:GUESSES].to(image.device)
    shape = tuple(image.shape[1:])
    one = invert(method, gradient(method, image, label), label, shape, seed=seed)
    update = _round(study, site, method)
    many = invert(method, update, label, shape, seed=seed)
    return {
        "one_image": asdict(_judged(one, image, others)),
        "round": asdict(_judged(many, site.images[rows], others)),
        "steps": study.finetune.steps,
        "batch": study.finetune.batch_size,
    }


def _judged(found: Tensor, truth: Tensor, others: Tensor) -> Inverted:
    return judged(found.cpu(), truth.cpu(), others.cpu())


def _round(study: Study, site: Site, method: Method) -> list[Tensor]:
    """What a round of fine-tuning moved each parameter by, with its sign as of a gradient; the method stays."""
    plan, before = study.finetune, {name: tensor.clone() for name, tensor in method.state_dict().items()}
    optimizer = config.build(plan.optimizer, parameters=method.trainable())
    views = config.build(plan.views)
    task = replace(site.task, views=views)
    round_ = Plan(study.seed, site.data.name, 1, plan.rounds, plan.steps, plan.batch_size, plan.warmup, plan.schedule)
    starts = [parameter.detach().clone() for parameter in method.trainable()]
    train_locally(method, task, optimizer, round_, site.shop.where)
    moved = [start - parameter.detach() for start, parameter in zip(starts, method.trainable(), strict=True)]
    method.load_state_dict(before)
    method.eval()
    return moved
