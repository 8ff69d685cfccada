"""The study lead's commands while a study goes on: start, run, watch, stop."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from medfl.cli.plain import plain
from medfl.cli.study import folder_in, parser
from medfl.deployment import coordinator, keeper, lead, status, wishes
from medfl.deployment.processes import background, running, supervise
from medfl.deployment.processes import stop as stop_process
from medfl.errors import ConfigError, MedflError, NetworkError, PolicyError
from medfl.provision import authority
from medfl.provision.documents import last_day, today
from medfl.provision.study_file import StudyFile

PIDFILE = Path("state") / "up.pid"
SHUT_OUT = 15.0  # s in which a running keeper has put a revoked site out
POLL = 0.5
COLOURS = {"online": "green", "revoked": "dim", "offline": "red", "damaged": "red", "unregistered": "red"}


def up(words: Sequence[str]) -> None:
    """Start the coordinator and keep it running."""
    options = parser("up", "Start the coordinator: proxy, link, apps and keeper; again after a crash.")
    options.add_argument("--background", action="store_true", help="go on when this terminal closes")
    asked = options.parse_intermixed_args(words)
    folder, _ = folder_in(asked.words)
    study = StudyFile.read(folder)
    if today() > last_day(study.until):
        raise PolicyError(f"the study ended on {study.until}. Start a new one.")
    if process := running(folder / PIDFILE):
        print(f"the coordinator runs already (process {process}).\nnext: medfl study status {folder}")
        return
    parts = [coordinator.process(folder, part) for part in coordinator.PARTS]
    coordinator.check_ports(study)
    _warn(folder)
    if asked.background:
        command = [sys.executable, "-m", "medfl.cli.main", "study", "up", str(folder)]
        process = background(command, folder / "state" / "logs" / "up.log", folder / PIDFILE)
        print(f"the coordinator runs in the background (process {process}); sites reach {study.address}:{study.port}.")
        print(f"next: medfl study run {folder}, medfl study status {folder} --watch")
        return
    print(
        f"sites reach {study.address}:{study.port}; the logs are in {folder}/state/logs. End with Ctrl-C.", flush=True
    )
    print(f"next, in another terminal: medfl study run {folder}", flush=True)
    supervise(parts, folder / PIDFILE, say)


def say(text: str) -> None:
    """A line of a log that is followed as it grows."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _warn(folder: Path) -> None:
    if os.geteuid() == 0:
        print("warning: this runs as root. An ordinary account of its own is safer, and enough.")
    days = authority.days_left(folder / "authority" / "server.crt")
    if days < coordinator.WARN_DAYS:
        print(f"warning: the certificate is good for {days:.0f} more days. Run: medfl study renew {folder}")


def run(words: Sequence[str]) -> None:
    """Ask the keeper for a run, or to go on with one."""
    options = parser("run", "Run the study, or go on where it ended.")
    options.add_argument("--stages", default="", help="some of its stages, with commas; default: all")
    options.add_argument("--wait", action="store_true", help="until it ends; the exit code says how")
    asked = options.parse_intermixed_args(words)
    folder, _ = folder_in(asked.words)
    invitation = wishes.invitation_of(folder)
    lead.check_app(folder)
    facts = status.read(folder)
    if facts["run"]["state"] in ("requested", "running") and facts["keeper"]:
        print(f"a run goes on already.\nnext: medfl study status {folder} --watch")
        return
    request = wishes.ask_run(folder, asked.stages)
    print(f"asked for a run of {invitation.name!r}, which waits for {facts['study']['sites']} sites.")
    for site in facts["missing"]:
        print(f"  missing: {site['name']}, {site['why']}")
    if not facts["keeper"]:
        print(f"it starts with the coordinator: medfl study up {folder} --background")
    if asked.wait:
        _wait(folder, request)
        return
    print(f"next: medfl study status {folder} --watch")


def _wait(folder: Path, request: str) -> None:
    """
    Raises:
        MedflError: the run failed, with its exit code.
    """
    shown: list[str] = []
    console = Console(highlight=False, soft_wrap=True)
    while True:
        whole = status.read(folder)
        facts, lines = whole["run"], _run_lines(whole)
        if facts.get("request") == request and facts["state"] in keeper.DONE:
            break
        if facts.get("request") == request and lines != shown:
            console.print(*(line for line in lines if line not in shown), sep="\n")
            shown = lines
        time.sleep(POLL)
    if facts["state"] != "finished":
        failure = type("RunFailed", (MedflError,), {"exit_code": facts["code"] or NetworkError.exit_code})
        raise failure(f"the run {facts['state']}: {facts['error'] or 'as asked'}")
    print(f"the run finished: {folder}/run/report.html")


def show(words: Sequence[str]) -> None:
    """Who is here, who is missing and why, round and time left."""
    options = parser("status", "Who is here, who is missing and why, round, time left.")
    options.add_argument("--watch", action="store_true", help="until Ctrl-C")
    options.add_argument("--json", action="store_true", help="for scripts")
    asked = options.parse_intermixed_args(words)
    folder, _ = folder_in(asked.words)
    if asked.json:
        print(json.dumps(status.read(folder), indent=1))
        return
    console = Console(highlight=False)
    if not asked.watch:
        console.print(page(status.read(folder), folder), soft_wrap=True)
        return
    with Live(console=console, refresh_per_second=2) as live:
        while True:
            live.update(page(status.read(folder), folder))
            time.sleep(2 * POLL)


