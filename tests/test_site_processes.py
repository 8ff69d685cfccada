"""What runs at a site beside Flower's own programs: requests that start warm, and a node that ends where it hangs."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medfl.deployment import clientapp, site_processes
from medfl.onsite.audit import Audit
from medfl.onsite.site_file import SiteFile
from tests.deployment.real import wait_until
from tests.test_onsite import STUDY, joined, launched, place  # noqa: F401

UNTOUCHED = """
import torch
from medfl.deployment import warm
def touched(*given): raise SystemExit("a device was touched: a fork could not use it any more")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
warm.load()
import sys, threading
print(threading.active_count(), "monai" in sys.modules, "sklearn" in sys.modules)
"""


@contextmanager
def warm_apps(site: SiteFile) -> Iterator[subprocess.Popen[str]]:
    """The process of the apps, with another program in the place of Flower's."""
    words, around = site_processes.apps(site, STUDY)
    start = [*words[:4], "sleep", "120"]
    with subprocess.Popen(start, env=around, stderr=subprocess.PIPE, text=True, start_new_session=True) as popen:
        try:
            wait_until((site.state / "warm.socket").exists, 60, "the socket")
            yield popen
        finally:
            os.killpg(popen.pid, signal.SIGKILL)


def test_a_request_is_handed_to_the_process_that_is_warm(joined: SiteFile) -> None:  # noqa: F811
    asked = ["--runtime-api-address", "127.0.0.1:9", "--token", "t"]
    before = len(list(Audit(joined.audit).entries()))
    with warm_apps(joined) as apps:
        assert (joined.state / "warm.socket").stat().st_mode & 0o077 == 0
        for number in (1, 2):
            done = launched(joined, "flwr-serverapp", asked)
            assert (done.returncode, done.stderr) == (0, ""), "it starts by itself"
            wait_until(lambda n=number: len(list(Audit(joined.audit).entries())) == n + before, 60, "the refusal")
            assert list(Audit(joined.audit).entries())[-1]["program"] == "flwr-serverapp"
        apps.kill()
    done = launched(joined, "flwr-serverapp", asked)
    assert done.returncode == clientapp.REFUSED
    assert "starting a request by itself" in done.stderr


def test_what_is_loaded_beforehand_touches_no_device_and_starts_no_thread() -> None:
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=False)
    assert done.stdout == "1 True True\n", done.stderr


SEVERED = """\
WARNING :   Connection attempt failed, retrying in 0.30 seconds
ERROR :     SSL/TLS handshake error detected.
WARNING :   Giving up reconnection after 0.35 seconds and 2 tries.
ERROR :     [SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol (_ssl.c:1006)
"""


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        (SEVERED, True),
        ("INFO :      Sending: train.pretrain message (ID: 1)\n", True),
        ("INFO :      Sending: train.pretrain message (ID: 1)\nINFO :      Sent successfully\n", False),
        (f"{SEVERED}INFO :      Sent successfully\nINFO :\nINFO :      Received\nINFO : \n", False),
    ],
)
def test_a_node_that_hangs_is_ended(said: str, lost: bool) -> None:
    """What Flower says before it does, and nothing more for ever."""
    script = f"print({said!r}, end='', flush=True); import time; time.sleep(4)"
    words = f"import sys; from medfl.deployment import tended; sys.exit(tended.run({[sys.executable, '-c', script]!r}"
    ended = f"{words}, sys.stdout.buffer, hurry=2000.0))"
    done = subprocess.run([sys.executable, "-c", ended], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(said)
    assert done.returncode == (20 if lost else 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_tended_node_ends_with_its_keeper(number: signal.Signals) -> None:
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    words = [sys.executable, "-m", "medfl.deployment.tended", sys.executable, "-c", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout
        child = int(popen.stdout.readline())
        popen.send_signal(number)
        assert popen.wait(timeout=20) == (128 + number if number == signal.SIGTERM else -number)
    wait_until(lambda: not Path(f"/proc/{child}/stat").exists(), 20, "the end of the node")
