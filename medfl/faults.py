"""Named places where a test may end this process as a power cut would."""

import os
import signal
from pathlib import Path

KILL_AT = "MEDFL_KILL_AT"  # "<point>" or "<point>:<how often it is passed before>"
MARK = "MEDFL_KILLED"  # a file that is made when it happens: while it exists, nothing more does


_passed: dict[str, int] = {}


def point(name: str) -> None:
    """End this process with SIGKILL if MEDFL_KILL_AT names this place; otherwise nothing."""
    wanted, _, often = os.environ.get(KILL_AT, "").partition(":")
    if wanted != name:
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] > int(often or 0) and _once():
        os.kill(os.getpid(), signal.SIGKILL)


def _once() -> bool:
    """Whether it has not happened yet: the process that takes this one's place goes on."""
    mark = os.environ.get(MARK)
    if not mark:
        return True
    try:
        Path(mark).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
