"""Update compression: bytes of a round, seconds of the codecs, and the linear-probe AUC of each form of `rounds.wire`.

    python benchmarks/compression.py --data DIR [--seeds 0 1 2] [--sets pneumonia] [--runs runs/compression] [--jobs 2]
        [--json FILE]

Bytes are those of all tensors of a training round and site in wire.csv, plain sums among them, up, down and both, in MB
for fp32 and as ratios to it for the others; in brackets both ways of what is compressed alone, weights and momentum
encoders. Those of ResNet-18 are of two rounds of eight steps, as bytes of packed halves depend on them.

Codecs are timed on 11.7 M values, drawn with heavy tails, in one process of one thread: median CPU time. AUC is the
mean over the sites, ± standard deviation over seeds; all runs of a seed start from the same weights and draw the same
batches and views, so differences to fp32 are paired, with 95 % t intervals.

DIR holds medmnist/ and medmnist_rebuilt/. Each run is one `medfl simulate` of one thread whose command is printed,
--jobs at a time; a finished run is not repeated, an interrupted one goes on. What stands after the options is added to
every command of the AUC.
"""

import argparse
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from harness import machine, race, write
from studies import difference, evaluated, linear, options, simulate, spread, words_of

from medfl import codecs
from medfl.run_folder import RunFolder
from medfl.study import WIRES

PLAIN = WIRES[0]
BUDGET = (
    "method=simclr", "encoder=tiny", "rounds.count=5", "training.steps=20", "training.batch_size=64",
    "training.threads=1", "evaluation.protocols=[linear]", "evaluation.resamples=100", "stages=[pretrain,evaluate]",
)  # fmt: skip
LARGE = (
    "method=simclr", "encoder=resnet18", "rounds.count=2", "training.steps=8", "training.batch_size=16",
    "training.threads=1", "rounds.refresh_volumes=16", "arms=[federated]", "stages=[pretrain]",
)  # fmt: skip
VALUES, SHARE = 11_700_000, 0.01
COMPRESSED, KINDS = ("parameter", "target"), ("up", "down", "both", "weights")  # roles; of bytes
Bytes = Mapping[str, float]  # kind -> bytes of a round and site


def main() -> None:
    given = options(__doc__ or "", sets=["pneumonia"], runs="runs/compression").parse_intermixed_args()
    places = list(itertools.product(given.sets, given.seeds, WIRES))
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda place: run_auc(given, *place), places))
        list(pool.map(lambda wire: run_large(given, wire), WIRES))
    first = {wire: folder_of(given, given.sets[0], given.seeds[0], wire) for wire in WIRES}
    sizes = {"tiny": {wire: bytes_of(first[wire]) for wire in WIRES}}
    sizes["resnet18"] = {wire: bytes_of(given.runs / f"large-{wire}") for wire in WIRES}
    seconds = codec_seconds()
    aucs = {wire: [auc(folder_of(given, name, seed, wire)) for name, seed, w in places if w == wire] for wire in WIRES}
    random = [auc(folder_of(given, *place, PLAIN), "random") for place in itertools.product(given.sets, given.seeds)]
    table(sizes, seconds, aucs)
    print(f"untrained: {spread(random)}")
    if given.json:
        what = {"budget": [*BUDGET, *given.overrides], "sets": given.sets, "seeds": given.seeds}
        found = {"bytes": sizes, "seconds": seconds, "auc": aucs, "auc_untrained": random}
        write(given.json, {"machine": machine(), "what": what, **found})


def folder_of(given: argparse.Namespace, name: str, seed: int, wire: str) -> Path:
    folder: Path = given.runs / f"{name}-{seed}-{wire}"
    return folder


def run_auc(given: argparse.Namespace, name: str, seed: int, wire: str) -> None:
    """One study; the untrained encoder is in those of fp32 alone."""
    folder, arms = folder_of(given, name, seed, wire), ("random", "federated") if wire == PLAIN else ("federated",)
    own = [f"rounds.wire={wire}", f"arms=[{','.join(arms)}]", f"seed={seed}"]
    words = [*words_of(name, given.data), *BUDGET, *own, *given.overrides]
    simulate(folder, words, finished=evaluated(folder, arms))


