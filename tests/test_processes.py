"""Programs that are kept running, as real processes."""

import json
import subprocess
import sys
import time
from pathlib import Path

from medfl.deployment.processes import running, stop

SUPERVISOR = """
import sys
from pathlib import Path
from medfl.deployment.processes import Process, supervise
place = Path(sys.argv[1])
crash = [sys.executable, "-c", "print('hello', flush=True); raise SystemExit(3)"]
stubborn = [sys.executable, "-c", "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"]
supervise([Process("crash", crash, {}, place / "crash.log"), Process("stubborn", stubborn, {}, place / "s.log")],
          place / "up.pid", lambda text: print(text, flush=True), grace=1.0)
"""


def test_processes_are_started_again_and_end_together_without_orphans(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SUPERVISOR, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as popen:
        last = time.monotonic() + 30
        log = tmp_path / "crash.log"
        while not log.exists() or log.read_text().count("hello") < 2:
            assert time.monotonic() < last
            time.sleep(0.1)
        assert running(tmp_path / "up.pid") == popen.pid
        facts = json.loads((tmp_path / "up.json").read_text())
        session = facts["stubborn"]["pid"]
        assert facts["crash"]["restarts"] == 1
        assert len(of_session(session)) == 2
        second = subprocess.run(words, capture_output=True, text=True)
        assert "runs already" in second.stderr
        began = time.monotonic()
        assert stop(tmp_path / "up.pid")
        assert time.monotonic() - began < 10
    assert of_session(session) == []
    assert running(tmp_path / "up.pid") is None
    assert not stop(tmp_path / "up.pid")


def of_session(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own, *_ = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.append(int(place.parent.name))
    return found
