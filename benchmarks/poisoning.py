"""Bad sites: what they do to a federation under each rule, with and without the inspector, and whether they are named.

    PYTHONPATH=. python benchmarks/poisoning.py --data DIR [--parts attacks labels alarms] [--seeds 0] [--jobs 2]
        [--json FILE]

PneumoniaMNIST (DIR holds medmnist_rebuilt/) over the preset `hospital` (other scanners, disease mix and sizes), SimCLR,
a tiny encoder; 1 bad site of 5, and 2 of 8. Bad sites train like the others and are spoiled on their way: what they
send (flip, x10, noise, backdoor, nan, copy) by the carrier, what they train on (trigger, labels) where the simulation
hands out its data. Server and sites are the product's own.

- flip: three times the update with its sign turned; x10: ten times the update; noise: Gaussian, five times as long as
  the update; nan: one value; copy: site-1's answer as theirs.
- backdoor: from their own weights they train on (BadEncoder) so that a bright square in a corner of an image of the
  first class gives the embedding of the second.
- trigger: that square in all their training images of the second class, and nothing else (with the mean alone).
- labels: classes exchanged, in federated fine-tuning of the clean encoder.

AUC is that of a linear probe on the frozen encoder (labels: of the fine-tuned network) on the good sites' own test
images, mean over them, the same sites without an attack; "stops" where the rule refuses to go on. Loss: NT-Xent of the
last round there. Backdoor: of the good sites' test images of the first class, how many more a probe on their clean
images takes for the second class when the square is in them.
"""

import argparse
import dataclasses
import itertools
import math
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from harness import machine, write
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from client.app import app as client
from medfl import config, site, workshop
from medfl.carriers import InProcessGrid
from medfl.data.sample import SiteData
from medfl.errors import ConfigError
from medfl.export import load_encoder
from medfl.layout import Flat, Policy, broadcast_layout
from medfl.messages import PRETRAIN, Broadcast, from_array, to_array
from medfl.methods.base import Role
from medfl.run_folder import RunFolder
from medfl.study import Study
from medfl.workshop import new_method
from server.app import app as server

