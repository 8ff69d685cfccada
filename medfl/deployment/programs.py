"""What every program of a study needs: its place, its environment, its log; and how to see that it works."""

import contextlib
import json
import os
import shutil
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from medfl.errors import ResourceError

SWITCHES = {  # nothing here speaks to anyone but the coordinator and its sites
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}
SECRETS = ("MEDFL_CA_PASSPHRASE",)  # for one command, never for what it starts
LARGEST_LOG = 20_000_000  # bytes; then it becomes <name>.1


def program(name: str) -> str:
    """A program of this installation, never one of another that PATH may show first.

    Raises:
        ResourceError: it is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise ResourceError(f"{path} is missing. Install medfl again in this environment.")
    return str(path)


def environment(home: Path, near: Sequence[str] = ()) -> dict[str, str]:
    """This process's environment without secrets, with `home` as Flower's; `near` hosts are reached without a proxy."""
    kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
    bypass = [kept.get("NO_PROXY", kept.get("no_proxy", "")), "localhost", "127.0.0.1", *near]
    direct = ",".join(dict.fromkeys(host for host in bypass if host))
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    return kept | SWITCHES | {"FLWR_HOME": str(home), "PATH": path, "NO_PROXY": direct, "no_proxy": direct}


def answers(address: str, seconds: float = 5.0) -> bool:
    """Whether an address answers a GET with success. Only for liveness: the certificate is not checked."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(address, timeout=seconds) as answer:
            return bool(answer.status < 400)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def rotate(log: Path) -> None:
    """Copy a large log to <name>.1, if there is room, and empty it; a program that appends to it goes on there."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > LARGEST_LOG:
            with contextlib.suppress(OSError):
                shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def write_facts(path: Path, facts: object) -> None:
    """Replace a file of passing facts: whole at any instant, but not forced to disk every other second."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(facts, indent=1))
    draft.replace(path)
