"""What this machine, or the container that it shows itself as, has to give."""

import os
import resource
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def memory() -> float:
    """Bytes that this process may use: the machine's free memory, or what is left of its container's limit."""
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = float(line.split()[1]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = _lines(CGROUP / limit), _lines(CGROUP / used)
        if most and now and most[0].isdigit():
            free = min(free, float(most[0]) - float(now[0]))
    return free


def peak() -> float:
    """Bytes of memory that this process had at its peak. Of a process that was just made, getrusage tells its
    maker's."""
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
