"""The keeper: lets approved sites in, puts revoked ones out, submits the run, resumes it after a crash, says how it is.

A request and a stop are files in DIR/state, so the command that asks needs no connection and may be on another console.
The keeper itself may end at any instant: all that it needs to go on is at the SuperLink and in DIR/state/attempts.json.
"""

import contextlib
import fcntl
import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from medfl.deployment import status
from medfl.deployment.control import UNREGISTERED, Control, FlowerRun, Node, pem_of
from medfl.deployment.coordinator import CONNECTION
from medfl.deployment.processes import Say, claimed
from medfl.deployment.programs import write_facts
from medfl.deployment.status import LINK, RUN
from medfl.deployment.wishes import REQUEST, STOP, invitation_of
from medfl.errors import CredentialError, MedflError, NetworkError, ResourceError
from medfl.files import write_bytes
from medfl.provision.documents import JoinRequest, approved, last_day, now, today
from medfl.provision.study_file import StudyFile

LOCK = "attempt.lock"  # held by the ServerApp while it works; holds its run's id
ATTEMPTS, OUTCOME = "attempts.json", "outcome.json"
TICK = 2.0  # s between two status files
ASK_EVERY = 4.0  # s between two questions to the SuperLink
FRUITLESS = 5  # attempts without a new checkpoint before the keeper gives up
LINGER = 35.0  # s in which a stopped ServerApp may still work: until its next heartbeat
PASSING = (NetworkError.exit_code, ResourceError.exit_code)  # of errors that may pass
WAIT = 60.0  # s after such an error
PAUSE = 5.0  # s for every fruitless attempt before the next one
DONE = ("none", "finished", "failed", "stopped", "gave up")


@dataclass(frozen=True)
class Attempts:
    """What became of the run that was asked for."""

    request: str = ""  # id of the request
    state: str = "none"  # requested | running | finished | failed | stopped | gave up
    run: int = 0  # Flower's id of the attempt that goes on
    count: int = 0
    fruitless: int = 0  # of the last ones, without a new checkpoint
    checkpoints: str = ""  # what was there when the attempt was submitted
    error: str = ""
    code: int = 0  # exit code that the error would have
    since: str = ""


