"""Which numbers may cross a site's border; both sides of it check the same list."""

import math
import re
from collections.abc import Iterable

KINDS = "loss|monitor|site|synthesis|linear|knn|classifier|fusion|average|segmentation"
METRIC = re.compile(rf"({KINDS})(@0\.[0-9]{{1,4}})?/[a-z0-9_]{{1,40}}(/(value|low|high))?")
MOST_METRICS = 1000
LARGEST_METRIC = 1e9


def checked_metrics(items: Iterable[tuple[str, object]]) -> dict[str, float]:
    """The named numbers, if every name is on the list and every value finite and bounded.

    Raises:
        ValueError: with the finding.
    """
    metrics: dict[str, float] = {}
    for name, value in items:
        if not METRIC.fullmatch(name):
            raise ValueError(f"metric {name[:60]!r} is not on the list of what may be sent.")
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > LARGEST_METRIC:  # type: ignore[arg-type]
            raise ValueError(f"metric {name!r} is {str(value)[:40]}, need a finite number.")
        metrics[name] = float(value)  # type: ignore[arg-type]
    if len(metrics) > MOST_METRICS:
        raise ValueError(f"got {len(metrics)} metrics, need at most {MOST_METRICS}.")
    return metrics
