"""Simulation engines: what a round costs when the sites' own work is nothing.

The same ClientApp (benchmarks/engine_apps.py) over medfl's carriers and over Flower's simulation engine with its stock
FedAvg; each point in a fresh process, engines in turn. glibc's thresholds are raised for all alike, which medfl does by
itself; Flower's engine is measured without that too, as its users have it. A round: the weights to all sites, an
addition there, all answers and their mean in the server. A peer with another mean is not compared.

    python benchmarks/engines.py [--repeats 2] [--json FILE]
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from harness import figure, machine, not_run, write

FLOAT = 4
LARGE = 11_700_000  # numbers: 46.8 MB, a ResNet-18
POINTS = [("8 sites, 1 number", 8, 1, 30), ("100 sites, 1 number", 100, 1, 15), ("8 sites, 46.8 MB", 8, LARGE, 8),
          ("16 sites, 46.8 MB", 16, LARGE, 6)]  # fmt: skip
ENGINES = ("inprocess", "workers", "flower", "flower as installed")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
PROCESSES = 2
BAR, BARRED = 8.0, "8 sites, 46.8 MB"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--json", type=Path, default=Path("runs/bench-engines.json"))
    options.add_argument("--point", nargs=4, help="engine, sites, numbers, rounds: one point, in this process")
    given = options.parse_args()
    if given.point:
        engine, *counts = given.point
        print(json.dumps(point(engine, *map(int, counts))))
        return
    before, rows = machine(), []
    for repeat in range(given.repeats):
        for name, sites, numbers, rounds in POINTS:
            for engine in ENGINES[:: 1 if repeat % 2 == 0 else -1]:
                words = [sys.executable, __file__, "--point", engine, *map(str, (sites, numbers, rounds))]
                env = os.environ | ({} if engine.endswith("as installed") else MALLOC)
                done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                row = {"point": name, "engine": engine, **json.loads(done.stdout.splitlines()[-1])}
                rows.append(row)
                print(json.dumps(row), flush=True)
    told = summary(rows)
    print(json.dumps(told, indent=1))
    write(given.json, {"machine": before, "figures": figures(told), "after": machine(), "rows": rows, "summary": told})


def figures(told: dict[str, dict]) -> list[dict[str, object]]:
    """Flower's round over ours: of the medians, and of the rounds that are farthest apart."""
    found = []
    for name, engines in told.items():
        for theirs, engine in itertools.product(ENGINES[2:], ENGINES[:2]):
            peer, own, title = engines[theirs], engines[engine], f"engines {name}, {theirs} / {engine}"
            if lost := other_mean(engines, theirs):
                found.append(not_run(title, lost))
                continue
            ratio = (peer["ms"] / own["ms"], peer["least"] / own["most"], peer["most"] / own["least"])
            bar = BAR if name == BARRED and engine == "workers" else None
            found.append(figure(title, ratio, bar=bar, better="higher"))
    return found


def other_mean(engines: dict[str, dict], peer: str) -> str:
    """Why a peer's rounds are not the same work; "" where they are, up to float32 sums in another order."""
    ours = engines[ENGINES[0]]["mean"]
    odd = [mean for mean in (*engines[peer]["means"], *engines["workers"]["means"]) if abs(mean - ours) > 1e-5 * ours]
    return f"a mean of {odd[0]:.4f} in place of {ours:.4f}: replies were missing" if odd else ""


def summary(rows: list[dict]) -> dict[str, dict]:
    """Median ms of all rounds and their range, the largest server, and the last means."""
    found: dict[str, dict] = {}
    for name, *_ in POINTS:
        found[name] = {}
        for engine in ENGINES:
            own = [row for row in rows if row["point"] == name and row["engine"] == engine]
            each = [ms for row in own for ms in row["ms"]]
            found[name][engine] = {
                "ms": round(median(each), 2), "least": min(each), "most": max(each),
                "server_mb": max(row["server_mb"] for row in own), "start_s": median(row["start_s"] for row in own),
                "mean": own[0]["mean"], "means": [row["mean"] for row in own],
            }  # fmt: skip
    return found


def point(engine: str, sites: int, numbers: int, rounds: int) -> dict[str, object]:
    """Rounds of one engine. The first two are not timed: they make buffers and start actors."""
    began = time.perf_counter()
    ends, mean = (flower if engine.startswith("flower") else ours(engine))(sites, numbers, rounds + 2)
    ms = [round(1000 * (b - a), 3) for a, b in pairwise(ends[1:])]
    return {"ms": ms, "start_s": round(ends[0] - began, 2), "mean": mean, "server_mb": round(peak() / 1e6)}


def peak() -> float:
    from medfl import machine

    return machine.peak()


def ours(engine: str):
    """A round loop over one of medfl's carriers: each answer is added and dropped as it comes."""

    def run(sites: int, numbers: int, rounds: int) -> tuple[list[float], float]:
        import torch
        from engine_apps import client

        from medfl.carriers import InProcessGrid
        from medfl.workers.grid import WorkerGrid

        torch.set_num_threads(1)
        if engine == "inprocess":
            return loop(InProcessGrid(client, sites), sites, numbers, rounds)
        with WorkerGrid(client, sites, threads=1, workers=PROCESSES) as grid:
            return loop(grid, sites, numbers, rounds)

    return run


def loop(grid, sites: int, numbers: int, rounds: int) -> tuple[list[float], float]:
    import torch
    from flwr.app import ArrayRecord, Message, RecordDict

    from medfl.messages import from_array, to_array
    from medfl.nodes import lending

    weights, total, ends = np.zeros(numbers, np.float32), np.zeros(numbers, np.float32), []
    for _ in range(rounds):
        record = RecordDict({"arrays": ArrayRecord()})
        with lending(grid):  # as medfl.exchange
            record.array_records["arrays"]["x"] = to_array(weights)
        asked = [Message(record, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
        total.fill(0)
        for reply in replies(grid, asked):
            sent = torch.from_numpy(from_array(reply.content.array_records["arrays"]["x"]))
            torch.from_numpy(total).add_(sent, alpha=1 / sites)
        weights, total = total, weights
        ends.append(time.perf_counter())
    return ends, float(weights[-1])


def replies(grid, asked: list) -> Iterator:
    """As medfl.asking takes them: one by one, as they come."""
    from medfl.nodes import Prompt

    waiting = dict.fromkeys(grid.push_messages(asked))
    while waiting:
        for name in grid.arrived(waiting, 60) if isinstance(grid, Prompt) else list(waiting):
            del waiting[name]
            yield from grid.pull_messages([name])


def flower(sites: int, numbers: int, rounds: int) -> tuple[list[float], float]:
    """Flower's own simulation with its stock FedAvg and one process per core."""
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")
    from engine_apps import client
    from flwr.app import Array, ArrayRecord, Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    ends, found = [], []

    class Timed(FedAvg):
        def aggregate_train(self, *given):
            made = super().aggregate_train(*given)
            ends.append(time.perf_counter())
            return made

    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:  # noqa: ARG001
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=sites)
        initial = ArrayRecord({"x": Array(np.zeros(numbers, np.float32))})
        result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)
        found.append(float(result.arrays["x"].numpy()[-1]))

    run_simulation(
        server_app=server, client_app=client, num_supernodes=sites,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": PROCESSES}},
    )  # fmt: skip
    return ends, found[0]


if __name__ == "__main__":
    main()
