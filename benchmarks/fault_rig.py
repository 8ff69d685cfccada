"""A coordinator and three sites as real processes on loopback, into which faults are injected."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from client.app import app as client
from medfl import config
from medfl.carriers import InProcessGrid
from medfl.deployment import status
from medfl.deployment.processes import running
from medfl.messages import DESCRIBE, REFRESH, TRAIN, Broadcast
from medfl.provision.study_file import StudyFile
from medfl.run_folder import RunFolder
from server.app import app as server
from tests.deployment.real import SITES, Loopback, wait_until
from tests.federation.real import SMALL
from tests.federation.small import digest

HERE = Path(__file__).resolve().parent
ROUNDS = 3
STUDY = ("stages=[pretrain]", "arms=[federated]")
HANG = 420.0  # s after which a run counts as hanging
ENROL, LAST = 0, ROUNDS + 1  # as rounds: who takes part, and the refresh pass under the final weights
NEVER = -1  # keys and shares of a masked sum: their loss is another kind of fault
Lost = frozenset[tuple[str, int]]  # site and round without whose reply the run went on


class Rig:
    """All faults of a group share one; each run starts from an empty run folder."""

    def __init__(self, folder: Path, overrides: Iterable[str] = (), *, rounds: int = ROUNDS) -> None:
        self.overrides, self.last = (*STUDY, f"rounds.count={rounds}", *overrides), rounds + 1
        self.study = Loopback(folder, self.overrides, {"MEDFL_LISTEN": "127.0.0.2"})
        self.study.make()
        self.lead, self.places = self.study.lead, self.study.places
        self.run = self.lead / "run"
        facts = StudyFile.read(self.lead)
        self.port, self.link_port = facts.port, facts.link_port
        self.cuts: list[int] = []  # bytes after which the next uploads are cut off
        self.env: dict[str, str] = {}  # of the coordinator
        self.parted = False  # whether nobody reaches the coordinator
        self.simulated: dict[Lost, str] = {}
        threading.Thread(target=lambda: asyncio.run(self._pass()), daemon=True).start()

    async def _pass(self) -> None:
        """Between the sites and the proxy: passes bytes, and cuts connections where `cuts` and `parted` say so."""

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
            done = 0
            with contextlib.suppress(OSError):
                while (block := await reader.read(1 << 16)) and not self.parted:
                    done += len(block)
                    if up and self.cuts and self.cuts[0] < done:
                        self.cuts.pop(0)
                        break
                    writer.write(block)
                    await writer.drain()
            writer.transport.abort()

        async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                up_reader, up_writer = await asyncio.open_connection("127.0.0.2", self.port)
            except OSError:
                writer.transport.abort()
                return
            await asyncio.gather(pump(reader, up_writer, up=True), pump(up_reader, writer, up=False))

        await asyncio.start_server(both, "127.0.0.1", self.port)
        await asyncio.Event().wait()

    def join(self, *names: str, **env: str) -> None:
        for name in names or SITES:
            self.study.medfl("site", "join", "--site", self.places[name], "--background", env=env)

    def leave(self, *names: str) -> None:
        for name in names:
            self.study.medfl("site", "stop", "--site", self.places[name])

    def up(self, **env: str) -> None:
        """Start the coordinator, if it does not run."""
        if not running(self.lead / "state" / "up.pid"):
            self.study.medfl("study", "up", self.lead, "--background", env=env)

    def down(self) -> None:
        if running(self.lead / "state" / "up.pid"):
            self.study.medfl("study", "stop", self.lead)

    def begin(self, **env: str) -> float:
        """Ask for a run, with the coordinator started anew where it needs other variables; its time."""
        for path in self.run.iterdir() if self.run.exists() else ():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        if env != self.env or not running(self.lead / "state" / "up.pid"):
            self.down()
            self.up(**env)
            self.env = env
        before, began = self.attempt().get("request"), time.monotonic()
        self.study.medfl("study", "run", self.lead)
        wait_until(lambda: self.attempt().get("request") != before, HANG, "the keeper to take the request")
        return began

    def attempt(self) -> dict[str, Any]:
        """The run as the keeper sees it."""
        return dict(status.read(self.lead)["run"])

    def state(self) -> str:
        return str(self.attempt()["state"])

    def end(self, limit: float = HANG) -> str:
        """Wait for the end of the run; how it ended."""
        wait_until(lambda: self.state() in ("finished", "failed", "gave up", "stopped"), limit, "the end of the run")
        return self.state()

    def rounds(self) -> int:
        return max((e["round"] for e in self.study.events() if e["name"] == "round/weight"), default=0)

    def until_round(self, number: int) -> None:
        """Wait for the end of a round."""
        wait_until(lambda: self.rounds() >= number, HANG, f"round {number}")

    def until_busy(self, name: str) -> int:
        """Wait until a site works on a request; the process that does."""
        file = self.places[name] / "state" / "busy.json"
        wait_until(file.exists, HANG, f"{name} at work")
        return int(json.loads(file.read_text())["pid"])

    def encoder(self) -> str:
        file = self.run / "encoder.safetensors"
        return digest(file) if file.exists() else ""

    def lost(self) -> Lost:
        """What the run itself says of replies that it went on without."""
        events = self.study.events()
        there = {(e["site"], e["round"]) for e in events if e["name"] == "round/weight"}
        there |= {
            (e["site"], self.last) for e in events if e["stage"] == "refresh" and e["name"].startswith("monitor/")
        }
        there |= {(site, ENROL) for site, number in there if number < self.last}  # also one that joined later
        there |= {(e["site"], ENROL) for e in events if e["stage"] == "enrol"}
        return frozenset((name, number) for name in SITES for number in range(self.last + 1)) - there

    def expected(self, lost: Lost) -> str:
        """The encoder of a simulation that loses the same replies."""
        if lost not in self.simulated:
            self.simulated[lost] = self._simulate(lost, self.study.folder / f"simulated-{len(self.simulated)}")
        return self.simulated[lost]

    def _simulate(self, lost: Lost, folder: Path) -> str:
        last, words = self.last, [word for word in SMALL if not word.startswith("run.")]
        images = self.study.folder / "images"
        given = [f"data.root={images}", "data.datalist=all.csv", "data.site=site", f"run.dir={folder}"]
        study = config.compose([*words, *self.overrides, *given, "run.tensorboard=false"])

        class Losing(InProcessGrid):
            def deliver(self, message: Message) -> Message:
                reply, kind = super().deliver(message), message.metadata.message_type
                number = Broadcast.from_record(message.content).order.round
                place = {DESCRIBE: ENROL, TRAIN["pretrain"]: number, REFRESH: last}.get(kind, NEVER)
                if not reply.has_error() and (reply.content.config_records["identity"]["site"], place) in lost:
                    return Message(Error(code=5, reason="lost"), reply_to=message)
                return reply

        RunFolder.create(Path(study.run_dir), study.source, resume=True)
        asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": len(SITES) + 1}
        server(Losing(client, len(SITES) + 1), Context(1, 1, {}, RecordDict(), dict(asked)))
        return digest(folder / "encoder.safetensors")


@contextlib.contextmanager
def patched(rig: Rig, site: str, text: str) -> Iterator[Path]:
    """A site's Python runs some lines first; the folder that they are in."""
    place = rig.study.folder / f"patch-{site}"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(text)
    rig.leave(site)
    rig.join(site, PYTHONPATH=os.pathsep.join(map(str, (place, HERE, HERE.parent))))
    try:
        yield place
    finally:
        rig.leave(site)
        rig.join(site)


def processes(of: Path, program: str = "") -> list[int]:
    """Processes whose command or environment names this folder and whose command names this program."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            around = (place / "environ").read_bytes().decode(errors="replace")
            if program in words and int(place.name) != os.getpid() and (str(of) in words or str(of) in around):
                found.append(int(place.name))
    return sorted(found)


def kill(of: Path, program: str = "", number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to them all."""
    for pid in processes(of, program):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_everything(of: Path) -> None:
    """SIGKILL to all processes of a folder's programs, at once: also to those that have changed their names."""
    sessions = {_session(pid) for pid in processes(of)} - {_session(os.getpid()), 0}
    for pid in [int(place.name) for place in Path("/proc").glob("[0-9]*")]:
        if _session(pid) in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _session(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError):
        return 0
