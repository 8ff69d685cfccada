"""Programs of Python that the bundle needs: pip and venv, run beside the interpreter that runs this."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medfl.errors import NetworkError

EPOCH = "315532800"  # seconds: 1980-01-01, the first date of a zip file; the same source makes the same wheel
AGAIN = "Read pip's last lines above. To build, an index must be reachable, or name one behind --."


def pip(*words: str, python: Path | None = None, clean: bool = False) -> None:
    """Run pip; `clean` leaves out this user's settings, which could name other sources of packages.

    Raises:
        NetworkError: it failed; what it printed says why.
    """
    environment = {"SOURCE_DATE_EPOCH": EPOCH, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if clean:
        environment["PIP_CONFIG_FILE"] = os.devnull
    kept = {name: value for name, value in os.environ.items() if not (clean and name.startswith(("PIP_", "PYTHON")))}
    run([str(python or sys.executable), "-m", "pip", *words], AGAIN, kept | environment)


def run(words: Sequence[str], hint: str, environment: dict[str, str] | None = None) -> None:
    """Run a program with its output shown.

    Raises:
        NetworkError: it failed; `hint` says what to do.
    """
    code = subprocess.run(words, check=False, env=environment, stdin=subprocess.DEVNULL).returncode  # noqa: S603
    if code:
        raise NetworkError(f"{' '.join(words[1:4])} ended with {code}. {hint}")


def dotted() -> str:
    """This Python, as "3.11"."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"
