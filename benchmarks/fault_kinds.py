"""The faults: each is a generator that prepares, yields, injects while the run goes on, yields, and clears up.

The first yield waits for the run to begin; the second gives the seconds until the study went on, and waits for its end.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

from fault_rig import ENROL, HANG, LAST, ROUNDS, Rig, kill, kill_everything, patched, processes

from medfl import checkpoint
from medfl.deployment.processes import running
from tests.deployment.real import SITES, wait_until

POINTS = (
    "before_send", "waiting", "after_one_reply", "before_aggregate", "after_aggregate", "during_checkpoint",
    "after_rename", "after_round",
)  # fmt: skip
DEADLINE = 40.0  # s of a round, where a site is too slow
Act = Generator[float | None, None, None]
Losses = frozenset[tuple[str, int]]
WHOLE_RUN = range(ENROL, LAST + 1)


@dataclass(frozen=True)
class Fault:
    """One kind of fault at one place."""

    kind: str
    name: str
    act: Callable[[Rig], Act]
    may_lose: Losses = frozenset()  # replies that the run may go on without
    must_lose: Losses = frozenset()
    env: dict[str, str] = field(default_factory=dict)  # of the coordinator
    study: tuple[str, ...] = ("rounds.deadline=120",)
    small_disks: bool = False


def _of(site: str, rounds: range | tuple[int, ...]) -> Losses:
    return frozenset((site, number) for number in rounds)


def _again(program: str, of: Path, before: list[int], limit: float = 90.0) -> float:
    """Seconds until a supervisor has started a program again."""
    return wait_until(lambda: bool(set(processes(of, program)) - set(before)), limit, f"{program} again")


def server_killed(rig: Rig) -> Act:
    """SIGKILL to the ServerApp at a named point of round 2; the keeper submits the run again."""
    yield None
    wait_until(Path(rig.env["MEDFL_KILLED"]).exists, HANG, "the ServerApp to reach the point")
    yield wait_until(lambda: int(rig.attempt()["count"]) >= 2, HANG, "another attempt")


def program_ends(program: str, number: signal.Signals) -> Callable[[Rig], Act]:
    """A program of the coordinator gets a signal after round 1; it is started again."""

    def act(rig: Rig) -> Act:
        yield None
        rig.until_round(1)
        before = processes(rig.lead, program)
        assert before, program
        os.kill(before[0], number)
        yield _again(program, rig.lead, before)

    return act


def server_app_ends(rig: Rig) -> Act:
    """SIGTERM to the ServerApp after round 1, as a host that shuts down sends it; the keeper submits the run again."""
    yield None
    rig.until_round(1)
    kill(rig.lead, "flwr-serverapp", signal.SIGTERM)
    yield wait_until(lambda: int(rig.attempt()["count"]) >= 2, HANG, "another attempt")


def coordinator_ends(rig: Rig) -> Act:
    """SIGTERM to the whole coordinator after round 1: it ends within 10 s, without orphans; `up` goes on."""
    yield None
    rig.until_round(1)
    pid = running(rig.lead / "state" / "up.pid") or 0
    os.kill(pid, signal.SIGTERM)
    ended = wait_until(lambda: not Path(f"/proc/{pid}").exists(), 15, "the end of the coordinator")
    assert ended <= 10, f"{ended:.0f} s to the end"
    assert not processes(rig.lead), "orphans"
    rig.up()
    yield ended


def coordinator_killed(damage: Callable[[Path], None] | None = None) -> Callable[[Rig], Act]:
    """SIGKILL to the whole coordinator after round 2, as a power cut does; its newest checkpoint may be damaged."""

    def act(rig: Rig) -> Act:
        yield None
        rig.until_round(2)
        wait_until((rig.run / "checkpoints" / "round-0002").exists, HANG, "its checkpoint")
        kill_everything(rig.lead)
        claim = rig.lead / "state" / "up.pid"  # a process that is ending has no name any more
        wait_until(lambda: not processes(rig.lead) and not running(claim), 30, "the end of all processes")
        newest = checkpoint.saved(rig.run / "checkpoints")[-1]
        if damage:
            damage(newest / "state.safetensors")
        began = time.monotonic()
        rig.up()
        wait_until(lambda: int(rig.attempt()["count"]) >= 2, HANG, "another attempt")
        yield time.monotonic() - began
        told = [event["reason"] for event in rig.study.events() if event["name"] == "checkpoint/damaged"]
        assert bool(damage) == any(newest.name in text for text in told), told

    return act


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def app_ends(number: signal.Signals) -> Callable[[Rig], Act]:
    """A site's process of a request gets a signal in round 2: the round goes on without it, the next one with it."""

    def act(rig: Rig) -> Act:
        yield None
        rig.until_round(1)
        os.kill(rig.until_busy("beta"), number)
        killed = time.monotonic()
        rig.until_round(2)
        yield time.monotonic() - killed

    return act


