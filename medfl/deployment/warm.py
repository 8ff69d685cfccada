"""Requests without their start: libraries are loaded once, and each request is a copy of the process that has them.

Flower's SuperExec starts a program for each request, of which torch and MONAI take 3 to 6 s. This process loads them,
listens at a socket in the site's state folder, and forks for each request that is handed over; it computes nothing
itself. It ends with the SuperExec beside it. Without it, a request starts as Flower would start it.
"""

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from medfl.deployment.handover import MOST, SOCKET, TAKEN
from medfl.deployment.processes import end_with_parent

LIBRARIES = (  # torch imports _dynamo with an optimizer's first step, medfl the last line where it needs it
    "torch._dynamo", "client.app", "medfl.workshop", "medfl.evaluation.at_site", "medfl.evaluation.pictures",
    "monai.data.image_reader", "monai.transforms.spatial.array", "monai.losses.dice", "nibabel", "numba", "PIL.Image",
)  # fmt: skip
SECONDS = 5.0  # in which a request's words must be there


def main(words: Sequence[str]) -> None:
    """Become the program `words`, with a child that serves the requests it takes."""
    parent = os.getpid()
    if os.fork():
        os.execvp(words[0], list(words))  # noqa: S606
    end_with_parent()
    if os.getppid() == parent:  # else it ended before it could be told so
        _run(_requests(Path(os.environ[SOCKET])))


def _run(words: Sequence[str]) -> None:
    from medfl.deployment import clientapp

    clientapp.run(words)


def load() -> None:
    """Import what a request needs. No device is touched: a fork cannot use one that its parent did."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection copies what all requests share


def _requests(path: Path) -> list[str]:
    """Listen for ever; returns in a new process for each request, with its words."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as door:
        with contextlib.chdir(path.parent):  # a socket's path may have 107 bytes
            door.bind(path.name)
        path.chmod(0o600)
        door.listen(16)
        load()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a request's end
        while True:
            with door.accept()[0] as line:
                words = _asked(line)
                if words and os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    end_with_parent()
                    return words


def _asked(line: socket.socket) -> list[str]:
    """The words of a request whose launcher still waits; [] of any other."""
    content = b""
    line.settimeout(SECONDS)
    with contextlib.suppress(OSError):
        while len(content) < MOST and (part := line.recv(MOST)):
            content += part
        line.sendall(TAKEN)
        return content.decode(errors="replace").split("\0")
    return []


if __name__ == "__main__":
    main(sys.argv[1:])
