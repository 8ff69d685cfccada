"""Runs Flower's SuperNode and ends it where it would hang: then whoever started this starts it again.

Once the coordinator's certificate was refused, as it is where another program answers for a while, a SuperNode stays up
without a connection, and tries no other. And it waits for ever for the rest of an answer whose process ended while it
sent it. Its last words tell.
"""

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import BinaryIO

from medfl.deployment.processes import end_with_parent
from medfl.errors import NetworkError

LAST_WORDS = {b"handshake error": 30.0, b"Giving up reconnection": 30.0, b"Sending: ": 1800.0}  # -> s without others
TAIL, LINES = 4096, 3  # bytes that are kept; an explanation takes a line more
EVERY = 1.0  # s between two looks


def run(words: Sequence[str], out: BinaryIO, *, hurry: float = 1.0) -> int:
    """Run a program and pass on what it says; its exit code, or that of a lost connection.

    Args:
        hurry: how many times faster than usual it is ended.
    """
    with subprocess.Popen(  # noqa: S603
        list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=end_with_parent,
    ) as popen:  # fmt: skip

        def forward(number: int, _: FrameType | None) -> None:
            popen.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, forward)
        if _follow(popen, out, hurry):
            code = popen.wait()
            return code if code >= 0 else 128 - code
        _pass_on(b"the node has nothing to say any more after these words, and is ended\n", out)
        popen.kill()
    return NetworkError.exit_code


def _follow(popen: subprocess.Popen[bytes], out: BinaryIO, hurry: float) -> bool:
    """Pass output on until its end; False where it hangs."""
    assert popen.stdout is not None
    source, tail, heard = popen.stdout.fileno(), b"", time.monotonic()
    while True:
        if select.select([source], [], [], EVERY)[0]:
            part = os.read(source, TAIL)
            if not part:
                return True
            _pass_on(part, out)
            tail, heard = (tail + part)[-TAIL:], time.monotonic()
        elif (time.monotonic() - heard) * hurry > patience(tail):
            return False


def _pass_on(part: bytes, out: BinaryIO) -> None:
    """A disk that is full costs lines of the log, not the node."""
    with contextlib.suppress(OSError):
        os.write(out.fileno(), part)


def patience(said: bytes) -> float:
    """Seconds for which a node may be silent after these words."""
    lines = [line for line in said.splitlines() if line.strip()][-LINES:]
    found = [limit for sign, limit in LAST_WORDS.items() if any(sign in line for line in lines)]
    return min(found) if found and not any(b"Sent successfully" in line for line in lines) else math.inf


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], sys.stdout.buffer))
