"""What a site works on, and the watchdog: a node whose request takes too long, or was lost, is started again.

Flower's node waits for an answer for ever, most of all for the rest of one whose process ended while it sent it.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from medfl.onsite.audit import Audit
from medfl.onsite.site_file import SiteFile

LOST = 90.0  # s after the end of a request's process in which Flower may still answer in its place
LATE = 300.0  # s after its limit in which a request should have ended itself
EVERY = 15.0  # s between two looks


@dataclass(frozen=True)
class Work:
    """A request being worked on."""

    message: str
    kind: str  # such as "train.pretrain"
    round: str
    since: float  # s since 1970
    pid: int
    born: int  # when that process started: a number may come again


def work_on(site: SiteFile, message: str, kind: str, number: str) -> None:
    """Note that this process works on a request."""
    site.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = site.busy.with_name(f".busy.{os.getpid()}")
    now = Work(message, kind, number, time.time(), os.getpid(), _born(os.getpid()))
    draft.write_text(json.dumps(asdict(now)))
    draft.replace(site.busy)


def done(site: SiteFile) -> None:
    """Note that the answer is at the node."""
    site.busy.unlink(missing_ok=True)


def work(site: SiteFile) -> Work | None:
    """What is being worked on; None between requests."""
    try:
        tree = json.loads(site.busy.read_text())
        kinds = Work.__annotations__
        return Work(**{name: kind(tree[name]) for name, kind in kinds.items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stuck(site: SiteFile, gone: dict[str, float]) -> str:
    """Why the node needs a restart, or "".

    Args:
        gone: request -> when its process was first seen to have ended; kept between two looks.
    """
    now = work(site)
    if now is None:
        return ""
    if time.time() - now.since > site.limits.hours * 3600 + LATE:
        return f"a request took longer than limits.hours={site.limits.hours:g}"
    if _born(now.pid) != now.born and time.time() - gone.setdefault(now.message, time.time()) > LOST:
        return "the process of a request ended without an answer"
    return ""


def relieve(site: SiteFile, study_id: str, gone: dict[str, float]) -> bool:
    """End a stuck node, which the supervisor starts again; returns whether it was stuck."""
    reason, now = stuck(site, gone), work(site)
    if not reason or now is None:
        return False
    Audit(site.audit).write("node restarted", study=study_id, reason=reason, request=now.kind, round=now.round)
    done(site)
    if _born(now.pid) == now.born:
        _end(now.pid, signal.SIGKILL)
    node = running_parts(site.study(study_id).pid).get("node", {})
    if pid := int(str(node.get("pid") or 0)):
        _end(pid, signal.SIGTERM)
    return True


@contextlib.contextmanager
def watched(site: SiteFile, study_id: str, every: float = EVERY) -> Iterator[None]:
    """Look after the node as long as the block runs."""
    ended, gone = threading.Event(), dict[str, float]()

    def look() -> None:
        while not ended.wait(every):
            with contextlib.suppress(Exception):  # a full disk, say, must not end the watch
                relieve(site, study_id, gone)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=2.0)


def running_parts(pidfile: Path) -> dict[str, dict[str, object]]:
    """What the supervisor says of its programs: name -> pid, since, restarts; {} where none runs."""
    try:
        tree = json.loads(pidfile.with_suffix(".json").read_text())
        return {str(name): dict(facts) for name, facts in tree.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _born(pid: int) -> int:
    """When a process started, in clock ticks since this machine did; 0 if there is none of this number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def _end(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
