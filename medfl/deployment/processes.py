"""Programs that stay: started, watched, started again after a crash, and ended together. POSIX only."""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from medfl.deployment.programs import SECRETS, answers, rotate, write_facts
from medfl.errors import ResourceError

TICK = 0.2  # s
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # s before a program is started again; doubles
SETTLED = 120.0  # s without a crash after which the pause is short again
GRACE = 8.0  # s between SIGTERM and SIGKILL: all has ended within 10 s
PROBE_EVERY, SILENT = 10.0, 120.0  # s; a program whose health address is silent for so long is started again
LOCK_ATTEMPTS = 3
PR_SET_PDEATHSIG = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Process:
    """One program: words, the whole environment, where output goes, and an address that answers while it works."""

    name: str
    words: list[str]
    env: dict[str, str]
    log: Path
    health: str | None = None


@dataclass
class _Child:
    """A program and its present life."""

    process: Process
    popen: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    again: float = 0.0  # when to start it, monotonic
    pause: float = FIRST_PAUSE
    probed: float = 0.0
    answered: float = 0.0
    restarts: int = -1
    since: str | None = None
    code: int | None = None  # of its last end

    @property
    def facts(self) -> dict[str, object]:
        pid = None if self.popen is None else self.popen.pid
        return {"pid": pid, "since": self.since, "restarts": max(0, self.restarts), "ended": self.code}

    def start(self) -> None:
        log = self.process.log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.popen = subprocess.Popen(  # noqa: S603
                self.process.words,
                env=self.process.env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
                preexec_fn=end_with_parent,
            )
        self.started = self.answered = self.probed = time.monotonic()
        self.restarts += 1
        self.since = datetime.now(UTC).isoformat(timespec="seconds")

    def ended(self) -> int | None:
        """The exit code, once; what it left of its own children goes."""
        code = None if self.popen is None else self.popen.poll()
        if self.popen is None or code is None:
            return None
        _signal(self.popen.pid, signal.SIGKILL)
        self.popen = None
        self.pause = FIRST_PAUSE if time.monotonic() - self.started > SETTLED else min(LONGEST_PAUSE, self.pause * 2)
        self.again = time.monotonic() + self.pause
        self.code, self.since = code, None
        return code

    def silent(self) -> bool:
        """Whether its health address has not answered for too long."""
        now = time.monotonic()
        if self.popen is None or self.process.health is None or now - self.probed < PROBE_EVERY:
            return False
        self.probed = now
        if answers(self.process.health, seconds=1.5):  # SIGTERM waits as long
            self.answered = time.monotonic()
        return time.monotonic() - self.answered > SILENT


def supervise(processes: Sequence[Process], pidfile: Path, say: Say = print, *, grace: float = GRACE) -> None:
    """Keep programs running until SIGTERM or SIGINT, then end all: by force those that take longer than `grace` s.

    What runs is written to `pidfile` with the suffix .json: {name: {"pid", "since", "restarts", "ended"}}.

    Raises:
        ResourceError: another process supervises with this pid file.
    """

    def told(text: str) -> None:
        with contextlib.suppress(OSError):
            say(text)

    with claimed(pidfile), _stopping() as stop:
        children = [_Child(process) for process in processes]
        try:
            stale = False
            while not stop:
                for child in children:
                    stale |= _tend(child, told)
                if stale:
                    with contextlib.suppress(OSError):  # a full disk ends nothing that runs
                        write_facts(pidfile.with_suffix(".json"), {c.process.name: c.facts for c in children})
                        stale = False
                time.sleep(TICK)
        finally:
            _end(children, grace)
            pidfile.with_suffix(".json").unlink(missing_ok=True)


