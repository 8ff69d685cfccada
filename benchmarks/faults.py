"""Faults, injected into a study of real processes on loopback: nginx, SuperLink, SuperNodes and their apps.

    PYTHONPATH=. python benchmarks/faults.py [--only NAME ...] [--json FILE]

Each fault is one run of three rounds at three sites. The encoder it ends with is compared, by SHA-256, with that of a
simulation: without the fault, or, where a site is lost for good, with the same replies left out. Needs nginx.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from harness import machine, write

from client.app import app as client
from medfl import config
from medfl.carriers import InProcessGrid
from medfl.messages import PRETRAIN, Broadcast
from medfl.run_folder import RunFolder
from server.app import app as server
from tests.deployment.real import Loopback, wait_until
from tests.federation.real import SMALL, STUDY_ID
from tests.federation.small import digest

POINTS = (
    "before_send", "waiting", "after_one_reply", "before_aggregate", "after_aggregate", "during_checkpoint",
    "after_rename", "after_round",
)  # fmt: skip
STUDY = ("stages=[pretrain]", "arms=[federated]", "rounds.count=3", "rounds.deadline=120")
HANG = 420.0  # s after which a run counts as hanging


@dataclass
class Outcome:
    """What became of one injection."""

    fault: str
    as_expected: bool
    recovery: float | None  # s from the fault until the study went on, or was told of it
    whole: float  # s from the request to the end of the run
    remark: str = ""


class Rig:
    """One coordinator and three sites that all faults share; each run starts from an empty run folder."""

    def __init__(self, folder: Path) -> None:
        self.study = Loopback(folder, STUDY, {"MEDFL_LISTEN": "127.0.0.2"})
        self.study.make()
        self.port = json.loads(next(self.study.lead.glob("*.invitation.json")).read_text())["port"]
        self.cuts: list[int] = []  # bytes after which the next uploads are cut off
        self.reference = digest(self.study.simulated(folder / "simulated") / "encoder.safetensors")
        threading.Thread(target=lambda: asyncio.run(self._pass()), daemon=True).start()

    async def _pass(self) -> None:
        """Between the sites and the proxy: passes bytes, and cuts a connection where `cuts` says so."""

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: list[int]) -> None:
            done = 0
            with contextlib.suppress(OSError):
                while block := await reader.read(1 << 16):
                    done += len(block)
                    if most and most[0] < done:
                        most.clear()
                        break
                    writer.write(block)
                    await writer.drain()
            writer.close()

        async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                up_reader, up_writer = await asyncio.open_connection("127.0.0.2", self.port)
            except OSError:
                writer.close()
                return
            await asyncio.gather(pump(reader, up_writer, self.cuts), pump(up_reader, writer, []))

        await asyncio.start_server(both, "127.0.0.1", self.port)
        await asyncio.Event().wait()

    def join(self, *names: str) -> None:
        for name in names or tuple(self.study.places):
            self.study.medfl("site", "join", "--site", self.study.places[name], "--background")

    def up(self, **env: str) -> None:
        self.study.medfl("study", "up", self.study.lead, "--background", env=env)

    def down(self) -> None:
        self.study.medfl("study", "stop", self.study.lead)

    def rounds(self) -> int:
        return max((e["round"] for e in self.study.events() if e["name"] == "round/weight"), default=0)

    def begin(self, **env: str) -> float:
        """Start the coordinator and ask for a run; its time."""
        shutil.rmtree(self.study.lead / "run", ignore_errors=True)
        self.up(**env)
        self.study.medfl("study", "run", self.study.lead)
        return time.monotonic()

    def end(self) -> str:
        """Wait for the end of the run; how it ended."""
        wait_until(
            lambda: self.study.status()["run"]["state"] in ("finished", "failed", "gave up", "stopped"), HANG, "the end"
        )
        return str(self.study.status()["run"]["state"])

    def encoder(self) -> str:
        file = self.study.lead / "run" / "encoder.safetensors"
        return digest(file) if file.exists() else ""

    def without(self, folder: Path, site: str, rounds: set[int]) -> str:
        """The encoder of a simulation that loses a site's replies in some rounds."""
        words = [word for word in SMALL if not word.startswith("run.")]
        given = [
            f"data.root={self.study.folder / 'images'}",
            "data.datalist=all.csv",
            "data.site=site",
            f"run.dir={folder}",
        ]
        study = config.compose([*words, *STUDY, *given, "run.tensorboard=false"])

        class Losing(InProcessGrid):
            def deliver(self, message: Message) -> Message:
                reply = super().deliver(message)
                order = Broadcast.from_record(message.content).order
                lost = order.round in rounds if message.metadata.message_type == PRETRAIN else max(rounds) > 3
                if (
                    not reply.has_error()
                    and lost
                    and reply.content.config_records["identity"]["site"] == site
                    and order.round
                ):
                    return Message(Error(code=5, reason="lost"), reply_to=message)
                return reply

        RunFolder.create(Path(study.run_dir), study.source, resume=True)
        asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": 4}
        server(Losing(client, 4), Context(1, 1, {}, RecordDict(), dict(asked)))
        return digest(folder / "encoder.safetensors")


