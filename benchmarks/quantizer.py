"""Nearest code and moving averages of the quantizer against the bare matrix product of tokens and codes, on one thread.

The product (T, D) x (D, K) is what no exact search can go without: it is raced in the quantizer's own chunks and whole,
into memory that is already there, and the faster of both is the bound. The step is search and update, as in training.
Where vector-quantize-pytorch is installed, its layer in training mode is raced too, in both of its forms: the Euclidean
one, which is its default, and the cosine one, which is the product's own and finds the same codes. A step is forward,
gradient of tokens and commitment, and update; `forward` is without gradients. No layer without rounding can be faster
than the bound, so the peer's seconds over the bound say what is left to gain. Everything is checked before it is timed.

    OMP_NUM_THREADS=1 python benchmarks/quantizer.py [--tokens 100000] [--rounds 5] [--quick] [--json FILE]
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
import torch.nn.functional as F
from harness import FIGURES, Race, figure, machine, met, not_run, race, write
from peers import installed
from torch import Tensor

from medfl.models.quantizer import CPU_CHUNK, Quantizer

CODES, WIDTH = 2048, 128
BAR = 1.3  # times the bound, search and step each
PEER_BAR = 8.0  # times as long as the product, of either form of the peer's layer
PEER_TOKENS = (4096, 16384)
CHUNKED, WHOLE, SEARCH, UPDATE, STEP = "matmul in chunks", "matmul", "search", "update", "search and update"
LAYER, TRAINED, PEER = "forward and update", "step with gradients", "vector-quantize-pytorch"
FORMS = {"euclidean": False, "cosine": True}


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


def chunked(tokens: Tensor, codes: Tensor) -> Callable[[], None]:
    """The bare product (T, D) x (D, K) in the quantizer's chunks."""
    part = torch.empty(CPU_CHUNK, CODES)

    def run() -> None:
        for rows in torch.split(tokens, CPU_CHUNK):
            torch.mm(rows, codes, out=part[: len(rows)])

    return run


def contest(tokens: Tensor, *, rounds: int) -> Race:
    """The quantizer and both forms of the bound."""
    made = book()
    codes, found = made.code_vectors().T, made.assign(tokens)
    scores = torch.empty(len(tokens), CODES)
    return race(
        {
            CHUNKED: chunked(tokens, codes),
            WHOLE: lambda: torch.mm(tokens, codes, out=scores),
            SEARCH: lambda: made.assign(tokens),
            UPDATE: lambda: made.update(tokens, found),
            STEP: lambda: made.update(tokens, made.assign(tokens)),
        },
        rounds=rounds,
    )


def rival(made: Quantizer, *, cosine: bool) -> torch.nn.Module:
    """The peer's layer with the same codebook."""
    from vector_quantize_pytorch import VectorQuantize

    layer: torch.nn.Module = VectorQuantize(WIDTH, CODES, decay=0.99, use_cosine_sim=cosine).train()
    for name, value in (("cluster_size", made.counts), ("embed_avg", made.sums), ("embed", made.code_vectors())):
        getattr(layer._codebook, name).copy_(value[None])
    return layer


def peer_contest(tokens: Tensor, *, cosine: bool, rounds: int) -> Race:
    """The product and the peer, with and without gradients, beside the bound.

    Raises:
        SystemExit: they find other codes.
    """
    made, learning = book(), tokens.clone().requires_grad_()
    theirs = rival(made, cosine=cosine)
    if (theirs(tokens)[1] != made(tokens).indices).float().mean() > (0 if cosine else 1e-3):  # ties of rounded roots
        raise SystemExit(f"{PEER} finds other codes: not the same work")

    def step() -> None:
        found = made(learning)
        (found.tokens.sum() + found.commitment).backward()
        made.update(learning.detach(), found.indices)
        learning.grad = None

    def their_step() -> None:
        codes, _, commitment = theirs(learning)
        (codes.sum() + commitment.sum()).backward()
        learning.grad = None

    return race(
        {
            CHUNKED: chunked(tokens.view(-1, WIDTH), made.code_vectors().T),
            LAYER: torch.no_grad()(lambda: made.update(tokens, made(tokens).indices)),
            PEER: torch.no_grad()(lambda: theirs(tokens)),
            TRAINED: step,
            f"{PEER} with gradients": their_step,
        },
        rounds=rounds,
    )


def peer_figures(counts: tuple[int, ...], *, rounds: int) -> list[dict[str, object]]:
    """How many times as long the peer takes, by form, tokens and with or without gradients; printed too."""
    shown = []
    for form, cosine in FORMS.items():
        for count in counts:
            name = f"quantizer / {PEER}, {form}, {count} tokens"
            if not installed("vector_quantize_pytorch"):
                shown.append(not_run(name, f"{PEER} is not installed"))
                continue
            raced = peer_contest(unit(8, count // 8, WIDTH), cosine=cosine, rounds=rounds)
            trained = raced.ratio(f"{PEER} with gradients", TRAINED)
            forward, least = raced.ratio(PEER, LAYER), raced.ratio(PEER, CHUNKED)
            shown.append(figure(f"{name}, step with gradients", trained, bar=PEER_BAR, better="higher"))
            shown.append(figure(f"{name}, forward and update", forward, bar=None, better="higher"))
            print(
                f"{PEER} {form}, T={count}: {trained[0]:.2f} ({trained[1]:.2f}..{trained[2]:.2f}) times as long with "
                f"gradients, {forward[0]:.2f} without; {least[0]:.2f} times the bare product"
            )
    return shown


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=100_000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--quick", action="store_true", help="the peer with fewer tokens only")
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
    figures = [figure(f"quantizer {name} / matmul", ratios[name], bar=BAR, better="lower") for name in (SEARCH, STEP)]
    figures += peer_figures(PEER_TOKENS[:1] if given.quick else PEER_TOKENS, rounds=given.rounds)
    if given.json:
        shown = {name: dict(zip(FIGURES, ratio, strict=True)) for name, ratio in ratios.items()}
        facts = {"tokens": given.tokens, "codes": CODES, "width": WIDTH, "bound": bound}
        result = {"machine": machine(), "figures": figures, **facts, "seconds": dict(raced.seconds)}
        write(given.json, result | {"times_the_bound": shown})
    if not all(map(met, figures)):
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
