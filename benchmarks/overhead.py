"""Overhead of a simulated round over bare local training: the product and pfl, with the same network and local work.

For each row all forms run in one process, interleaved, on one thread, in CPU time: the product's round through its
in-process carrier; pfl's round (FederatedAveraging, SimulatedBackend, evaluation off) whose users hold the sites'
images and whose model is the product's method with its views and optimizer; and the bare steps of all sites. The
product's round has a refresh pass that pfl's has not: its overhead is over bare steps with that pass, and over those
without it are shown beside. pfl is raced with the small CNN of its own CIFAR-10 set-up too, over that one's bare loop.

    CNN        pfl's set-up: cohort of 50, 50 points a user, 5 steps of 10, drawn data of 3 x 32 x 32
    tiny       the same numbers, the product's tiny encoder, 32 pixels
    resnet18   8 sites, 3 steps of 16, 28 pixels

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/overhead.py [--rounds 5] [--quick] [--only ROW ...] [--json FILE]
"""

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
import torch.nn.functional as F
from harness import Race, figure, machine, met, not_run, race, write
from peers import installed
from rounds import BARE, ROUND, STEPS, Rig
from torch import Tensor, nn

from medfl.optimizers import adamw
from medfl.workshop import Workshop

BAR = 1.0  # the product's overhead factor over pfl's
PFL, USERS, STEP, BATCH, POINTS = "pfl", 50, 5, 10, 50
ROWS = {
    "tiny": (
        "encoder=tiny", f"sites.count={USERS}", "data.size=32", f"data.count={USERS * 80}", f"training.steps={STEP}",
        f"training.batch_size={BATCH}", "rounds.refresh_volumes=16",
    ),
    "resnet18": (
        "encoder=resnet18", "sites.count=8", "data.size=28", "data.count=640", "training.steps=3",
        "training.batch_size=16", "rounds.refresh_volumes=16",
    ),
}  # fmt: skip


class CNN(nn.Module):
    """The small network of pfl's CIFAR-10 benchmark: two convolutions, a hidden layer of 128 units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(images), labels)


class Wrapped(nn.Module):
    """The product's method as pfl wants a model: its loss draws the views too."""

    def __init__(self, shop: Workshop) -> None:
        super().__init__()
        self.method, self.shop, self.keys = shop.method, shop, itertools.count()

    def loss(self, images: Tensor) -> Tensor:
        total: Tensor = self.method(self.shop.views(images, key=next(self.keys)), 0.0)["total"]
        return total


def pfl_round(
    network: nn.Module,
    users: Sequence[list[Tensor]],
    optimizer: Callable[..., torch.optim.Optimizer],
    *,
    steps: int,
    batch: int,
) -> Callable[[], None]:
    """One central iteration of pfl a call."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel

    network.metrics = lambda *_: {"loss": Weighted(0.0, 1)}  # pfl evaluates in the first iteration, which is not timed
    model = PyTorchModel(network, optimizer, torch.optim.SGD(network.parameters(), lr=1.0))
    data = FederatedDataset(
        lambda user: Dataset(raw_data=users[user], user_id=str(user)),
        get_user_sampler("minimize_reuse", list(range(len(users)))),
    )
    backend, algorithm, done = SimulatedBackend(data, data), FederatedAveraging(), itertools.count(1)
    local = NNTrainHyperParams(
        local_num_epochs=None, local_learning_rate=1e-3, local_batch_size=batch, local_num_steps=steps
    )

    def run() -> None:
        plan = NNAlgorithmParams(
            central_num_iterations=next(done),
            evaluation_frequency=10**9,
            train_cohort_size=len(users),
            val_cohort_size=0,
        )
        network.train()
        algorithm.run(plan, backend, model, local, send_metrics_to_platform=False)

    return run


def pfl_alone(*, rounds: int) -> Race:
    """pfl's own set-up over the bare loop of its network."""
    torch.manual_seed(0)
    network = CNN()
    users = [[torch.randn(POINTS, 3, 32, 32), torch.randint(10, (POINTS,))] for _ in range(USERS)]

    def bare() -> None:
        for user in users:
            optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
            for images, labels in zip(*(torch.split(part, BATCH) for part in user), strict=True):
                optimizer.zero_grad()
                network.loss(images, labels).backward()
                optimizer.step()

    theirs = pfl_round(network, users, torch.optim.SGD, steps=STEP, batch=BATCH)
    return race({PFL: theirs, STEPS: bare}, rounds=rounds, least=0.0)


def contest(words: Sequence[str], folder: Path, *, rounds: int) -> Race:
    """The product's round, pfl's with the same work, and both bare loops."""
    rig = Rig.open(words, folder)
    runs, training = rig.contestants(), rig.study.training
    if installed("pfl"):
        shop = rig.sites[0].shop
        needed = training.steps * training.batch_size
        users = [[site.images[:needed]] for site in rig.sites]
        if min(len(user[0]) for user in users) < needed:
            raise SystemExit(f"a site has fewer than {needed} images: not the same work")
        runs[PFL] = pfl_round(
            Wrapped(shop), users, lambda parameters, lr: adamw(list(parameters), lr=lr, weight_decay=1e-4),
            steps=training.steps, batch=training.batch_size,
        )  # fmt: skip
    return race(runs, rounds=rounds, least=0.0)


def figures_of(name: str, raced: Race) -> list[dict[str, object]]:
    """Overhead factors of a row, and the product's over pfl's."""
    found = [
        figure(f"overhead {name}, product / bare with refresh pass", raced.ratio(ROUND, BARE), better="lower"),
        figure(f"overhead {name}, product / bare steps", raced.ratio(ROUND, STEPS), better="lower"),
    ]
    if PFL not in raced.seconds:
        return [*found, not_run(f"overhead {name}, product over pfl", "pfl is not installed")]
    ours = [a / b for a, b in zip(raced.seconds[ROUND], raced.seconds[BARE], strict=True)]
    theirs = [a / b for a, b in zip(raced.seconds[PFL], raced.seconds[STEPS], strict=True)]
    both = Race({ROUND: ours, PFL: theirs}).ratio(ROUND, PFL)
    found.append(figure(f"overhead {name}, pfl / bare steps", raced.ratio(PFL, STEPS), better="lower"))
    return [*found, figure(f"overhead {name}, product over pfl", both, bar=BAR, better="lower")]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="without resnet18")
    options.add_argument("--only", nargs="*", default=["cnn", *ROWS])
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    names, rows = [name for name in list(ROWS)[: 1 if given.quick else None] if name in given.only], {}
    figures = []
    if "cnn" in given.only and installed("pfl"):
        rows["cnn"] = pfl_alone(rounds=given.rounds)
        figures.append(figure("overhead CNN, pfl / bare steps", rows["cnn"].ratio(PFL, STEPS), better="lower"))
    elif "cnn" in given.only:
        figures.append(not_run("overhead CNN, pfl / bare steps", "pfl is not installed"))
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = contest(ROWS[name], Path(folder) / "run", rounds=given.rounds)
        figures += figures_of(name, rows[name])
    for name, raced in rows.items():
        print(name, ", ".join(f"{form} {raced.median(form):.3f} s" for form in raced.seconds))
    for entry in figures:
        shown = "{median:.3f} ({min:.3f}..{max:.3f})".format(**entry["ratio"]) if "ratio" in entry else "not run"
        print(f"{entry['name']:<55}{shown}")
    if given.json:
        seconds = {name: dict(raced.seconds) for name, raced in rows.items()}
        write(given.json, {"machine": machine(), "figures": figures, "seconds": seconds})
    if not all(map(met, figures)):
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
