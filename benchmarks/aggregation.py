"""The mean of updates against Flower's, and against the memory bandwidth of this machine, on one thread.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/aggregation.py [--rounds 5] [--json FILE]

Ours: the sums that the server makes as updates come, from received bytes to the mean (`medfl.adding`). Peers: Flower's
own FedAvg (`aggregate_arrayrecords`, which decodes its arrays), its older `aggregate` on lists of NumPy arrays, and the
loop over state dicts that many write. All get the same updates of a ResNet's shapes, and the same allocator settings.
Bandwidth is that of the triad a + 2 b of the same length: of the traffic that a sum in float64 must have (each update
read once, the sum read and written once for four of them).
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from harness import figure, machine, race, write
from torch import Tensor

from medfl.adding import RING, Mean
from medfl.malloc import keep_freed
from medfl.messages import from_array, to_array
from medfl.models.encoders import ResNet

SIZES = {"45 MB": "resnet18", "100 MB": "resnet50"}
COUNTS = (8, 32)
OURS, FLOWER, LISTS, LOOP, TRIAD = "medfl", "flwr FedAvg", "flwr aggregate (lists)", "state-dict loop", "triad"
BARS = {TRIAD: 0.75, FLOWER: 4.0}
UNIQUE = 4  # different updates; more would only need more memory


def shapes(megabytes: str) -> dict[str, tuple[int, ...]]:
    """Those of a ResNet of about this size."""
    from medfl import config

    study = config.compose([f"encoder={SIZES[megabytes]}", "method=simclr"])
    encoder = config.build(study.method["encoder"])
    if not isinstance(encoder, ResNet):
        raise TypeError(f"got {type(encoder).__name__}, need a ResNet.")
    return {name: tuple(tensor.shape) for name, tensor in encoder.named_parameters()}


def contest(megabytes: str, count: int, rounds: int) -> dict[str, object]:
    """All contestants on `count` updates."""
    draw, wanted = np.random.default_rng(0), shapes(megabytes)
    states = [{n: draw.standard_normal(s, dtype=np.float32) for n, s in wanted.items()} for _ in range(UNIQUE)]
    flats = [to_array(np.concatenate([a.ravel() for a in state.values()])) for state in states]
    weights = [float(10 + place % 5) for place in range(count)]
    records = [ArrayRecord({n: torch.from_numpy(a) for n, a in state.items()}) for state in states]
    replies = [
        RecordDict({"arrays": records[n % UNIQUE], "metrics": MetricRecord({"num-examples": weights[n]})})
        for n in range(count)
    ]
    tensors: list[dict[str, Tensor]] = [{n: torch.from_numpy(a) for n, a in s.items()} for s in states]

    def ours() -> np.ndarray:
        total = Mean(apart=2)
        for place, weight in enumerate(weights):
            total.add(from_array(flats[place % UNIQUE]), weight)
        return total.mean()

    def flower() -> list[np.ndarray]:
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

        return aggregate_arrayrecords(replies, "num-examples").to_numpy_ndarrays()

    def lists() -> list[np.ndarray]:
        from flwr.server.strategy.aggregate import aggregate

        return aggregate([(list(states[n % UNIQUE].values()), int(w)) for n, w in enumerate(weights)])

    def loop() -> dict[str, Tensor]:
        total = {n: torch.zeros(s) for n, s in wanted.items()}
        for place, weight in enumerate(weights):
            for name, tensor in tensors[place % UNIQUE].items():
                total[name] += tensor * (weight / sum(weights))
        return total

    check(ours(), {FLOWER: flower(), LISTS: lists(), LOOP: [t.numpy() for t in loop().values()]})
    size = sum(int(np.prod(shape)) for shape in wanted.values())
    first, second, third = (torch.rand(size) for _ in range(3))
    raced = race(
        {OURS: ours, FLOWER: flower, LISTS: lists, LOOP: loop,
         TRIAD: lambda: torch.add(second, third, alpha=2.0, out=first)},
        rounds=rounds,
    )  # fmt: skip
    traffic = size * (4 * count + 16 * (count / RING - 1) + 4)  # bytes of reads and writes
    shares = [traffic / a / (12 * size / b) for a, b in zip(raced.seconds[OURS], raced.seconds[TRIAD], strict=True)]
    share = (sorted(shares)[len(shares) // 2], min(shares), max(shares))
    name = f"{count} updates of {megabytes}"
    shown = [raced.ratio(peer, OURS) for peer in (FLOWER, LISTS, LOOP)]
    cells = "".join(f"{middle:>7.1f} ({low:.1f}..{high:.1f})".ljust(22) for middle, low, high in shown)
    print(
        f"{name:<24}{raced.median(OURS) * 1e3:>8.0f}{cells}{share[0]:>7.2f} ({share[1]:.2f}..{share[2]:.2f})",
        flush=True,
    )
    figures = [figure(f"aggregation {name}, times {peer}", raced.ratio(peer, OURS), bar=BARS.get(peer), better="higher")
               for peer in (FLOWER, LISTS, LOOP)]  # fmt: skip
    figures.append(figure(f"aggregation {name}, share of the triad", share, bar=BARS[TRIAD], better="higher"))
    return {"count": count, "size": size, "seconds": dict(raced.seconds), "figures": figures}


def check(mean: np.ndarray, peers: dict[str, list[np.ndarray]]) -> None:
    """
    Raises:
        SystemExit: they do not compute the same.
    """
    for name, arrays in peers.items():
        other = np.concatenate([array.ravel() for array in arrays])
        if not np.allclose(mean, other, rtol=1e-5, atol=1e-6):
            raise SystemExit(f"{name}: another mean, by {np.abs(mean - other).max():.1e}: not the same work")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    keep_freed()
    print(f"{'':<24}{'ms':>8}{'x flwr FedAvg':>20}{'x flwr lists':>20}{'x state-dict loop':>24}{'of the triad':>20}")
    rows = [contest(size, count, given.rounds) for size in SIZES for count in COUNTS]
    if given.json:
        figures = [one for row in rows for one in row.pop("figures")]  # type: ignore[attr-defined]
        write(given.json, {"machine": machine(), "figures": figures, "rows": rows})


if __name__ == "__main__":
    main()