def site_part_ends(program: str, number: signal.Signals) -> Callable[[Rig], Act]:
    """A program of a site gets a signal after round 1; it is started again."""

    def act(rig: Rig) -> Act:
        yield None
        rig.until_round(1)
        before = processes(rig.places["beta"], program)
        assert before, program
        os.kill(before[0], number)
        yield _again(program, rig.places["beta"], before)

    return act


def warm_killed(rig: Rig) -> Act:
    """SIGKILL to a site's process that is warm, after round 1: requests then start by themselves."""
    yield None
    rig.until_round(1)
    kill(rig.places["beta"], "deployment.warm")
    began = time.monotonic()
    rig.until_round(2)
    yield time.monotonic() - began
    rig.leave("beta")
    rig.join("beta")


def site_killed(rig: Rig) -> Act:
    """SIGKILL to everything at a site in round 2, and back after 5 s."""
    yield None
    rig.until_round(1)
    rig.until_busy("beta")
    kill_everything(rig.places["beta"])
    began = time.monotonic()
    time.sleep(5)
    rig.join("beta")
    name = "joined"
    wait_until(lambda: rig.state() == "finished" or _came_back(rig, "beta"), HANG, name)
    yield time.monotonic() - began


def _came_back(rig: Rig, site: str) -> bool:
    return any(e["site"] == site and e["round"] == ROUNDS for e in rig.study.events() if e["name"] == "round/weight")


def site_leaves(rig: Rig) -> Act:
    """`medfl site stop` after round 1: it ends within 10 s, without orphans; the run ends with the others."""
    yield None
    rig.until_round(1)
    began = time.monotonic()
    rig.leave("gamma")
    ended = time.monotonic() - began
    assert not processes(rig.places["gamma"]), "orphans"
    assert ended < 15, f"{ended:.0f} s to the end"
    rig.until_round(2)
    yield time.monotonic() - began
    rig.join("gamma")


def straggles(seconds: float) -> Callable[[Rig], Act]:
    """The process of a request is stopped in round 2, and goes on some time after the round's deadline."""

    def act(rig: Rig) -> Act:
        yield None
        rig.until_round(1)
        pid = rig.until_busy("beta")
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        rig.until_round(2)
        (closed,) = [e["value"] for e in rig.study.events() if e["name"] == "round/seconds" and e["round"] == 2]
        assert abs(closed - DEADLINE) <= 0.1 * DEADLINE, f"closed after {closed:.0f} s"
        wait_until(lambda: time.monotonic() - began >= seconds or not Path(f"/proc/{pid}").exists(), HANG, "time")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        yield closed

    return act


def network_gone(rig: Rig) -> Act:
    """No site reaches the coordinator for 30 s, from the middle of round 2."""
    yield None
    rig.until_round(1)
    rig.parted = True
    time.sleep(30)
    rig.parted = False
    began = time.monotonic()
    rig.until_round(2)
    yield time.monotonic() - began


def uploads_cut(rig: Rig) -> Act:
    """Connections break off while sites send, at other places of the upload each time."""
    rig.cuts[:] = [700, 3_000, 9_000, 20_000, 27_000, 30_000] * 4
    yield None
    wait_until(lambda: rig.rounds() >= ROUNDS, HANG, "the last round")
    assert len(rig.cuts) < 24, "nothing was cut"
    yield None
    rig.cuts.clear()


PATCHED = {
    "twice": """
import httpx
plain = httpx.Client.send
def send(self, request, **given):
    if request.url.path.startswith(("/v1/fleet/push-", "/v1/fleet/confirm-")):
        plain(self, request, **given)
    return plain(self, request, **given)
httpx.Client.send = send
""",
    "half": """
import sys
if "medfl.deployment.warm" in " ".join(sys.orig_argv):
    import os
    from pathlib import Path
    from flwr.supernode.runtime import run_clientapp
    plain, mark = run_clientapp.push_objects, Path(__file__).with_name("done")
    def push(*given, **named):
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        plain(*given, **named)
    run_clientapp.push_objects = push
""",
    "nan": """
import sys
if "medfl.deployment.warm" in " ".join(sys.orig_argv) and "flower-superexec" in " ".join(sys.orig_argv):
    import torch
    plain = torch.nn.functional.cross_entropy
    torch.nn.functional.cross_entropy = lambda *given, **named: plain(*given, **named) * float("nan")
""",
}


def delivered_twice(rig: Rig) -> Act:
    """Every message that a site sends to the coordinator, and every part of it, is sent twice."""
    with patched(rig, "beta", PATCHED["twice"]):
        yield None
        yield None


def half_sent(rig: Rig) -> Act:
    """A site's process of a request is killed between two parts of its answer: its node waits for the rest."""
    with patched(rig, "beta", PATCHED["half"]) as place:
        yield None
        wait_until((place / "done").exists, HANG, "half an answer")
        began = time.monotonic()
        record = rig.places["beta"] / "audit.jsonl"
        wait_until(lambda: '"what":"node restarted"' in record.read_text(), 200, "the watchdog")
        yield time.monotonic() - began


