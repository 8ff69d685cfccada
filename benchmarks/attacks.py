"""Attacks on a study of real processes on loopback: what was tried, and what of it was accepted.

    PYTHONPATH=. python benchmarks/attacks.py [--only NAME ...] [--json FILE]

Needs nginx; contacted hosts also need strace. Mutated, replayed and oversized answers by the thousand, and payloads
that would run code, are in tests/test_security.py.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attack_port
import attack_site
from attack_replies import kinds
from fault_rig import Rig
from harness import machine, write

ATTACKS: dict[str, tuple[str, Callable[[Rig], Any]]] = {
    "interfaces": ("Control and Runtime interfaces through the public port", attack_port.interfaces),
    "tls": ("older TLS, weak ciphers, no TLS", attack_port.downgrades),
    "bodies": ("oversized and lying requests", attack_port.bodies),
    "half-open": ("half-open connections that stay, beside a run", attack_port.half_open),
    "bundles": ("another program or study, from the coordinator itself", attack_site.bundles),
    "hosts": ("addresses contacted by a site's processes, and of them others than allowed", attack_site.hosts),
    "identifiers": ("identifiers planted at a site, and of them found at the server", attack_site.identifiers),
    "strangers": ("nodes that are unregistered or revoked", attack_port.strangers),
    "impostors": ("coordinators of another authority or name, expired, self-signed", attack_port.impostors),
    "replies": ("malformed and oversized answers that their site signed", attack_site.replies),
}
OWN_RIG = ("replies",)  # needs as many rounds as there are kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, object]] = []
    for own in (False, True):
        names = [name for name in given.only if (name in OWN_RIG) == own]
        if not names:
            continue
        rounds = {"rounds": len(kinds())} if own else {}
        with tempfile.TemporaryDirectory(prefix="medfl-attacks-") as place:
            rig = Rig(Path(place), ("rounds.deadline=120",), **rounds)
            try:
                rig.up()
                rig.join()
                rows += [_tried(rig, name) for name in names]
            finally:
                rig.study.stop()
    accepted = sum(int(str(row["accepted"])) for row in rows)
    print(f"\n{sum(int(str(row['tried'])) for row in rows)} tried, {accepted} accepted")
    if given.json:
        write(given.json, {"machine": machine(), "attacks": rows})


def _tried(rig: Rig, name: str) -> dict[str, object]:
    text, act = ATTACKS[name]
    try:
        tried, accepted, *more = act(rig)
    except AssertionError as error:
        tried, accepted, more = 1, 1, [f"FAILED: {str(error).splitlines()[0]}"]
    print(f"| {text} | {tried} | {accepted} | {' '.join(map(str, more))} |", flush=True)
    return {"attack": name, "tried": tried, "accepted": accepted, "remark": " ".join(map(str, more))}


if __name__ == "__main__":
    main()
