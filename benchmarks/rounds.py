"""Round overhead: a federated round of the product against the same local training without a federation.

The peer is the bare loop: for each site, the same Site's own refresh pass and training steps on the same data, with
nothing packed, sent, checked, aggregated or written. Both run in this process, interleaved, in alternating order, on
one thread, in the CPU time of the process. Two such runs of 20 s differ by several percent on a shared machine, so that
the overhead is read within one: the time of a round over that which its sites spend in loading the weights, in the
refresh pass and in their steps. What a federation costs in cache misses is in the first figure alone.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/rounds.py [--sites 8] [--steps 6] [--rounds 3] [--json FILE]
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

from harness import figure, machine, met, race, write

from client.app import app as client
from medfl import config, stages
from medfl.carriers import InProcessGrid
from medfl.enrolment import Enrolled, Federation, enrol
from medfl.messages import Broadcast
from medfl.methods.phases import phase_of
from medfl.rounds import order_of, run_round
from medfl.run_folder import RunFolder
from medfl.server_state import Blueprint, Server
from medfl.site import Site, open_site
from medfl.study import Study
from medfl.training import train_locally

BAR = 1.03  # times the bare loop
ROUND, BARE, STEPS = "federated round", "bare loop", "bare steps, no refresh pass"
WORK = ("_load", "_refresh", "_learn")  # of a Site
COMMON = ("method=simclr", "sites=iid", "arms=[federated]", "rounds.count=100000", "training.threads=1")


@dataclass(frozen=True)
class Rig:
    """A federation in this process, about to begin a round."""

    study: Study
    federation: Federation
    server: Server
    members: Sequence[Enrolled]

    @classmethod
    def open(cls, words: Sequence[str], folder: Path) -> "Rig":
        """Sites opened and enrolled; `folder` becomes the run's."""
        study = config.compose([*COMMON, *words, f"run.dir={folder}"])
        count = int(study.sites["count"])
        grid = InProcessGrid(client, count)
        federation = Federation(grid, study, RunFolder.create(folder, study.source, resume=False))
        members = stages.arms_of(study, enrol(federation, count))["federated"].members
        return cls(study, federation, Server.start(study, "federated", Blueprint.of(study), None), members)

    @property
    def sites(self) -> list[Site]:
        """As the messages find them."""
        return [open_site(self.study.source, index) for index in range(int(self.study.sites["count"]))]

    def round(self) -> None:
        """One round of the product."""
        run_round(self.federation, self.server, self.members, self.study.training.steps)

    def bare(self, *, refresh: bool) -> None:
        """What the sites would compute anyway."""
        order = order_of(self.study, self.server, 1, self.study.training.steps)
        broadcast = Broadcast(order, self.server.flat)
        for site in self.sites:
            if refresh:
                site._load(broadcast, {})
                site._refresh()
            shop = site.shop
            phase = phase_of(shop.method.phases, 1, self.study.rounds.count)
            optimizer = config.build(shop.study.training.optimizer, parameters=shop.method.trainable())
            train_locally(shop.method, site.task, optimizer, site._plan(order, phase), shop.where)

    def contestants(self) -> dict[str, Callable[[], None]]:
        """For `race`."""
        forms = {BARE: lambda: self.bare(refresh=True), STEPS: lambda: self.bare(refresh=False)}
        return {ROUND: self.round, **forms}


def timed(rig: Rig) -> tuple[float, float]:
    """Seconds of the processor of one round, and of its sites' own work within it."""
    inside = 0.0

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            nonlocal inside
            began = time.process_time()
            try:
                return act(*given, **named)
            finally:
                inside += time.process_time() - began

        return run

    with ExitStack() as stack:
        for name in WORK:
            stack.enter_context(mock.patch.object(Site, name, counted(getattr(Site, name))))
        began = time.process_time()
        rig.round()
        return time.process_time() - began, inside


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sites", type=int, default=8)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--size", type=int, default=64)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--quick", action="store_true", help="2 steps of 16 images of 32 pixels")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    if given.quick:
        given.steps, given.size, given.batch = 2, 32, 16
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given, Path(folder))
    if given.json:
        write(given.json, result)
    if not all(map(met, result["figures"])):
        raise SystemExit("a bar is not met")


def measure(given: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, object]]]:
    """Seconds of all forms and their ratios."""
    words = [
        "encoder=resnet18", f"sites.count={given.sites}", f"data.size={given.size}",
        f"data.count={given.sites * 160}", f"training.steps={given.steps}", f"training.batch_size={given.batch}",
        "rounds.refresh_volumes=64",
    ]  # fmt: skip
    rig = Rig.open(words, folder / "run")
    raced = race(rig.contestants(), rounds=given.rounds, least=0.0)
    shares = [total / inside for total, inside in (timed(rig) for _ in range(given.rounds))]
    figures = [
        figure(
            "rounds resnet18 / its sites' work", (median(shares), min(shares), max(shares)), bar=BAR, better="lower"
        ),
        figure("rounds resnet18 / bare loop with refresh pass", raced.ratio(ROUND, BARE), better="lower"),
        figure("rounds resnet18 / bare steps", raced.ratio(ROUND, STEPS), better="lower"),
    ]
    for name in raced.seconds:
        print(f"{name:<30}{raced.median(name):>8.2f} s of the processor")
    for entry in figures:
        print("{name:<50}{ratio[median]:>7.3f} ({ratio[min]:.3f}..{ratio[max]:.3f})  bar {bar}".format(**entry))
    what = {name: str(value) for name, value in vars(given).items()}
    return {"what": what, "machine": machine(), "figures": figures, "seconds": dict(raced.seconds)}


if __name__ == "__main__":
    main()
