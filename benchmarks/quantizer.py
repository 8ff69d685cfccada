"""Nearest code and moving averages of the quantizer against the bare matrix product of tokens and codes, on one thread.

The product (T, D) x (D, K) is what no exact search can go without: it is raced in the quantizer's own chunks and whole,
into memory that is already there, and the faster of both is the bound. The step is search and update, as in training.
Where vector-quantize-pytorch is installed, its layer in training mode is raced too, on fewer tokens (it holds T x K
matrices) and against the same work here: forward and update. Everything is checked before it is timed.

    OMP_NUM_THREADS=1 python benchmarks/quantizer.py [--tokens 100000] [--rounds 5] [--json FILE]
"""

import argparse
import importlib
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
import torch.nn.functional as F
from harness import Race, machine, race, write
from torch import Tensor

from medfl.models.quantizer import CPU_CHUNK, Quantizer

CODES, WIDTH = 2048, 128
BAR = 1.3  # times the bound, search and step each
PEER_TOKENS = 4096
FIGURES = ("median", "min", "max")
CHUNKED, WHOLE, SEARCH, UPDATE, STEP = "matmul in chunks", "matmul", "search", "update", "search and update"
LAYER, PEER = "forward and update", "vector-quantize-pytorch"


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def book() -> Quantizer:
    """A codebook in use: all codes have mass."""
    made = Quantizer(codes=CODES, width=WIDTH, decay=0.99, smoothing=1e-5, tokens_per_image=1)
    made.set(torch.ones(CODES), unit(CODES, WIDTH))
    return made


def check(tokens: Tensor) -> None:
    """The search and the update against their definitions.

    Raises:
        SystemExit: they differ, so a race would mean nothing.
    """
    made = book()
    found, nearest = made.assign(tokens), (tokens @ made.code_vectors().T).argmax(1)
    one_hot = F.one_hot(nearest, CODES).float()
    counts, sums = (0.99 * old + 0.01 * new for old, new in
                    ((made.counts, one_hot.sum(0)), (made.sums, one_hot.T @ tokens)))  # fmt: skip
    made.update(tokens, found)
    same = torch.equal(found, nearest) and torch.allclose(made.counts, counts)
    if not (same and torch.allclose(made.sums, sums, atol=1e-5)):
        raise SystemExit("the quantizer's search or update is not the brute-force one")


def contest(tokens: Tensor, *, rounds: int) -> Race:
    """The quantizer and both forms of the bound."""
    made = book()
    codes, found = made.code_vectors().T, made.assign(tokens)
    scores, part = torch.empty(len(tokens), CODES), torch.empty(CPU_CHUNK, CODES)

    def chunked() -> None:
        for rows in torch.split(tokens, CPU_CHUNK):
            torch.mm(rows, codes, out=part[: len(rows)])

    return race(
        {
            CHUNKED: chunked,
            WHOLE: lambda: torch.mm(tokens, codes, out=scores),
            SEARCH: lambda: made.assign(tokens),
            UPDATE: lambda: made.update(tokens, found),
            STEP: lambda: made.update(tokens, made.assign(tokens)),
        },
        rounds=rounds,
    )


def peer_contest(*, rounds: int) -> dict[str, float] | None:
    """How many times faster than the peer's layer; None if it is not installed."""
    try:
        peer = importlib.import_module("vector_quantize_pytorch")
    except ImportError:
        return None
    made, tokens = book(), unit(8, PEER_TOKENS // 8, WIDTH)
    theirs = peer.VectorQuantize(WIDTH, CODES, decay=0.99, use_cosine_sim=True, threshold_ema_dead_code=0).train()
    for name, value in (("cluster_size", made.counts), ("embed_avg", made.sums), ("embed", made.code_vectors())):
        getattr(theirs._codebook, name).copy_(value[None])
    if not torch.equal(theirs(tokens)[1], made(tokens).indices):
        raise SystemExit("vector-quantize-pytorch finds other codes: not the same work")
    with torch.no_grad():
        raced = race(
            {LAYER: lambda: made.update(tokens, made(tokens).indices), PEER: lambda: theirs(tokens)}, rounds=rounds
        )
    return dict(zip(FIGURES, raced.ratio(PEER, LAYER), strict=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=100_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check(unit(2000, WIDTH))
    raced = contest(unit(given.tokens, WIDTH), rounds=given.rounds)
    bound = min((CHUNKED, WHOLE), key=raced.median)
    print(f"T={given.tokens}, K={CODES}, D={WIDTH}; CPU time, 1 thread; bound: {bound}; {given.rounds} rounds")
    ratios = {name: raced.ratio(name, bound) for name in raced.seconds}
    for name, (middle, low, high) in ratios.items():
        print(f"{name:<20}{raced.median(name) * 1e3:>9.1f} ms  {middle:.3f} ({low:.3f}..{high:.3f}) of the bound")
    peer = peer_contest(rounds=given.rounds)
    print(f"{PEER}, T={PEER_TOKENS}: " + (f"{peer['median']:.1f} times as long" if peer else "not run: not installed"))
    met = max(ratios[SEARCH][0], ratios[STEP][0]) <= BAR
    if given.json:
        shown = {name: dict(zip(FIGURES, ratio, strict=True)) for name, ratio in ratios.items()}
        facts = {"tokens": given.tokens, "codes": CODES, "width": WIDTH, "bound": bound, "bar": BAR, "met": met}
        result = {"machine": machine(), **facts, "seconds": dict(raced.seconds), "times_the_bound": shown}
        write(given.json, result | {"times_faster_than_peer": peer, "peer_tokens": PEER_TOKENS})
    if not met:
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
