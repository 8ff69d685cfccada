"""What Flower's SuperExec starts for each request at a site: it hands the request to the process that is warm.

Run as a file by a bare interpreter, so it uses nothing but the standard library, and little of that.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Sequence

SOCKET = "MEDFL_WARM"  # variable with the path of the socket; unset: each request starts by itself
MOST = 65536  # bytes of a request's words
TAKEN = b"y"
PATIENCE = 60.0  # s in which a loading process should be ready


def main(words: Sequence[str]) -> None:
    """Hand the words over, or become the program that they are for."""
    folder, name = os.path.split(os.environ.get(SOCKET, ""))
    if not name or not _taken(folder, name, "\0".join(words).encode()):
        sys.stderr.write("starting a request by itself, which takes seconds more\n")
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-P", "-m", "medfl.deployment.clientapp", *words])  # noqa: S606


def _taken(folder: str, name: str, content: bytes) -> bool:
    try:
        with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as line:  # a socket's path may have 107 bytes
            line.settimeout(PATIENCE)
            line.connect(name)
            line.sendall(content)
            line.shutdown(socket.SHUT_WR)
            return line.recv(1) == TAKEN
    except OSError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
