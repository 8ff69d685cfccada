"""How many workers a machine can have."""

from medfl.workers.notes import Memory

SPARE = 1.5  # room for a worker, in units of what the first one took at its peak
GPU_CONTEXT = 6e8  # bytes of a GPU that a process takes beside its tensors
GB = 1e9


def worker_count(cores: int, threads: int, free: float, seen: Memory) -> tuple[int, str]:
    """Workers that fit, with one running already, and why not more.

    Args:
        cores: of this machine.
        threads: of each worker.
        free: bytes of memory, now.
        seen: of the first worker, after a whole request.
    """
    most = max(1, cores // threads)
    why = f"{cores} cores, {threads} threads each"
    room = 1 + int(free // (SPARE * seen.peak))
    if room < most:
        most, why = room, f"{free / GB:.1f} GB of memory free, {SPARE * seen.peak / GB:.1f} GB for each"
    if seen.free:
        need = SPARE * seen.reserved + GPU_CONTEXT
        found = _on_gpus(most, list(seen.free), need)
        if found < most:
            least = min(seen.free) / GB
            most, why = found, f"{len(seen.free)} GPUs, down to {least:.1f} GB free, {need / GB:.1f} GB for each"
    return most, why


def _on_gpus(most: int, free: list[float], need: float) -> int:
    """Worker i is on GPU i modulo their number; the first one is there."""
    for worker in range(1, most):
        gpu = worker % len(free)
        free[gpu] -= need
        if free[gpu] < 0:
            return worker
    return most
