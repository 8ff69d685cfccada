"""What DIR/state/status.json says: who is here, who is missing and why, how far the run is, and what went wrong."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medfl import __version__, config
from medfl.deployment.control import OFFLINE, ONLINE, UNREGISTERED, Node, pem_of
from medfl.deployment.progress import Progress, progress
from medfl.errors import MedflError
from medfl.provision import authority
from medfl.provision.documents import approved
from medfl.provision.study_file import StudyFile
from medfl.run_folder import RunFolder

FILE = "status.json"
SHUT_OUT = "the SuperLink refuses its node"
LINK, RUN = "the link", "the run"  # beside the sites, whose names have no spaces
FRESH = 20.0  # s; an older file means that no keeper runs
WHY = {
    "never connected": "ask it to run: medfl site join",
    "offline": "ask it whether its node runs and reaches this host: medfl site status",
    "unknown": "the SuperLink does not answer",
    "not registered": "the keeper registers it within seconds",
}


def invitation_name(study: StudyFile) -> str:
    """The file that every site gets."""
    return f"{slug(study.id)}.invitation.json"


def slug(study_id: str) -> str:
    """The readable part of a study's id."""
    return study_id.rpartition("-")[0]


class Reader:
    """Reads a coordinator's folder again and again; what did not change is not read twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.study = StudyFile.read(folder)
        self.rounds = _rounds(folder)
        self.seen: tuple[int, int] = (0, 0)
        self.progress = Progress()

    def facts(
        self, nodes: Sequence[Node] | None, attempts: Mapping[str, Any], problems: Mapping[str, str]
    ) -> dict[str, Any]:
        """
        Args:
            nodes: as the SuperLink lists them; None: it was not asked.
            attempts: what became of the run.
            problems: by site, or LINK or RUN.
        """
        study = self.study
        seen = sites(self.folder, None if problems.get(LINK) else nodes, problems)
        here = [site["name"] for site in seen if site["state"] == ONLINE]
        taking = [site for site in seen if site["state"] != "revoked"]
        return {
            "t": datetime.now(UTC).isoformat(timespec="seconds"),
            "medfl": __version__,
            "study": {"id": study.id, "name": study.name, "until": study.until, "sites": study.sites},
            "address": f"{study.address}:{study.port}",
            "certificate_days": round(authority.days_left(self.folder / "authority" / "server.crt"), 1),
            "link": problems.get(LINK, ""),
            "sites": seen,
            "here": here,
            "missing": [
                {"name": site["name"], "why": f"{site['state']}: {site['why']}"}
                for site in taking
                if site["state"] != ONLINE
            ],
            "to_approve": max(0, study.sites - len(taking)),
            "run": dict(attempts) | {"problem": problems.get(RUN, "")},
            "progress": asdict(self._progress()),
        }

    def _progress(self) -> Progress:
        file = self.folder / "run" / "metrics.jsonl"
        try:
            facts = file.stat()
        except FileNotFoundError:
            return Progress()
        if (seen := (facts.st_size, facts.st_mtime_ns)) != self.seen:
            self.seen, self.progress = seen, progress(RunFolder(file.parent).events(), self.rounds)
        return self.progress


def sites(folder: Path, nodes: Sequence[Node] | None, problems: Mapping[str, str]) -> list[dict[str, str]]:
    """One entry for every site that was ever approved: name, state, since, approved, contact, why."""
    found = []
    for place in sorted((folder / "sites").glob("*")):
        if not (place / "approved.json").exists():
            continue
        record = json.loads((place / "approved.json").read_text())
        entry = {"name": place.name, "approved": str(record.get("at", "")), "since": "", "contact": "", "why": ""}
        try:
            request = approved(place)
        except MedflError as error:
            found.append(entry | {"state": "damaged", "why": str(error)})
            continue
        entry["contact"] = request.contact
        node = next((n for n in nodes or () if n.key == pem_of(request.node_key)), None)
        if (place / "revoked.json").exists():
            at = json.loads((place / "revoked.json").read_text()).get("at", "")
            out = nodes is not None and (node is None or node.status == UNREGISTERED)
            found.append(entry | {"state": "revoked", "since": str(at), "why": SHUT_OUT if out else ""})
            continue
        found.append(entry | _state(node, asked=nodes is not None, problem=problems.get(place.name, "")))
    return found


def _state(node: Node | None, *, asked: bool, problem: str) -> dict[str, str]:
    since = ""
    if not asked:
        state = "unknown"
    elif node is None:
        state = "not registered"
    elif node.status == ONLINE:
        state, since = "online", node.online_at
    elif node.status == OFFLINE:
        state, since = "offline", node.offline_at
    elif node.status == UNREGISTERED:
        state = "unregistered"
    else:
        state = "never connected"
    return {"state": state, "since": since, "why": problem or WHY.get(state, "")}


def read(folder: Path) -> dict[str, Any]:
    """The keeper's latest status; without a keeper what the folder itself tells, and "keeper": false.

    Raises:
        ConfigError: no coordinator's folder.
    """
    StudyFile.read(folder)
    try:
        facts: dict[str, Any] = json.loads((folder / "state" / FILE).read_bytes())
        age = (datetime.now(UTC) - datetime.fromisoformat(facts["t"])).total_seconds()
        if age < FRESH:
            return facts | {"keeper": True, "parts": _parts(folder)}
        attempts = facts["run"]
    except (FileNotFoundError, ValueError, KeyError):
        attempts = {"state": "none", "error": "", "count": 0}
    problems = {LINK: "no keeper runs. Start it with: medfl study up"}
    return Reader(folder).facts(None, attempts, problems) | {"keeper": False, "parts": {}}


def _parts(folder: Path) -> dict[str, Any]:
    """What `up` supervises here; empty in containers, where their engine does."""
    try:
        found = json.loads((folder / "state" / "up.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rounds(folder: Path) -> dict[str, int]:
    study = config.parse((folder / "config.yaml").read_text())
    return {"pretrain": study.rounds.count, "finetune": study.finetune.rounds}


def duration(seconds: float) -> str:
    """Such as 3 h 20 min."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{int(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def when(stamp: str) -> str:
    """An ISO time of UTC as people read it here; "" stays."""
    if not stamp:
        return ""
    return re.sub(r":\d\d$", "", datetime.fromisoformat(stamp).astimezone().strftime("%Y-%m-%d %H:%M:%S"))
