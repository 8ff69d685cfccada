"""What one thread of this machine can do: matrix products, memory bandwidth, and the cost of calling an operation.

Other scripts call `floors()` in their own process, so that their figures and these were made at the same time.

    OMP_NUM_THREADS=1 python benchmarks/floors.py [--json FILE]
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
from harness import machine, race, write

SIDE = 2048  # of the square matrices
LENGTH = 1 << 25  # floats of a vector, 128 MiB: far more than any cache
CALLS = 1000


def floors(*, rounds: int = 3) -> dict[str, float]:
    """GFLOP/s of products, GB/s of memory, microseconds of a call; medians, in CPU time of one thread."""
    torch.set_num_threads(1)
    a, b, product = (torch.randn(SIDE, SIDE) for _ in range(3))
    half, other = a.bfloat16(), b.bfloat16()
    x, y, z = (torch.ones(LENGTH) for _ in range(3))
    one = torch.ones(1)

    def calls() -> None:
        for _ in range(CALLS):
            one.add_(1)

    raced = race(
        {
            "matmul fp32": lambda: torch.mm(a, b, out=product),
            "matmul bf16": lambda: torch.mm(half, other),
            "triad": lambda: torch.add(x, y, alpha=0.5, out=z),
            "copy": lambda: z.copy_(x),
            "dispatch": calls,
        },
        rounds=rounds,
    )
    work, size = 2 * SIDE**3 / 1e9, 4 * LENGTH / 1e9
    return {
        "matmul fp32, GFLOP/s": work / raced.median("matmul fp32"),
        "matmul bf16, GFLOP/s": work / raced.median("matmul bf16"),
        "triad, GB/s": 3 * size / raced.median("triad"),
        "copy, GB/s": 2 * size / raced.median("copy"),
        "dispatch, us": raced.median("dispatch") / CALLS * 1e6,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    found = floors()
    for name, value in found.items():
        print(f"{name:<24}{value:>9.1f}")
    if given.json:
        write(given.json, {"machine": machine(), "floors": found, "figures": []})


if __name__ == "__main__":
    main()