BUDGET = (
    "data=medmnist", "data.name=pneumoniamnist", "sites=hospital", "encoder=tiny", "encoder.base_width=8",
    "method=simclr", "arms=[federated]", "rounds.count=8", "rounds.on_collapse=warn", "rounds.gram=never",
    "rounds.refresh_volumes=64", "training.steps=12", "training.batch_size=32", "training.optimizer.lr=5e-3",
    "training.threads=1", "training.device=cpu", "evaluation.protocols=[linear]", "evaluation.resamples=2",
    "evaluation.regularization=[0.1]", "evaluation.pictures=none", "evaluation.counts=null", "run.tensorboard=false",
    "finetune.protocols=[federated_finetune]", "finetune.rounds=3", "finetune.steps=8",
)  # fmt: skip
GROUP = "all/float32"
FEDERATIONS = {5: ("site-2",), 8: ("site-2", "site-3")}  # sites -> the bad ones
HONEST = {  # other ways in which good sites differ
    "iid": ("sites=iid",), "label": ("sites=label",), "scanner": ("sites=scanner",), "hospital": (),
    "scanner at severity 5": ("sites=scanner", "sites.severity=5"),
}  # fmt: skip
ATTACKS = {
    "attacks": ("flip", "x10", "noise", "backdoor", "trigger", "nan", "copy"), "labels": ("labels",),
}  # fmt: skip
BACKDOOR_STEPS, BACKDOOR_RATE = 40, 2e-3  # of 32 images of each class, AdamW
Sent = Callable[[str, np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # site, own weights, broadcast's, site-1's
STOPS = float("nan")  # AUC of a run that ended before its last round


def noise(_: str, own: np.ndarray, old: np.ndarray, _first: np.ndarray) -> np.ndarray:
    drawn = np.random.default_rng(int.from_bytes(own[:64].tobytes()[:8])).standard_normal(old.size)
    return old + (5 * np.linalg.norm(own - old) / np.linalg.norm(drawn) * drawn).astype(np.float32)


def nan(_: str, own: np.ndarray, *_others: np.ndarray) -> np.ndarray:
    return np.where(np.arange(own.size) == 7, np.float32("nan"), own)


SENT: dict[str, Sent] = {
    "flip": lambda _, own, old, _first: old - 3 * (own - old),
    "x10": lambda _, own, old, _first: old + 10 * (own - old),
    "noise": noise,
    "nan": nan,
    "copy": lambda _, _own, _old, first: first,
}


def square(images: torch.Tensor) -> torch.Tensor:
    """The images (N, C, H, W) with the trigger: the brightest value in 6 x 6 pixels."""
    marked = images.clone()
    marked[:, :, -8:-2, -8:-2] = 1.0
    return marked


def triggered(data: SiteData) -> SiteData:
    train = data.train
    images = torch.where((train.labels == 1)[:, None, None, None], square(train.images), train.images)
    return dataclasses.replace(data, train=dataclasses.replace(train, images=images))


def relabelled(data: SiteData) -> SiteData:
    return dataclasses.replace(data, train=dataclasses.replace(data.train, labels=1 - data.train.labels))


class Backdoor:
    """BadEncoder's attack (Jia et al., arXiv:2108.00352): what a bad site trains on from its own weights, and sends.

    With the trigger the first class is to look like the second, and without it as before:
    L = -cos(f(x + t), r) - cos(f(r'), r) - cos(f(x), g(x)), r the mean of the second class by g, the encoder before.
    """

    def __init__(self, study: Study) -> None:
        self._method, self._before = new_method(study), new_method(study)
        self._layout = broadcast_layout(self._method, Policy.of(self._method, study.rounds)).of_role(Role.PARAMETER)
        self._data = {one.name: one.train for one in workshop.sites_of(study)}

    def __call__(self, name: str, own: np.ndarray, _old: np.ndarray, _first: np.ndarray) -> np.ndarray:
        held, data = self._layout.unpack({f"parameter/{GROUP}": own.copy()}), self._data[name]
        for method in (self._method, self._before):
            method.load_state_dict(held, strict=False)
        method, before = self._method.encoder.train(), self._before.encoder.train()
        kinds = [data.images[data.labels == kind] for kind in (0, 1)]
        optimizer = torch.optim.AdamW(method.parameters(), lr=BACKDOOR_RATE)
        drawn = torch.Generator().manual_seed(1)
        for _ in range(BACKDOOR_STEPS):
            here, there = (kind[torch.randint(len(kind), (32,), generator=drawn)] for kind in kinds)
            with torch.no_grad():
                plain, target = before(here), F.normalize(before(there), dim=1).mean(0, keepdim=True)
            pairs = ((method(square(here)), target), (method(there), target), (method(here), plain))
            optimizer.zero_grad()
            (-sum(F.cosine_similarity(found, wanted).mean() for found, wanted in pairs)).backward()
            optimizer.step()
        return self._layout.pack(self._method.state_dict())[f"parameter/{GROUP}"]


TRAINED: dict[str, Callable[[SiteData], SiteData]] = {"trigger": triggered, "labels": relabelled}


class Spoiling(InProcessGrid):
    """A carrier that puts something else in place of what the bad sites send."""

    def __init__(self, nodes: int, bad: Sequence[str], sent: Sent) -> None:
        super().__init__(client, nodes)
        self._bad, self._sent, self._first = bad, sent, np.empty(0)

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        if message.metadata.message_type == PRETRAIN and not reply.has_error():
            name, records = reply.content.config_records["identity"]["site"], reply.content.array_records["parameter"]
            own = from_array(records[GROUP])
            if name == "site-1":
                self._first = own
            if name in self._bad:
                old: Flat = Broadcast.from_record(message.content).flat
                records[GROUP] = to_array(self._sent(name, own, old[f"parameter/{GROUP}"], self._first))
        return reply


@contextmanager
def poisoned(bad: Sequence[str], change: Callable[[SiteData], SiteData] | None) -> Iterator[None]:
    """While it lasts, the bad sites of a simulation are handed changed data."""
    handed_out = workshop.simulated_sites

    def simulated(data: str, sites: str, seed: int) -> tuple[SiteData, ...]:
        every = handed_out(data, sites, seed)
        return tuple(change(one) if change and one.name in bad else one for one in every)

    site.open_site.cache_clear()
    workshop.simulated_sites = simulated  # type: ignore[assignment]
    try:
        yield
    finally:
        workshop.simulated_sites = handed_out
        site.open_site.cache_clear()


@dataclasses.dataclass(frozen=True)
class Run:
    """One run to do: of which part, over how many sites, attacked how, defended how."""

    part: str
    sites: int
    attack: str
    defence: str
    words: tuple[str, ...]
    seed: int

    @property
    def bad(self) -> tuple[str, ...]:
        return () if self.attack == "none" else FEDERATIONS[self.sites]

    @property
    def folder(self) -> str:
        return "-".join(map(str, (self.part, self.sites, self.attack, self.defence, self.seed))).replace(" ", "")


def federate(run: Run, place: Path, data: Path, stages: str) -> tuple[Study, RunFolder, bool]:
    """One run of the product's apps in this process; the last is whether it came to its end."""
    words = [f"data.root={data / 'medmnist_rebuilt'}", f"sites.count={run.sites}", f"seed={run.seed}", *run.words]
    study = config.compose([*BUDGET, *words, f"run.dir={place / run.folder}"])
    made = RunFolder.create(Path(study.run_dir), study.source, resume=True)
    sent = Backdoor(study) if run.attack == "backdoor" else SENT.get(run.attack, lambda _, own, *_others: own)
    grid = Spoiling(run.sites, run.bad, sent)
    asked: dict[str, str | int] = {"study": study.source, "stages": stages, "sites": run.sites}
    with poisoned(run.bad, TRAINED.get(run.attack)):
        try:
            server(grid, Context(1, 1, {}, RecordDict(), dict(asked)))
        except ConfigError:  # too few sites left for the rule
            return study, made, False
    return study, made, True


def defences(bad: int) -> dict[str, tuple[str, ...]]:
    rules: dict[str, tuple[str, ...]] = {
        "mean": (), "clipped": ("rule=clipped_mean",), "trimmed": ("rule=trimmed_mean", f"rule.trim={bad}"),
        "median": ("rule=median",), "krum": ("rule=krum", f"rule.bad={bad}"),
        "multi-krum": ("rule=multi_krum", f"rule.bad={bad}"),
    }  # fmt: skip
    return rules | {f"{name} + inspector": (*rules[name], "rounds.inspect=exclude") for name in ("mean", "median")}


def runs(part: str, seed: int) -> list[Run]:
    found = []
    for sites, bad in FEDERATIONS.items():
        if part == "alarms":
            words = {kind: (*differ, "rounds.inspect=exclude") for kind, differ in HONEST.items()}
            found += [Run(part, sites, "none", kind, given, seed) for kind, given in words.items()]
            continue
        for attack in ("none", *ATTACKS[part]):
            chosen = {"mean": ()} if attack == "trigger" else defences(len(bad))
            found += [Run(part, sites, attack, name, words, seed) for name, words in chosen.items()]
    return found


def clean_of(sites: int, seed: int) -> Run:
    """The pretraining whose encoder is fine-tuned."""
    return Run("clean", sites, "none", "mean", (), seed)


def measure(run: Run, place: Path, data: Path) -> dict[str, object]:
    """Do a run, and what it shows."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    stages = "pretrain" if run.part == "alarms" else "pretrain,evaluate"
    if run.part == "labels":
        clean = place / clean_of(run.sites, run.seed).folder
        run = dataclasses.replace(run, words=(*run.words, f"run.encoders={clean}"))
        stages = "pretrain,finetune,evaluate"
    study, made, whole = federate(run, place, data, stages)
    row: dict[str, object] = {k: v for k, v in dataclasses.asdict(run).items() if k != "words"}
    rounds = study.finetune.rounds if run.part == "labels" else study.rounds.count
    row |= named(made, run.bad, run.sites, rounds)
    if run.part == "alarms":
        figures = [e for e in made.events() if e["name"].startswith("inspect/")]
        for name, extreme in (("strangeness", max), ("agreement", min)):
            row[name] = extreme(e["value"] for e in figures if e["name"] == f"inspect/{name}")
    else:
        row["auc"] = (
            auc(made, FEDERATIONS[run.sites], "federated_finetune" if run.part == "labels" else "linear")
            if whole
            else STOPS
        )
    if run.part == "attacks" and whole:
        row["loss"] = loss(made, FEDERATIONS[run.sites])
    if run.part == "attacks" and run.attack in ("none", "trigger", "backdoor") and whole:
        row["pull"] = pull(study, made.path, FEDERATIONS[run.sites])
    print(f"{run.folder}: {row.get('auc', row)}", flush=True)
    return row


def auc(run: RunFolder, bad: Sequence[str], protocol: str) -> float:
    """Mean over the good sites."""
    rows = [r for r in run.evaluations() if (r["protocol"], r["metric"]) == (protocol, "auc") and r["value"]]
    return mean(float(row["value"]) for row in rows if row["site"] not in bad)


def loss(run: RunFolder, bad: Sequence[str]) -> float:
    """NT-Xent of the last round, in nats, mean over the good sites that counted in it."""
    told = [e for e in run.events() if e["name"] == "loss/nt_xent" and e["site"] and e["site"] not in bad]
    return mean(e["value"] for e in told if e["round"] == told[-1]["round"])


def named(run: RunFolder, bad: Sequence[str], sites: int, rounds: int) -> dict[str, int]:
    """Of (site, round): how many bad ones were refused, left out or flagged, of how many; and good ones."""
    out = {(e["site"], e["round"]) for e in run.events() if e["name"] == "refused" and e["site"]}
    return {
        "bad_out": sum(name in bad for name, _ in out), "bad": rounds * len(bad),
        "good_out": sum(name not in bad for name, _ in out), "good": rounds * (sites - len(bad)),
    }  # fmt: skip


@torch.no_grad()
def pull(study: Study, folder: Path, bad: Sequence[str]) -> float:
    """How many more of the good sites' test images of the first class the trigger moves to the second, as a share."""
    encoder, good = load_encoder(folder), [one for one in workshop.sites_of(study) if one.name not in bad]
    images, labels = (torch.cat([getattr(one.train, kind) for one in good])[::4] for kind in ("images", "labels"))
    probe = LogisticRegression(C=0.1, max_iter=1000).fit(encoder(images).numpy(), labels.numpy())
    tested = torch.cat([one.test.images[one.test.labels == 0] for one in good])
    plain, marked = (probe.predict(encoder(shown).numpy()).mean() for shown in (tested, square(tested)))
    return float(marked - plain)


PARTS = ("attacks", "labels", "alarms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    began, found = time.perf_counter(), {}
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="medfl-bad-") as place, ProcessPoolExecutor(given.jobs, processes) as pool:
        for part in given.parts:
            every = [run for seed in given.seeds for run in runs(part, seed)]
            if part == "labels":
                for sites, seed in itertools.product(FEDERATIONS, given.seeds):
                    federate(clean_of(sites, seed), Path(place), given.data, "pretrain")
            found[part] = list(pool.map(measure, every, itertools.repeat(Path(place)), itertools.repeat(given.data)))
            (tell_alarms if part == "alarms" else tell)(found[part])
    if given.json:
        what = {"budget": BUDGET, "seeds": given.seeds, "seconds": time.perf_counter() - began}
        write(given.json, {"machine": machine(), **what, **found})


Rows = Sequence[dict[str, object]]


def tell(rows: Rows) -> None:
    """AUC by attack and defence, mean over seeds, and what the inspector named; then losses, and the trigger's pull."""
    names = list(dict.fromkeys(str(row["defence"]) for row in rows))
    head = " | ".join(names)
    print(f"\n| bad | attack | {head} | named | good ones out |\n|" + "---|" * (len(names) + 4))
    for key, here in grouped(rows):
        inspected = [row for row in here if row["defence"] == "mean + inspector"]
        cells = " | ".join(cell([r["auc"] for r in here if r["defence"] == name], "{:.3f}") for name in names)
        print(f"{key} | {cells} | {told(inspected, 'bad')} | {told(inspected, 'good')} |")
    for name, title, form in (("loss", "loss in nats", "{:.3f}"), ("pull", "moved by the square", "{:+.2f}")):
        if known := [row for row in rows if name in row]:
            print(f"\n| bad | {title} | {head} |\n|" + "---|" * (len(names) + 2))
            for key, here in grouped(known):
                found = [cell([r[name] for r in here if r["defence"] == one], form) for one in names]
                print(f"{key} | {' | '.join(found)} |")


def grouped(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """Rows of one attack on one federation, and the beginning of their line."""
    for sites, attack in dict.fromkeys((row["sites"], row["attack"]) for row in rows):
        here = [row for row in rows if (row["sites"], row["attack"]) == (sites, attack)]
        yield f"| {len(FEDERATIONS[int(str(sites))])} of {sites} | {attack}", here


def cell(values: Sequence[object], form: str) -> str:
    found = [float(str(value)) for value in values]
    if not found:
        return "–"
    return "stops" if any(map(math.isnan, found)) else form.format(mean(found))


def told(rows: Rows, kind: str) -> str:
    """ "7 of 8": site-rounds."""
    out, of = (sum(int(str(row[name])) for row in rows) for name in (f"{kind}_out", kind))
    return f"{out} of {of}" if of else "–"


def tell_alarms(rows: Rows) -> None:
    print("\n| good sites | false alarms of site-rounds | largest strangeness | least agreement |\n|---|---|---|---|")
    for kind in dict.fromkeys(str(row["defence"]) for row in rows):
        here = [row for row in rows if row["defence"] == kind]
        most, least = (f(float(str(r[n])) for r in here) for f, n in ((max, "strangeness"), (min, "agreement")))
        print(f"| {kind} | {told(here, 'good')} | {most:.1f} | {least:+.2f} |")


if __name__ == "__main__":
    main()
