"""Runs Flower's SuperNode and ends it where it would hang: then whoever started this starts it again.

Once a TLS handshake broke off, as it does where a firewall or a port forwarder answers for a coordinator that is down,
a SuperNode stays up without a connection, and tries no other. Its last word tells.
"""

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

SEVERED, SILENT = b"handshake error", 30.0  # the last word of such a node; s without another
TAIL, LINES = 4096, 2  # bytes that are kept; the explanation takes a line more
EVERY = 1.0  # s between two looks


def run(words: Sequence[str], out: BinaryIO, *, silent: float = SILENT) -> int:
    """Run a program and pass on what it says; its exit code, or that of a lost connection."""
    with subprocess.Popen(  # noqa: S603
        list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=end_with_parent,
    ) as popen:  # fmt: skip

        def forward(number: int, _: FrameType | None) -> None:
            popen.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, forward)
        if _follow(popen, out, silent):
            code = popen.wait()
            return code if code >= 0 else 128 - code
        out.write(b"a TLS handshake broke off, after which a node does not try again; ending it\n")
        out.flush()
        popen.kill()
    return NetworkError.exit_code


def _follow(popen: subprocess.Popen[bytes], out: BinaryIO, silent: float) -> bool:
    """Pass output on until its end; False where it has ended in a broken handshake and silence."""
    assert popen.stdout is not None
    source, tail, heard = popen.stdout.fileno(), b"", time.monotonic()
    while True:
        if select.select([source], [], [], EVERY)[0]:
            part = os.read(source, TAIL)
            if not part:
                return True
            out.write(part)
            out.flush()
            tail, heard = (tail + part)[-TAIL:], time.monotonic()
        elif time.monotonic() - heard > silent and severed(tail):
            return False


def severed(said: bytes) -> bool:
    """Whether a node's last words are of a handshake that broke off."""
    lines = [line for line in said.splitlines() if line.strip()]
    return any(SEVERED in line for line in lines[-LINES:])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], sys.stdout.buffer))