class Keeper:
    """One study's keeper; `tick` does one round of its work."""

    def __init__(self, folder: Path, control: Control, say: Say) -> None:
        self.folder, self.state, self.control, self.say = folder, folder / "state", control, say
        self.study = StudyFile.read(folder)
        self.attempts = _attempts(self.state / ATTEMPTS)
        self.nodes: list[Node] = []
        self.problems: dict[str, str] = {}  # by site, or LINK or RUN
        self.asked = self.next_try = float("-inf")
        self.reader = status.Reader(folder)

    def tick(self) -> None:
        """Do what there is to do and write status.json; an error is told there and tried again."""
        if time.monotonic() - self.asked >= ASK_EVERY:
            self.asked = time.monotonic()
            try:
                self.nodes = self.control.nodes()
                self._admit()
                self._attend(self.control.runs())
                self._solved(LINK)
                self._solved(RUN)
            except NetworkError as error:
                self._problem(LINK, str(error))
            except MedflError as error:
                self._problem(RUN, str(error))
        facts = self.reader.facts(self.nodes, asdict(self.attempts), self.problems)
        write_facts(self.state / status.FILE, facts)

    def _admit(self) -> None:
        """Register approved keys; unregister every other, which ends their connections with the next request."""
        wanted, problems = self._wanted()
        unsure = set(problems)
        known = {node.key: node for node in self.nodes}
        for key, name in wanted.items():
            node = known.get(key)
            if node is None:
                self.control.register(name, key)
                self.say(f"registered {name}")
                self.asked = float("-inf")  # the list is out of date
            elif node.status == UNREGISTERED:
                problems[name] = "its key was revoked once and stays so; have it make new keys, then renew"
        for node in self.nodes:
            if node.status != UNREGISTERED and node.key not in wanted and node.name not in unsure:
                self.control.unregister(node.id)
                self.say(f"unregistered {node.name or node.id}")
                self.asked = float("-inf")
        for name in self.problems.keys() - problems.keys() - {LINK, RUN}:
            self._solved(name)
        for name, text in problems.items():
            self._problem(name, text)

    def _wanted(self) -> tuple[dict[bytes, str], dict[str, str]]:
        """Node key → site of those that are approved; site → why, of those whose files cannot be read now."""
        wanted: dict[bytes, str] = {}
        unsure: dict[str, str] = {}
        for place in sorted((self.folder / "sites").glob("*")):
            if (place / "revoked.json").exists() or not (place / "approved.json").exists():
                continue
            try:
                request: JoinRequest = approved(place)
            except (MedflError, OSError, ValueError) as error:
                unsure[place.name] = str(error)
            else:
                wanted[pem_of(request.node_key)] = place.name
        return wanted, unsure

    def _attend(self, runs: Sequence[FlowerRun]) -> None:
        request = _json(self.state / REQUEST)
        living = [run for run in runs if run.lives]
        if request and request["id"] != self.attempts.request:
            (self.folder / "run" / OUTCOME).unlink(missing_ok=True)
            self._set(Attempts(request["id"], "requested", since=now()))
            self._solved(RUN)
        if (self.state / STOP).exists():
            self._stop(living)
        elif living:
            self._follow(living)
        elif request and self.attempts.state not in DONE:
            self._settle(request, runs)

    def _stop(self, living: Sequence[FlowerRun]) -> None:
        for run in living:
            self.control.stop(run.id)
            self.say("stopped the run, as asked")
            self.next_try = time.monotonic() + LINGER
        if self.attempts.state not in DONE:
            self._set(replace(self.attempts, state="stopped", since=now()))
        (self.state / REQUEST).unlink(missing_ok=True)
        (self.state / STOP).unlink(missing_ok=True)

    def _follow(self, living: Sequence[FlowerRun]) -> None:
        """Two attempts at once would write the same checkpoints, and no site reviewed another bundle."""
        ours = invitation_of(self.folder).app_digest
        kept = [run for run in living if run.bundle == ours]
        one = next((run for run in kept if run.id == self.attempts.run), kept[-1] if kept else None)
        for run in living:
            if run is not one:
                self.control.stop(run.id)
                self.say(f"stopped run {run.id}: it was not submitted by medfl study run")
        if one and self._died(one):
            self.control.stop(one.id)
            self._set(replace(self.attempts, run=0, state="requested"))
        elif one and (self.attempts.run, self.attempts.state) != (one.id, "running"):
            count = max(1, self.attempts.count)  # it may be one whose submission was not answered
            self._set(replace(self.attempts, run=one.id, state="running", count=count, since=now()))

    def _died(self, run: FlowerRun) -> bool:
        """Whether the ServerApp is gone: its lock is free, its outcome open. Flower sees it a minute later."""
        path = self.folder / "run" / LOCK
        try:
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return file.read() == str(run.id) and not (self.folder / "run" / OUTCOME).exists()
        except OSError:  # none was taken, or it is held
            return False

    def _settle(self, request: Mapping[str, Any], runs: Sequence[FlowerRun]) -> None:
        """No attempt lives: it ended by itself, was stopped, or was killed and is submitted again."""
        last = next((run for run in runs if run.id == self.attempts.run), None)
        outcome = _json(self.folder / "run" / OUTCOME) if self.attempts.count else None
        if outcome and int(outcome["code"]) not in PASSING:
            self._close(str(outcome["state"]), str(outcome["error"]), int(outcome["code"]))
        elif last and last.ended == "stopped":
            self._close("stopped", "", 0)
        elif outcome and self.attempts.state == "running":  # sites may be back, or the disk have room, in a minute
            self.next_try = time.monotonic() + WAIT
            self._set(replace(self.attempts, state="requested", error=str(outcome["error"]), since=now()))
            self.say(f"the attempt {outcome['state']}, the next one is in {WAIT:.0f} s: {outcome['error']}")
        elif time.monotonic() >= self.next_try:
            self._submit(request, last)

    def _submit(self, request: Mapping[str, Any], last: FlowerRun | None) -> None:
        found = _checkpoints(self.folder / "run")
        fruitless = self.attempts.fruitless + 1 if found == self.attempts.checkpoints and self.attempts.count else 0
        outcome = _json(self.folder / "run" / OUTCOME) or {}
        why = str(outcome.get("error", "")) or (last.details if last else "") or "it was killed"
        if fruitless >= FRUITLESS:
            text = (
                f"{fruitless} attempts ended without a new checkpoint ({why}). Read what the last one said: "
                f"FLWR_HOME={self.state}/home flwr log {self.attempts.run} {CONNECTION} --show"
            )
            self._close("gave up", text, int(outcome.get("code", NetworkError.exit_code)))
            return
        if today() > last_day(self.study.until):
            text = f"the study ended on {self.study.until}. Start a new one, or change nothing."
            self._close("failed", text, CredentialError.exit_code)
            return
        invitation = invitation_of(self.folder)
        asked: dict[str, str | int] = {"study": invitation.config, "stages": str(request["stages"])}
        (self.folder / "run" / OUTCOME).unlink(missing_ok=True)
        run = self.control.start(invitation.app, asked | {"sites": self.study.sites, "root": str(self.folder)})
        self.next_try = time.monotonic() + PAUSE * (fruitless + 1)
        count = self.attempts.count + 1
        text = f" ({why}; going on from the last checkpoint)" if count > 1 else ""
        again = replace(
            self.attempts, state="running", run=run, count=count, fruitless=fruitless, checkpoints=found, error=""
        )
        self._set(replace(again, since=now()))
        self.say(f"submitted the run, attempt {count}{text}")

    def _close(self, state: str, error: str, code: int) -> None:
        self._set(replace(self.attempts, state=state, error=error, code=code, since=now()))
        (self.state / REQUEST).unlink(missing_ok=True)
        self.say(f"the run {state}{': ' if error else ''}{error}")

    def _set(self, attempts: Attempts) -> None:
        self.attempts = attempts
        write_bytes(self.state / ATTEMPTS, json.dumps(asdict(attempts), indent=1).encode())

    def _problem(self, what: str, text: str) -> None:
        if self.problems.get(what) != text:
            self.say(f"{what}: {text}")
        self.problems[what] = text

    def _solved(self, what: str) -> None:
        if self.problems.pop(what, None):
            self.say(f"{what}: well again")


def keep(folder: Path, say: Say) -> None:
    """Work until SIGTERM.

    Raises:
        ResourceError: another keeper works on this folder.
        ConfigError: no coordinator's folder.
    """

    signal.signal(signal.SIGTERM, _leave)
    (folder / "state").mkdir(exist_ok=True)
    with claimed(folder / "state" / "keeper.pid"), contextlib.suppress(KeyboardInterrupt):
        keeper = Keeper(folder, Control(folder, StudyFile.read(folder)), say)
        while True:
            started = time.monotonic()
            keeper.tick()
            time.sleep(max(0.0, TICK - (time.monotonic() - started)))


def _leave(*_: object) -> None:
    raise SystemExit(0)


def _attempts(path: Path) -> Attempts:
    found = _json(path)
    return Attempts(**found) if found else Attempts()


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _checkpoints(run: Path) -> str:
    """A mark that changes with every checkpoint and every finished encoder."""
    found = [*run.rglob("round-*/state.json"), *run.rglob("encoder.safetensors"), run / "evaluation.csv"]
    times = [f"{path.relative_to(run)}:{path.stat().st_mtime_ns}" for path in sorted(found) if path.exists()]
    return json.dumps(times)
