"""Round overhead: a federated round of the product against the same local training without a federation.

The peer is the bare loop: for each site, the same Site's own refresh pass and training steps on the same data, with
nothing packed, sent, checked, aggregated or written. Both run in this process, interleaved, in alternating order.

    python benchmarks/rounds.py [--sites 8] [--steps 6] [--repeats 3] [--json FILE]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from harness import machine

from client.app import app as client
from medfl import config, stages
from medfl.carriers import InProcessGrid
from medfl.enrolment import Federation, enrol
from medfl.messages import Broadcast
from medfl.rounds import order_of, run_round
from medfl.run_folder import RunFolder
from medfl.server_state import Blueprint, Server
from medfl.site import Site, open_site
from medfl.training import Task, train_locally


def bare(site: Site, broadcast: Broadcast) -> None:
    """What the site would compute anyway: load the weights, refresh pass, training steps."""
    shop = site.shop
    site._load(broadcast, {})
    site._refresh()
    optimizer = config.build(shop.study.training.optimizer, parameters=shop.method.trainable())
    task = Task(site.images, site.data.train.labels, shop.views)
    train_locally(shop.method, task, optimizer, site._plan(broadcast.order), shop.where)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sites", type=int, default=8)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--size", type=int, default=64)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(given, Path(folder))
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1))


def measure(given: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Seconds of both forms and their ratio, per repetition."""
    study = config.compose(
        [
            "method=simclr", "encoder=resnet18", "sites=iid", f"sites.count={given.sites}", f"data.size={given.size}",
            f"data.count={given.sites * 160}", f"training.steps={given.steps}", f"training.batch_size={given.batch}",
            "rounds.refresh_volumes=64", f"run.dir={folder / 'run'}", "arms=[federated]",
        ]
    )  # fmt: skip
    grid = InProcessGrid(client, given.sites)
    federation = Federation(grid, study, RunFolder.create(folder / "run", study.source, resume=False))
    members = stages.arms_of(study, enrol(federation, given.sites))["federated"].members
    server = Server.start(study, "federated", Blueprint.of(study), None)
    run_round(federation, server, members, given.steps)  # first touch of memory and kernels
    rows = []
    for repeat in range(given.repeats):
        contests = {"federated": lambda: run_round(federation, server, members, given.steps)}
        contests["bare"] = lambda: [
            bare(
                open_site(study.source, index),
                Broadcast(order_of(study, server, 1, given.steps), server.flat),
            )
            for index in range(given.sites)
        ]
        names = list(contests) if repeat % 2 else list(reversed(contests))
        seconds = {name: timed(contests[name]) for name in names}
        rows.append(seconds | {"overhead": seconds["federated"] / seconds["bare"] - 1})
    overheads = [row["overhead"] for row in rows]
    summary = {"median": median(overheads), "min": min(overheads), "max": max(overheads)}
    return {"what": vars(given) | {"json": None}, "machine": machine(), "rows": rows, "overhead": summary}


def timed(act: object) -> float:
    began = time.perf_counter()
    act()  # type: ignore[operator]
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