def nan_loss(rig: Rig) -> Act:
    """Every loss at a site is NaN: it says so, nothing of it counts, the others go on."""
    with patched(rig, "beta", PATCHED["nan"]):
        yield None
        yield None
        lines = (rig.places["beta"] / "audit.jsonl").read_text().splitlines()
        assert any('"code":50' in line for line in lines), "no refusal for divergence in the site's record"


def no_data(rig: Rig) -> Act:
    """A site whose data list is empty is left out from the start, by name."""
    file = rig.study.folder / "images" / "beta" / "list.csv"
    kept = file.read_bytes()
    file.write_bytes(kept.splitlines(keepends=True)[0])
    try:
        yield None
        yield None
    finally:
        file.write_bytes(kept)


def disk_full(of: str) -> Callable[[Rig], Act]:
    """The disk of the coordinator or of a site is full after round 1; with room again, it goes on."""

    def act(rig: Rig) -> Act:
        yield None
        rig.until_round(1)
        filler = (rig.lead if of == "lead" else rig.places[of]) / "filler"
        _fill(filler)
        if of == "lead":
            time.sleep(60)
        else:
            rig.until_round(2)
        filler.unlink()
        began = time.monotonic()
        rig.until_round(3)
        yield time.monotonic() - began

    return act


def _fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as out:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    out.write(b"\0" * size)


def faults() -> dict[str, Fault]:
    """By the name that --only takes."""
    term, killed, runner = signal.SIGTERM, signal.SIGKILL, "flower-superexec --insecure"
    anybody = frozenset((site, number) for site in SITES for number in WHOLE_RUN)
    slow = (f"rounds.deadline={DEADLINE:g}",)
    beta = _of("beta", (2, 3, LAST))
    found = {
        f"server-{point}": Fault("ServerApp killed", point.replace("_", " "), server_killed,
                                 env={"MEDFL_KILL_AT": f"{point}:1"})
        for point in POINTS
    }  # fmt: skip
    for name, program in (("link", "flower-superlink"), ("proxy", "nginx"), ("apps", "flower-superexec"),
                          ("keeper", "serve keeper")):  # fmt: skip
        found[f"{name}-kill"] = Fault("coordinator's programs killed", name, program_ends(program, killed))
        found[f"{name}-term"] = Fault("SIGTERM", f"coordinator's {name}", program_ends(program, term))
    found |= {
        "serverapp-term": Fault("SIGTERM", "ServerApp", server_app_ends),
        "coordinator-term": Fault("SIGTERM", "the whole coordinator", coordinator_ends),
        "power": Fault("coordinator's power cut", "after round 2", coordinator_killed()),
        "truncated": Fault("checkpoint truncated", "after a power cut", coordinator_killed(truncated)),
        "flipped": Fault("checkpoint with a flipped bit", "after a power cut", coordinator_killed(flipped)),
        "app-kill": Fault("ClientApp killed", "in round 2", app_ends(killed), beta, _of("beta", (2,))),
        "half": Fault("ClientApp killed", "while it sends its answer", half_sent, _of("beta", WHOLE_RUN)),
        "app-term": Fault("SIGTERM", "ClientApp", app_ends(term), beta, _of("beta", (2,))),
        "node-kill": Fault("site's programs killed", "node", site_part_ends("flower-supernode", killed), beta),
        "node-term": Fault("SIGTERM", "site's node", site_part_ends("medfl.deployment.tended", term), beta),
        "site-apps-kill": Fault("site's programs killed", "apps", site_part_ends(runner, killed), beta),
        "site-apps-term": Fault("SIGTERM", "site's apps", site_part_ends(runner, term), beta),
        "warm-kill": Fault("site's programs killed", "warm process", warm_killed, beta),
        "site-kill": Fault("site killed and back", "in round 2", site_killed, beta, _of("beta", (2,))),
        "gone": Fault("site gone for good", "after round 1", site_leaves, _of("gamma", (2, 3, LAST)),
                      _of("gamma", (2, 3, LAST))),
        "slow": Fault("straggler", "50 s with a deadline of 40 s", straggles(50), beta, _of("beta", (2,)), study=slow),
        "stuck": Fault("straggler", "three times the deadline", straggles(3 * DEADLINE), beta, _of("beta", (2,)),
                       study=slow),
        "parted": Fault("network gone", "30 s for all sites", network_gone),
        "cut": Fault("connections cut", "24 uploads", uploads_cut, anybody),
        "twice": Fault("duplicate delivery", "all that a site sends", delivered_twice, _of("beta", WHOLE_RUN),
                       study=slow),
        "nan": Fault("NaN at a site", "every loss", nan_loss, _of("beta", (1, 2, 3)), _of("beta", (1, 2, 3))),
        "empty": Fault("empty data set", "at a site", no_data, _of("beta", WHOLE_RUN), _of("beta", WHOLE_RUN)),
        "disk-lead": Fault("disk full", "at the coordinator", disk_full("lead"), anybody, small_disks=True),
        "disk-site": Fault("disk full", "at a site", disk_full("beta"), beta, _of("beta", (2,)), small_disks=True),
    }  # fmt: skip
    return found
