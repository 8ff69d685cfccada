"""Peak memory of the server against the number of sites, in units of one model; and Flower's own server beside it.

    PYTHONPATH=. python benchmarks/memory.py [--sites 8 16 32 64] [--methods simclr dissect] [--json FILE]

Each point is a process of its own that holds server and sites (in-process carrier) through two rounds of a ResNet-18
with next to no data (20 images a site, of 32 pixels), so that what grows with the sites is the server's. The peer is
Flower's FedAvg step on as many replies, which it gets together. The slope is that of a line through the points.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import figure, machine, write

from medfl import config
from medfl.machine import peak

ENCODER = ("encoder=resnet18", "data.size=32")
BAR = 0.05  # models for each extra site
PEER = "flwr FedAvg"


def point(what: str, sites: int) -> None:
    """In a process of its own: print its peak memory, bytes."""
    print(json.dumps(flower(sites) if what == PEER else federated(what, sites)))


def federated(method: str, sites: int) -> dict[str, float]:
    """Two rounds."""
    from client.app import app as client
    from medfl import carriers
    from medfl.server_state import Blueprint
    from server.app import app as server

    with tempfile.TemporaryDirectory() as folder:
        words = [f"method={method}", *ENCODER, "sites=iid", f"sites.count={sites}", f"data.count={sites * 20}",
                 "sites.min_images=1", "training.steps=1", "training.batch_size=4", "training.threads=1",
                 "rounds.count=2", "rounds.refresh_volumes=4", "rounds.codebook_images=1", "rounds.on_collapse=warn",
                 "arms=[federated]", "run.tensorboard=false", f"run.dir={folder}/run"]  # fmt: skip
        study = config.compose(words)
        asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": sites}
        carriers.simulate(server, client, asked, carrier="inprocess", threads=1)
        model = sum(array.nbytes for array in Blueprint.of(study).initial.values())
    return {"peak": peak(), "model": model}


def flower(sites: int) -> dict[str, float]:
    """Its own mean of as many different replies as there are sites, of one flat array each."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    size = 11_700_000
    replies = [
        RecordDict({"arrays": ArrayRecord({"flat": Array(np.full(size, n, np.float32))}),
                    "metrics": MetricRecord({"num-examples": 1.0})})
        for n in range(sites)
    ]  # fmt: skip
    aggregate_arrayrecords(replies, "num-examples")
    return {"peak": peak(), "model": 4 * size}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sites", type=int, nargs="*", default=[8, 16, 32, 64])
    options.add_argument("--methods", nargs="*", default=["simclr", "dissect"])
    options.add_argument("--json", type=Path)
    options.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.point:
        point(given.point[0], int(given.point[1]))
        return
    figures, rows = [], []
    for what in (*given.methods, PEER):
        found = []
        for sites in given.sites:
            words = [sys.executable, __file__, "--point", what, str(sites)]
            found.append(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
        models = [one["peak"] / one["model"] for one in found]
        slope = float(np.polyfit(given.sites, models, 1)[0])
        steps = np.diff(models) / np.diff(given.sites)
        shown = ", ".join(f"{n}: {one['peak'] / 1e6:.0f} MB" for n, one in zip(given.sites, found, strict=True))
        print(
            f"{what:<14}{slope:+.3f} models of {found[0]['model'] / 1e6:.0f} MB for each extra site ({shown})",
            flush=True,
        )
        figures.append(figure(f"memory {what}, models for each extra site", (slope, min(steps), max(steps)),
                              bar=None if what == PEER else BAR, better="lower"))  # fmt: skip
        rows.append({"what": what, "sites": given.sites, "points": found})
    if given.json:
        write(given.json, {"machine": machine(), "figures": figures, "rows": rows})


if __name__ == "__main__":
    main()