def run_large(given: argparse.Namespace, wire: str) -> None:
    folder = given.runs / f"large-{wire}"
    words = [*words_of(given.sets[0], given.data), *LARGE, f"rounds.wire={wire}"]
    simulate(folder, words, finished=(folder / "encoder.safetensors").exists())


def bytes_of(folder: Path) -> Bytes:
    """Of all tensors of a training round and site."""
    found: dict[str, float] = {"up": 0.0, "down": 0.0, "weights": 0.0}
    rows = [
        row for row in RunFolder.open(folder).wire_rows() if (row["stage"], row["arm"]) == ("pretrain", "federated")
    ]
    for row in rows:
        found[row["direction"]] += int(row["bytes"]) if row["role"] not in ("metric", "order") else 0
        found["weights"] += int(row["bytes"]) if row["role"] in COMPRESSED else 0
    times = len({(row["round"], row["site"]) for row in rows})
    return {kind: size / times for kind, size in found.items()} | {"both": (found["up"] + found["down"]) / times}


def auc(folder: Path, arm: str = "federated") -> float:
    return mean(linear(RunFolder.open(folder), arm, "auc").values())


def codec_seconds() -> dict[str, tuple[float, float]]:
    """Seconds to encode and to decode, by form; those of fp32 are of a copy."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    values = (draw.standard_normal(VALUES) * np.exp(draw.standard_normal(VALUES)) * 1e-3).astype(np.float32)
    out, half = np.empty_like(values), {name: np.empty(VALUES, np.uint16) for name in ("bf16", "fp16")}
    codes, scales = np.empty(VALUES, np.int8), np.empty(codecs.scales_of(VALUES), np.float32)
    places, kept = (np.empty(int(SHARE * VALUES), kind) for kind in (np.uint32, np.float32))
    contest: dict[str, Callable[[], object]] = {
        "encode fp32": lambda: np.copyto(out, values),
        "decode fp32": lambda: np.copyto(out, values),
        "encode int8": lambda: codecs.to_int8(values, codes, scales),
        "decode int8": lambda: codecs.of_int8(codes, scales, out),
        "encode topk": lambda: codecs.to_largest(values, places, kept),
        "decode topk": lambda: codecs.of_largest(places, kept, VALUES),
    }
    for name, dtype in {"bf16": "bfloat16", "fp16": "float16"}.items():
        codecs.to_half(values, dtype, half[name])
        contest[f"encode {name}"] = partial(send_half, values, dtype, half[name])
        contest[f"decode {name}"] = partial(receive_half, codecs.to_packed(half[name]), dtype, out)
    timed = race(contest, rounds=7)
    return {wire: (timed.median(f"encode {wire}"), timed.median(f"decode {wire}")) for wire in WIRES}


def send_half(values: np.ndarray, dtype: str, half: np.ndarray) -> None:
    codecs.to_half(values, dtype, half)
    codecs.to_packed(half)


def receive_half(packed: bytes, dtype: str, out: np.ndarray) -> None:
    codecs.of_half(codecs.of_packed(packed, out.size, np.dtype(np.uint16)), dtype, out)


def table(
    sizes: Mapping[str, Mapping[str, Bytes]],
    seconds: Mapping[str, tuple[float, float]],
    aucs: Mapping[str, list[float]],
) -> None:
    """One line for each form."""
    heads = [f"{encoder}: up, down, both (weights)" for encoder in sizes]
    heads = ["form", *heads, "encode, decode (ms)", "AUC", "AUC - fp32"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for wire in WIRES:
        cells = [ratios(found[wire], found[PLAIN]) for found in sizes.values()]
        cells.append(", ".join(f"{1000 * value:.1f}" for value in seconds[wire]))
        pairs = [value - plain for value, plain in zip(aucs[wire], aucs[PLAIN], strict=True)]
        cells += [spread(aucs[wire]), "0" if wire == PLAIN else difference(pairs)]
        print(f"| {' | '.join((wire, *cells))} |")


def ratios(found: Bytes, plain: Bytes) -> str:
    if found is plain:
        up, down, both, weights = (f"{found[kind] / 1e6:.2f}" for kind in KINDS)
        return f"{up}, {down}, {both} ({weights}) MB"
    up, down, both, weights = (f"{found[kind] / plain[kind]:.3f}" for kind in KINDS)
    return f"{up}, {down}, {both} ({weights})"


if __name__ == "__main__":
    main()