def page(facts: dict[str, Any], folder: Path) -> Group:
    """The status as people read it."""
    table = Table()
    for name in ("site", "state", "since", "why and what to do"):
        table.add_column(name)
    for site in facts["sites"]:
        colour = COLOURS.get(site["state"], "yellow")
        state = f"[{colour}]{plain(site['state'])}[/]"
        table.add_row(plain(site["name"]), state, status.when(site["since"]), plain(site["why"]))
    study, here = facts["study"], len(facts["here"])
    lines = [plain(f"{study['name']} ({study['id']}) at {facts['address']}, until {study['until']}")]
    if facts["certificate_days"] < coordinator.WARN_DAYS:
        lines.append(f"[yellow]the certificate is good for {facts['certificate_days']:.0f} more days[/]")
    if facts["link"]:
        lines.append(f"[red]{plain(facts['link'])}[/]")
    lines += [
        f"[red]{plain(name)} does not run (ended with {plain(part['ended'])})[/]" for name, part in _down(facts).items()
    ]
    few = f"; {facts['to_approve']} more to approve" if facts["to_approve"] else ""
    lines.append(f"{here} of {study['sites']} sites are here{few}")
    return Group("\n".join(lines), table, "\n".join([*_run_lines(facts), plain(f"next: {_next(facts, folder)}")]))


def _down(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in facts["parts"].items() if part["pid"] is None}


def _run_lines(facts: dict[str, Any]) -> list[str]:
    """What there is to say of the run, in rich's markup."""
    run_, at = facts["run"], facts["progress"]
    again = f", attempt {run_['count']}" if run_.get("count", 0) > 1 else ""
    waiting = run_["state"] == "running" and at["last_event"] < run_["since"]
    lines = [f"run: {'waiting for sites' if waiting else plain(run_['state'])}{again}"]
    if run_.get("error"):
        lines.append(f"[red]{plain(run_['error'])}[/]")
    if run_.get("problem"):
        lines.append(f"[red]{plain(run_['problem'])}[/]")
    if at["stage"] and run_["state"] == "running" and not waiting:
        lines.append(f"stage: {plain(at['stage'])}")
        if at["planned"]:
            left = f", about {status.duration(at['seconds_left'])} left" if at["seconds_left"] is not None else ""
            loss = f", loss {at['loss']:.3f}" if at["loss"] is not None else ""
            lines.append(f"{plain(at['arm'] or 'first arm')}: round {at['round']} of {at['rounds']}{loss}")
            lines.append(f"{at['done']} of {at['planned']} rounds of all arms done{left}")
    return lines + [f"  {plain(text)}" for text in at["told"]]


def _next(facts: dict[str, Any], folder: Path) -> str:
    """What the study lead would do now."""
    state = facts["run"]["state"]
    if not facts["keeper"]:
        return f"medfl study up {folder} --background"
    if facts["to_approve"] and not facts["sites"]:
        return f"medfl study approve {folder} REQUEST"
    if state == "finished":
        return f"open {folder}/run/report.html, then: medfl study stop {folder}"
    if state == "running" and len(facts["here"]) < facts["study"]["sites"]:
        return "call the sites that are missing; the run waits for them before its first round"
    if state in ("running", "requested"):
        return "wait"
    return f"medfl study run {folder}"


def stop(words: Sequence[str]) -> None:
    """End the run and the coordinator."""
    options = parser("stop", "End the run and the coordinator; medfl study up and run go on with it.")
    options.add_argument("--run", action="store_true", help="the run alone")
    asked = options.parse_intermixed_args(words)
    folder, _ = folder_in(asked.words)
    facts = status.read(folder)
    if facts["keeper"]:
        _stop_run(folder)
        print("the run is stopped; its checkpoints stay." if facts["run"]["state"] == "running" else "no run goes on.")
    elif asked.run:
        raise ConfigError(f"no keeper runs, so no run goes on under its eyes. Start it with: medfl study up {folder}")
    if not asked.run:
        found = stop_process(folder / PIDFILE)
        print("the coordinator has ended." if found else "no coordinator of medfl study up runs here.")
    print(f"next: medfl study {'run' if asked.run else 'up'} {folder}")


def _stop_run(folder: Path) -> None:
    """
    Raises:
        NetworkError: the keeper did not take the stop in time.
    """
    wishes.ask_stop(folder)
    last = time.monotonic() + SHUT_OUT
    while (folder / "state" / wishes.STOP).exists():
        if time.monotonic() > last:
            raise NetworkError(f"the run has not stopped within {SHUT_OUT:.0f} s. Read {folder}/state/logs/keeper.log")
        time.sleep(POLL / 2)


def shut_out(folder: Path, site: str) -> str:
    """Wait until the SuperLink refuses a revoked site; says what holds."""
    last = time.monotonic() + SHUT_OUT
    while time.monotonic() < last:
        facts = status.read(folder)
        if not facts["keeper"]:
            return "No keeper runs; it is shut out as soon as the coordinator starts."
        if any(one["name"] == site and one["why"] == status.SHUT_OUT for one in facts["sites"]):
            return "The SuperLink refuses its node from now on."
        time.sleep(POLL)
    return f"The SuperLink has not confirmed it yet: {status.read(folder)['link'] or 'see medfl study status'}"


def serve(words: Sequence[str]) -> None:
    """One part in the foreground."""
    options = parser("serve", f"One part in the foreground: {', '.join(coordinator.PARTS)}.", "PART [DIR]")
    asked = options.parse_intermixed_args(words)
    if not asked.words:
        raise ConfigError(f"got no part, need one of {', '.join(coordinator.PARTS)}. Usage: medfl study serve PART DIR")
    part, (folder, _) = asked.words[0], folder_in(asked.words[1:])
    found = coordinator.process(folder, part)
    if part == "keeper":
        os.environ.update(found.env)
        keeper.keep(coordinator.absolute(folder), say)
        return
    os.execvpe(found.words[0], found.words, found.env)  # noqa: S606
