"""Secure aggregation against plain averaging: bytes and seconds of one round.

The product's own exchanges, gates, steps and sums, over sites that hold random numbers in place of training, one after
another in one process on one thread. Seconds are of the processor, so that other work on the machine counts little; a
site's are the mean of all, the server's are those of the round without the sites'.

    PYTHONPATH=. python benchmarks/secagg.py [--sites 4,8,16] [--values 100000,1000000,11000000] [--json FILE]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from flwr.app import Message, RecordDict
from harness import machine, write
from threadpoolctl import threadpool_limits

from medfl.layout import Layout
from medfl.methods.base import Claim, Role
from medfl.rules import Before, weighted_mean
from tests.federation.masked import SUMS, WEIGHTS, LossyGrid, Sites
from tests.federation.small import small_study

TOKENS = 1000  # plain sums beside the weights
HEAD = "| sites | values | up MB | masked | down MB | masked | site s | masked | server s | masked | one gone |"


class TimedGrid(LossyGrid):
    """Seconds inside the sites, and bytes to and from them."""

    seconds = up = down = 0.0

    def deliver(self, message: Message) -> Message:
        began = time.process_time()
        reply = super().deliver(message)
        self.seconds += time.process_time() - began
        self.down += size(message.content)
        self.up += 0 if reply.has_error() else size(reply.content)
        self.received.clear()
        return reply


def size(content: RecordDict) -> int:
    """Bytes of tensors and texts."""
    arrays = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    return arrays + sum(len(str(value)) for record in content.config_records.values() for value in record.values())


def sites_of(folder: Path, count: int, length: int, *, active: bool) -> Sites:
    draw = np.random.default_rng(0)
    layout = Layout.of(
        [
            ("a.weight", Claim(Role.PARAMETER), (length,), "float32"),
            ("d.tokens", Claim(Role.NORM_MOMENTS), (TOKENS,), "float64"),
        ]
    )
    before = {WEIGHTS: draw.standard_normal(length, np.float32)}
    values = [
        {WEIGHTS: before[WEIGHTS] + draw.standard_normal(length, np.float32) / 10, SUMS: draw.random(TOKENS) * 1e6}
        for _ in range(count)
    ]
    study = small_study(folder, f"secagg.active={str(active).lower()}", "arms=[federated]")
    return Sites(study, layout, before, values, [()] * count)


def averaged(sites: Sites) -> None:
    """The plain round's work on the server, after the replies."""
    updates = sites.plain()
    weights = sites.weigh([update.site for update in updates])[WEIGHTS]
    before = Before(sites.before[WEIGHTS], [])
    weighted_mean([update.flat[WEIGHTS] for update in updates], [weights[u.site] for u in updates], before)
    sum(update.flat[SUMS] for update in updates)


def timed(sites: Sites, act: Callable[[Sites], object], lost: set[tuple[str, int]], repeats: int) -> dict[str, float]:
    """Medians over some rounds."""
    rows, count = [], len(sites.values)
    for _ in range(repeats):
        grid = TimedGrid(sites.app(), count)
        grid.lost = lost
        sites.federation = type(sites.federation)(grid, sites.study, sites.federation.folder)
        began = time.process_time()
        act(sites)
        whole = time.process_time() - began
        rows.append(
            {"site_s": grid.seconds / count, "server_s": whole - grid.seconds, "up": grid.up, "down": grid.down}
        )
    middle = {name: median(row[name] for row in rows) for name in rows[0]}
    return middle | {"up": middle["up"] / count, "down": middle["down"] / count}


def measure(folder: Path, counts: list[int], lengths: list[int], repeats: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for count in counts:
        for length in lengths:
            row: dict[str, object] = {"sites": count, "values": length}
            plain = sites_of(folder / f"plain-{count}-{length}", count, length, active=False)
            row["plain"] = timed(plain, averaged, set(), repeats)
            masked = sites_of(folder / f"masked-{count}-{length}", count, length, active=True)
            row["masked"] = timed(masked, Sites.summed, set(), repeats)
            row["one_gone"] = timed(masked, Sites.summed, {("pretrain", count - 1)}, repeats)
            found.append(row)
            print(line(row), flush=True)
    return found


def line(row: dict[str, object]) -> str:
    """A row of the table."""
    plain, masked, gone = (row[name] for name in ("plain", "masked", "one_gone"))
    assert isinstance(plain, dict)
    assert isinstance(masked, dict)
    assert isinstance(gone, dict)
    cells = [f"{row['sites']}", f"{row['values']:,}"]
    cells += [f"{part[way] / 1e6:.2f}" for way in ("up", "down") for part in (plain, masked)]
    cells += [f"{part['site_s']:.2f}" for part in (plain, masked)]
    cells += [f"{part['server_s']:.2f}" for part in (plain, masked, gone)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sites", default="4,8,16")
    options.add_argument("--values", default="100000,1000000,11000000")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    counts, lengths = ([int(word) for word in text.split(",")] for text in (given.sites, given.values))
    print(HEAD, "|---" * HEAD.count(" | ") + "|---|", sep="\n")
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, threadpool_limits(1):
        timed(sites_of(Path(folder) / "first", 4, 1000, active=False), averaged, set(), 1)  # first touch of kernels
        rows = measure(Path(folder), counts, lengths, given.repeats)
    if given.json:
        write(given.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
