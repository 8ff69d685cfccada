"""Time and peak memory of a round against sites, model size and images per site, each with its exponent.

Every point is a process of its own, so that its peak is its own: a study in the in-process carrier, one round to warm
up, one that is timed (CPU time, one thread). Memory is the largest resident set above that after the imports, of
server and sites together, as they share the process. The exponent is the slope of a straight line through the
logarithms: 1 is proportional, 0 constant.

    sites      tiny encoder, 16 pixels, one step of 4 images at each
    model      2 sites, 28 pixels, one step of 8 images; against parameters
    images     2 sites, tiny encoder, 28 pixels, all images of a site once, in batches of 16

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/curves.py [--quick] [--only CURVE ...] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import numpy as np
import torch
from harness import figure, machine, not_run, write
from rounds import Rig

from medfl.machine import peak

SITES = [4, 8, 16, 64, 250, 1000]
MODELS = ["tiny", "resnet10", "resnet18", "resnet50"]
IMAGES = [32, 128, 512, 2048]
LIMIT = 900  # seconds of a point
TRAINED = 0.6  # at least this share of a site's images is trained on


def words_of(curve: str, value: str) -> list[str]:
    """The study of a point."""
    if curve == "sites":
        return ["encoder=tiny", f"sites.count={value}", "sites.min_images=8", "data.size=16",
                f"data.count={20 * int(value)}", "training.steps=1", "training.batch_size=4",
                "rounds.refresh_volumes=4"]  # fmt: skip
    if curve == "model":
        return [f"encoder={value}", "sites.count=2", "data.size=28", "data.count=100",
                "training.steps=1", "training.batch_size=8", "rounds.refresh_volumes=8"]  # fmt: skip
    count = int(value)
    return ["encoder=tiny", "sites.count=2", "data.size=28", f"data.count={int(2 * count / TRAINED)}",
            f"training.steps={count // 16}", "training.batch_size=16", "rounds.refresh_volumes=16"]  # fmt: skip


def point(curve: str, value: str) -> dict[str, float]:
    """One point, in this process."""
    torch.set_num_threads(1)
    start = peak()
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig.open(words_of(curve, value), Path(folder) / "run")
        rig.round()
        began = time.process_time()
        rig.round()
        seconds = time.process_time() - began
    method = rig.sites[0].shop.method
    x = float(sum(p.numel() for p in method.parameters())) if curve == "model" else float(value)
    return {"x": x, "seconds": seconds, "mib": (peak() - start) / 2**20}


def apart(curve: str, value: str) -> dict[str, float] | None:
    """One point, in a process of its own; None if it failed or took too long."""
    command = [sys.executable, __file__, "--point", curve, value]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"{curve} {value}: {error}\n{(error.stderr or '')[-500:]}")
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{curve:<8}{value:>10}{found['x']:>14.0f}{found['seconds']:>10.3f} s{found['mib']:>10.0f} MiB", flush=True)
    return found


def exponent(points: list[dict[str, float]], what: str) -> float:
    """Slope of log(what) over log(x)."""
    x, y = (np.log([max(one[name], 1e-3) for one in points]) for name in ("x", what))
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="the first three points of each curve")
    options.add_argument("--only", nargs="*", default=["sites", "model", "images"])
    options.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    if given.point:
        print(json.dumps(point(*given.point)))
        return
    curves = {"sites": [str(n) for n in SITES], "model": MODELS, "images": [str(n) for n in IMAGES]}
    rows, figures = {}, []
    for curve in given.only:
        values = curves[curve][: 3 if given.quick else None]
        found = [apart(curve, value) for value in values]
        rows[curve] = dict(zip(values, found, strict=True))
        points = [one for one in found if one is not None]
        for what, name in (("seconds", "time"), ("mib", "memory")):
            title = f"curves {name} against {curve}, exponent"
            if len(points) < len(values):
                figures.append(not_run(title, f"{len(values) - len(points)} of {len(values)} points failed"))
                continue
            slope = exponent(points, what)
            figures.append(figure(title, (slope, slope, slope), better="lower"))
            print(f"{title} {slope:.2f}")
    if given.json:
        write(given.json, {"machine": machine(), "figures": figures, "points": rows})


if __name__ == "__main__":
    main()
