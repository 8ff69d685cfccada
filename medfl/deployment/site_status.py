"""What a site can say of itself: is it connected, what does it do, what has left it, what comes next."""

from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medfl.deployment import processes
from medfl.deployment.programs import answers
from medfl.deployment.site_processes import health
from medfl.deployment.site_watch import running_parts, work
from medfl.errors import PolicyError
from medfl.onsite.approvals import Approval, approval_of, every
from medfl.onsite.audit import Audit, Entry
from medfl.onsite.site_file import SiteFile

SHOWN = 5  # lines of the audit log
TAIL = 20_000  # bytes of a log
SERVED = "running, started by systemd or as a container: see its log"
SIGNS = {  # the newest of these in the node's log says how it stands with the coordinator
    "Starting Flower SuperNode": "connecting",
    "SuperNode ID:": "connected",
    "Connection successful": "connected",
    "Connection attempt failed": "coordinator not reached",
    "handshake error": "coordinator's certificate refused",
    "Failed to activate SuperNode": "not accepted by the coordinator",
}
HINTS = {
    "connecting": "wait a moment, then: medfl site status{where}",
    "coordinator not reached": "check the network: medfl site check{where}",
    "coordinator's certificate refused": "ask the study lead for a new invitation",
    "not accepted by the coordinator": "ask the study lead to approve this site's request; it tries again by itself",
}


def status(site: SiteFile, where: str = "") -> dict[str, Any]:
    """The whole state, as --json prints it; `where` is added to commands that it names."""
    entries = list(Audit(site.audit).entries())
    number, digest = Audit(site.audit).head()
    studies = [_study(site, approval, entries) for approval in every(site)]
    now = work(site)
    return {
        "site": site.site,
        "studies": studies,
        "working_on": None if now is None else asdict(now) | {"since": _time(now.since)},
        "audit": {"head": f"{number}:{digest}", "last": entries[-SHOWN:]},
        "next": _next(site, studies, entries, where),
    }


def _study(site: SiteFile, approval: Approval, entries: Iterable[Entry]) -> dict[str, Any]:
    folder, problem, name = site.study(approval.study_id), "", ""
    try:
        name = approval_of(site, approval.study_id)[1].name
    except PolicyError as error:
        problem = str(error)
    process = processes.running(folder.pid)
    parts = running_parts(folder.pid) if process else {}
    node = parts.get("node", {})
    state = "not joined"
    if process:
        state = connection(folder.logs / "node.log") if node.get("pid") else "restarting"
    elif answers(health(site), seconds=2.0):
        state = SERVED
    sent = [entry for entry in entries if entry.get("what") == "answer" and entry.get("study") == approval.study_id]
    return {
        "study": approval.study_id,
        "name": name,
        "until": approval.until,
        "data": approval.data,
        "approved_by": approval.by,
        "problem": problem,
        "state": state,
        "connected": None if state == SERVED else state == "connected",
        "since": node.get("since"),
        "restarts": node.get("restarts"),
        "process": process,
        "last_answer": {key: sent[-1].get(key) for key in ("t", "stage", "arm", "round")} if sent else None,
        "bytes_sent": sum(int(entry.get("bytes", 0)) for entry in sent),
    }


def connection(log: Path) -> str:
    """How the node stands with the coordinator, by the newest sign in its log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return "connecting"
    place, found = max((text.rfind(sign), state) for sign, state in SIGNS.items())
    whole = len(text) < TAIL // 2
    return found if place >= 0 else "connecting" if whole else "connected"  # rounds alone, and no sign of trouble


def egress(site: SiteFile, study_id: str | None) -> dict[str, Any]:
    """What left, answer by answer, summed by role, and in words; `study_id` None: of all studies."""
    rows: list[dict[str, Any]] = []
    roles: dict[str, int] = {}
    facts: dict[str, list[Any]] = {}
    for entry in Audit(site.audit).entries():
        if entry.get("what") != "answer" or study_id not in (None, entry.get("study")):
            continue
        arrays = [str(line).split() for line in entry.get("arrays", [])]
        for words in arrays:
            roles[words[0]] = roles.get(words[0], 0) + int(words[-1])
        _note(facts, entry.get("facts"))
        keys = {key: entry.get(key) for key in ("study", "stage", "arm", "round")}
        rows.append({"time": entry["t"], **keys, "tensors": len(arrays), "metrics": len(entry.get("metrics", [])),
                     "bytes": int(entry.get("bytes", 0))})  # fmt: skip
    numbers = sorted({name for entry in Audit(site.audit).entries() for name in entry.get("metrics", [])})
    return {
        "answers": rows,
        "bytes": sum(row["bytes"] for row in rows),
        "roles": dict(sorted(roles.items())),
        "metrics": numbers,
        "facts": facts,
    }


def _note(facts: dict[str, list[Any]], told: object) -> None:
    """Add what one answer told in words to name -> the different values so far."""
    for name, value in (told if isinstance(told, dict) else {}).items():  # lines of old releases have names alone
        if value and value not in facts.setdefault(name, []):
            facts[name].append(value)


def _next(site: SiteFile, studies: list[dict[str, Any]], entries: Iterable[Entry], where: str) -> str:
    if not site.request.exists():
        return f"{site.request} is missing; restore it, or make a new folder: medfl site init NEW-FOLDER"
    if not studies:
        return f"send {site.request} to the study lead; when the invitation comes: medfl site review INVITATION{where}"
    first = next((study for study in studies if study["process"]), studies[-1])
    if first["problem"]:
        return f"review and approve the study again: medfl site review INVITATION{where}"
    if not first["process"] and first["state"] != SERVED:
        return f"medfl site join {first['study']} --background{where}"
    if first["connected"] is not False and (refused := _refused(entries)):
        return f"the last request failed here: {refused} Then: medfl site check{where}"
    hint = HINTS.get(
        first["state"], "nothing: the study lead starts the rounds. See what left: medfl site egress{where}"
    )
    return hint.format(where=where)


def _refused(entries: Iterable[Entry]) -> str:
    """Why the last request got no answer, or "" where it got one."""
    done = [entry for entry in entries if entry.get("what") in ("answer", "refused")]
    return str(done[-1].get("reason")) if done and done[-1]["what"] == "refused" else ""


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