def _tend(child: _Child, say: Say) -> bool:
    """Start what is not running; returns whether anything changed."""
    name, now = child.process.name, time.monotonic()
    if (code := child.ended()) is not None:
        say(f"{name} ended ({_why(code)}); starting it again in {child.pause:.0f} s. Log: {child.process.log}")
        return True
    if child.popen is None and now >= child.again:
        rotate(child.process.log)
        try:
            child.start()
        except OSError as error:
            child.again = now + LONGEST_PAUSE
            say(f"{name} cannot be started: {error}")
            return False
        say(f"{name} started (process {child.facts['pid']})")
        return True
    if child.popen is not None and child.silent():
        say(f"{name} has not answered for {SILENT:.0f} s; starting it again. Log: {child.process.log}")
        _signal(child.popen.pid, signal.SIGKILL)
    elif int(now) % 60 == 0:
        rotate(child.process.log)
    return False


def _end(children: Sequence[_Child], grace: float) -> None:
    """SIGTERM, in the opposite order of the start, then SIGKILL to whatever is left of their sessions."""
    living = [child.popen for child in reversed(children) if child.popen is not None]
    for popen in living:
        _signal(popen.pid, signal.SIGTERM)
    last = time.monotonic() + grace
    while any(popen.poll() is None for popen in living) and time.monotonic() < last:
        time.sleep(TICK / 4)
    for popen in living:
        _signal(popen.pid, signal.SIGKILL)
        popen.wait()


def end_with_parent() -> None:
    """In a new process: SIGTERM when its parent dies, even where that could not say so (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(session: int, number: signal.Signals) -> None:
    """Send a signal to every process of a session, whatever groups they are in."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            rest = place.read_text().rpartition(")")[2].split()  # state, parent, group, session
            if int(rest[3]) == session and int(rest[2]) != session:
                os.kill(int(place.parent.name), number)


@contextlib.contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that is filled by SIGTERM or SIGINT."""
    got: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        got.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def claimed(pidfile: Path) -> Iterator[None]:
    """Hold the lock of `pidfile` with this process's id in it: the lock dies with the process, an id may come again."""
    pidfile.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(pidfile, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if attempt + 1 == LOCK_ATTEMPTS:
                    raise ResourceError(f"{pidfile}: process {running(pidfile)} runs already. Stop it first.") from None
                time.sleep(TICK)  # one that only looked whether someone runs
        os.ftruncate(number, 0)
        os.write(number, str(os.getpid()).encode())
        yield
        os.ftruncate(number, 0)
    finally:
        os.close(number)


def running(pidfile: Path) -> int | None:
    """The process that supervises with this pid file, if one does."""
    try:
        with pidfile.open() as file:
            text = file.read()
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(text or 0)
    except FileNotFoundError:
        pass
    return None


def background(words: Sequence[str], log: Path, pidfile: Path, *, seconds: float = 20.0) -> int:
    """Start a command that supervises, detached from this terminal; returns its process id.

    Raises:
        ResourceError: one runs already, or this one ended at once; the last line of its log is given.
    """
    if process := running(pidfile):
        raise ResourceError(f"{pidfile}: process {process} runs already. Stop it first.")
    rotate(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in SECRETS}
    with log.open("ab") as file:
        popen = subprocess.Popen(  # noqa: S603
            list(words),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    last = time.monotonic() + seconds
    while time.monotonic() < last and popen.poll() is None:
        if running(pidfile) == popen.pid:
            return popen.pid
        time.sleep(TICK)
    lines = log.read_text(errors="replace").strip().splitlines()
    popen.terminate()
    raise ResourceError(f"the background process did not start: {lines[-1] if lines else 'it said nothing'} Log: {log}")


def stop(pidfile: Path, *, seconds: float = 15.0) -> bool:
    """Ask the supervising process to end and wait for it; False where none was running.

    Raises:
        ResourceError: it is still there after so many seconds.
    """
    if not (process := running(pidfile)):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)
    last = time.monotonic() + seconds
    while running(pidfile):
        if time.monotonic() > last:
            raise ResourceError(f"process {process} has not ended after {seconds:.0f} s. Run: kill -9 {process}")
        time.sleep(TICK / 2)
    return True


def _why(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
