"""Bytes of a training round and site in each form of `rounds.wire`, over those of fp32: of ResNet-18, both ways.

    PYTHONPATH=. python benchmarks/traffic.py [--json FILE]

All tensors of wire.csv count, the plain sums in float64 too, which are never compressed; beside it weights alone. Drawn
images, two rounds of eight steps: bytes of packed halves depend a little on the weights. AUC and time of the forms:
`compression.py`.
"""

import argparse
import tempfile
from pathlib import Path

from compression import LARGE, PLAIN, bytes_of
from harness import figure, machine, met, write
from studies import simulate

from medfl.study import WIRES

BARS = {"bf16": 0.5, "fp16": 0.5, "int8": 0.27}
SMALL = ("data=phantom", "data.size=28", "data.count=160", "sites=iid", "sites.count=2", "run.tensorboard=false")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = {}
        for wire in WIRES:
            folder = Path(place) / wire
            simulate(folder, [*SMALL, *LARGE, f"rounds.wire={wire}"], finished=False)
            found[wire] = bytes_of(folder)
    figures = []
    for wire in WIRES[1:]:
        for kind, shown in (("both", "round"), ("weights", "weights alone")):
            share = found[wire][kind] / found[PLAIN][kind]
            bar = BARS.get(wire) if kind == "both" else None
            figures.append(figure(f"traffic {wire}, {shown} / fp32", (share, share, share), bar=bar, better="lower"))
            print(f"{figures[-1]['name']:<40}{share:.4f}  bar {bar}")
    if given.json:
        write(given.json, {"machine": machine(), "figures": figures, "bytes": found})
    if not all(map(met, figures)):
        raise SystemExit("a bar is not met")


if __name__ == "__main__":
    main()
