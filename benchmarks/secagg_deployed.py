"""A study under secure aggregation among real processes on loopback, beside the same study without it.

    PYTHONPATH=. python benchmarks/secagg_deployed.py [--rounds 4] [--json FILE]

nginx, SuperLink (TLS, node authentication), three SuperNodes and their app processes, as in `faults.py`. The encoder
must be, byte for byte, that of the simulation of the same study. A masked round has four exchanges in place of one, and
each waits for Flower's polls, so its seconds say more of these than of the masks. Needs nginx.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from fault_rig import Rig
from harness import machine, write

FORMS = {"plain": (), "masked": ("secagg.active=true",)}


def measured(words: tuple[str, ...], rounds: int) -> dict[str, object]:
    """One study from its start to its end."""
    with tempfile.TemporaryDirectory(prefix="medfl-secagg-") as place:
        rig = Rig(Path(place), ("rounds.deadline=120", *words), rounds=rounds)
        try:
            rig.up()
            rig.join()
            began = rig.begin()
            while (state := rig.state()) in ("requested", "running"):
                time.sleep(1)
            seconds, lost, events = time.monotonic() - began, rig.lost(), rig.study.events()
            right = rig.encoder() == rig.expected(lost)
        finally:
            rig.study.stop()
    took = [event["value"] for event in events if event["name"] == "round/seconds"]
    return {"state": state, "right": right, "lost": len(lost), "seconds": seconds, "rounds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = {name: measured(words, given.rounds) for name, words in FORMS.items()}
    print("| study | ended | encoder of the simulation | replies lost | s, whole | s, round: median |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['state']} | {row['right']} | {row['lost']} | {row['seconds']:.0f} | "
              f"{median(row['rounds']):.1f} |")  # type: ignore[call-overload]  # fmt: skip
    if given.json:
        write(given.json, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