def children(of: Path, program: str) -> list[int]:
    """Processes whose command or environment names this folder and whose command names this program."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().decode().replace("\0", " ")
            around = (place / "environ").read_bytes().decode(errors="replace")
            if program in words and (str(of) in words or str(of) in around):
                found.append(int(place.name))
    return found


def server_killed(rig: Rig, point: str) -> Outcome:
    mark = rig.study.folder / f"killed-{point}"
    began = rig.begin(MEDFL_KILL_AT=f"{point}:1", MEDFL_KILLED=str(mark))
    wait_until(mark.exists, HANG, f"the ServerApp to reach {point}")
    killed = time.monotonic()
    back = wait_until(lambda: rig.study.status()["run"]["count"] >= 2, HANG, "another attempt")
    state, whole = rig.end(), time.monotonic() - began
    del killed
    rig.down()
    return Outcome(f"ServerApp killed: {point}", state == "finished" and rig.encoder() == rig.reference, back, whole)


def link_killed(rig: Rig) -> Outcome:
    began = rig.begin()
    wait_until(lambda: rig.rounds() >= 1, HANG, "round 1")
    (one,) = children(rig.study.lead, "flower-superlink")
    os.kill(one, signal.SIGKILL)
    back = wait_until(lambda: bool(set(children(rig.study.lead, "flower-superlink")) - {one}), 60, "the SuperLink")
    state, whole = rig.end(), time.monotonic() - began
    rig.down()
    return Outcome("SuperLink killed", state == "finished" and rig.encoder() == rig.reference, back, whole)


def app_killed(rig: Rig) -> Outcome:
    """The app of a site is killed in round 2: the round goes on without it, the next one with it."""
    began, place = rig.begin(), rig.study.places["beta"]
    wait_until(lambda: rig.rounds() >= 1, HANG, "round 1")
    wait_until(lambda: (place / "state" / "busy.json").exists(), HANG, "beta at work")
    os.kill(json.loads((place / "state" / "busy.json").read_text())["pid"], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: rig.rounds() >= 2, HANG, "round 2")
    back, state = time.monotonic() - killed, rig.end()
    whole = time.monotonic() - began
    lost = rig.without(rig.study.folder / "lost-in-2", "beta", {2})
    rig.down()
    return Outcome("ClientApp killed in round 2", state == "finished" and rig.encoder() == lost, back, whole)


def site_gone(rig: Rig) -> Outcome:
    """A site leaves for good after round 1: the run ends with the others."""
    began = rig.begin()
    wait_until(lambda: rig.rounds() >= 1, HANG, "round 1")
    rig.study.medfl("site", "stop", "--site", rig.study.places["gamma"])
    left = time.monotonic()
    wait_until(lambda: rig.rounds() >= 2, HANG, "round 2")
    back, state = time.monotonic() - left, rig.end()
    whole = time.monotonic() - began
    named = {e["site"] for e in rig.study.events() if e["name"] == "refused" and e["round"] >= 2}
    lost = rig.without(rig.study.folder / "gone", "gamma", {2, 3, 4})
    rig.down()
    rig.join("gamma")
    told = rig.encoder() == lost and named == {"gamma"}
    return Outcome("site gone for good", state == "finished" and told, back, whole)


def uploads_cut(rig: Rig) -> Outcome:
    """Connections are cut off six times while sites send: they try again, and nothing partial counts."""
    began = rig.begin()
    for most in (2_000, 60_000, 100_000) * 2:
        rig.cuts.append(most)
    state, whole = rig.end(), time.monotonic() - began
    left, rig.cuts[:] = len(rig.cuts), []
    rig.down()
    return Outcome(
        "connections cut", state == "finished" and rig.encoder() == rig.reference, None, whole, f"{6 - left} cut"
    )


def terminated(rig: Rig) -> Outcome:
    """SIGTERM to the coordinator in round 2: it ends within 10 s, without orphans; `up` goes on."""
    began = rig.begin()
    wait_until(lambda: rig.rounds() >= 1, HANG, "round 1")
    pid = int((rig.study.lead / "state" / "up.pid").read_text().split()[0])
    os.kill(pid, signal.SIGTERM)
    ended = wait_until(lambda: not Path(f"/proc/{pid}").exists(), 15, "the end of the coordinator")
    orphans = [name for name in ("flower-", "nginx", "medfl.cli.main") if children(rig.study.lead, name)]
    rig.up()
    state, whole = rig.end(), time.monotonic() - began
    rig.down()
    good = state == "finished" and rig.encoder() == rig.reference and ended <= 10 and not orphans
    return Outcome("SIGTERM to the coordinator", good, ended, whole, " ".join(orphans))


def no_data(rig: Rig) -> Outcome:
    """A site whose data list is empty is refused when the run starts, by name; the others go on."""
    file = rig.study.folder / "images" / "beta" / "list.csv"
    kept = file.read_bytes()
    file.write_bytes(kept.splitlines(keepends=True)[0])
    began = rig.begin()
    state, whole = rig.end(), time.monotonic() - began
    weighed = {e["site"] for e in rig.study.events() if e["name"] == "round/weight"}
    file.write_bytes(kept)
    rig.down()
    return Outcome("empty data set", state == "finished" and weighed == {"alpha", "gamma"}, None, whole)


FAULTS: dict[str, Callable[[Rig], Outcome]] = {
    **{f"server-{point}": (lambda rig, at=point: server_killed(rig, at)) for point in POINTS},
    "link": link_killed, "app": app_killed, "gone": site_gone, "cut": uploads_cut, "sigterm": terminated,
    "empty": no_data,
}  # fmt: skip


@contextlib.contextmanager
def rig_in(folder: Path) -> Iterator[Rig]:
    rig = Rig(folder)
    try:
        rig.join()
        yield rig
    finally:
        rig.study.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="medfl-faults-") as place, rig_in(Path(place)) as rig:
        print("| fault | as expected | recovery, s | whole run, s | |\n|---|---|---|---|---|", flush=True)
        for name in given.only:
            try:
                outcome = FAULTS[name](rig)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                outcome = Outcome(name, False, None, HANG, str(error).splitlines()[0])
                with contextlib.suppress(AssertionError):
                    rig.down()
            found.append(outcome)
            recovery = "" if outcome.recovery is None else f"{outcome.recovery:.0f}"
            yes = "yes" if outcome.as_expected else "NO"
            print(f"| {outcome.fault} | {yes} | {recovery} | {outcome.whole:.0f} | {outcome.remark} |", flush=True)
    wrong = sum(not outcome.as_expected for outcome in found)
    print(f"\n{len(found)} injections, {wrong} not as expected; study {STUDY_ID.partition('-')[0]}, 3 rounds, 3 sites")
    if given.json:
        write(given.json, {"machine": machine(), "faults": [asdict(outcome) for outcome in found]})


if __name__ == "__main__":
    main()
