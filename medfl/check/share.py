"""share.json: states and counts, no name of a file, no id, no path, no day."""

import json
from collections.abc import Mapping
from typing import Any

from medfl import PROTOCOL, __version__
from medfl.check.finding import number, worst
from medfl.check.run import Result
from medfl.study import LEAST_COUNT

SMALL = ("class_", "label_", "modality_")  # counts of people that are told only where there are enough


def document(result: Result) -> dict[str, Any]:
    """What may leave the site."""
    scope = result.scope
    return {
        "format": 1,
        "medfl": __version__,
        "protocol": PROTOCOL,
        "study": None if scope.invitation is None else scope.invitation.config_digest,
        "offline": scope.offline,
        "state": worst(result.findings),
        "problems": number(result.findings, "fail"),
        "warnings": number(result.findings, "warn"),
        "findings": [
            {"group": one.group, "name": one.name, "state": one.state, "counts": _counts(one.counts)}
            for one in result.findings
        ],
    }


def text(result: Result) -> str:
    return json.dumps(document(result), indent=1)


def _counts(counts: Mapping[str, float | int]) -> dict[str, float | int]:
    """Fewer than `LEAST_COUNT` people are told as none."""
    return {
        name: 0 if name.startswith(SMALL) and value < LEAST_COUNT else value for name, value in sorted(counts.items())
    }
