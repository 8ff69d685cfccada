"""A site's account, as people read it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medfl.privacy.accounting import UNIT, spent
from medfl.privacy.ledger import WHAT, Ledger

ALIKE = ("study", "phase", "arm", "unit", "noise", "rate")  # releases that are one row


def account(state: Path, site: str, policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was spent, and by what.

    Args:
        policy: `policy.privacy` of site.yaml.

    Raises:
        PrivacyError: the ledger was changed.
    """
    ledger = Ledger.of(state, site)
    releases = ledger.releases()
    lines = [entry for entry in ledger.lines() if entry.get("what") == WHAT]
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        key = tuple(line.get(name) for name in ALIKE)
        row = rows.setdefault(key, dict(zip(ALIKE, key, strict=True)) | {"rounds": 0, "steps": 0})
        row["rounds"], row["steps"] = row["rounds"] + 1, row["steps"] + line["steps"]
    delta = min((float(line["delta"]) for line in lines), default=0.0)
    total = spent(releases, delta) if releases else None
    return {
        "site": site,
        "unit": UNIT,
        "delta": delta,
        "epsilon": total.epsilon if total else 0.0,
        "rdp": total.rdp if total else 0.0,
        "prv": total.prv if total and math.isfinite(total.prv) else None,
        "max_epsilon": (policy or {}).get("max_epsilon"),
        "releases": len(releases),
        "rows": list(rows.values()),
        "head": "{}:{}".format(*ledger.head()),
    }
