"""What the study lead asks of the keeper, as files in DIR/state; and the invitation, which a run must be true to."""

import json
import uuid
from pathlib import Path

from medfl.deployment.status import invitation_name
from medfl.errors import ConfigError
from medfl.files import write_bytes
from medfl.provision.documents import Invitation, now
from medfl.provision.study_file import StudyFile

REQUEST, STOP = "run.request.json", "stop.request"


def ask_run(folder: Path, stages: str) -> str:
    """Leave a request for the keeper; returns its id."""
    request = {"id": uuid.uuid4().hex, "stages": stages, "at": now()}
    write_bytes(folder / "state" / REQUEST, json.dumps(request).encode())
    return str(request["id"])


def ask_stop(folder: Path) -> None:
    """Leave a stop for the keeper, which ends the run and takes the request away."""
    write_bytes(folder / "state" / STOP, b"")


def invitation_of(folder: Path) -> Invitation:
    """What the sites approve, if it is still what this folder holds.

    Raises:
        ConfigError: no invitation was written, or config.yaml or the app was changed after it.
        CredentialError: the study has ended.
    """
    study = StudyFile.read(folder)
    path = folder / invitation_name(study)
    if not path.is_file():
        raise ConfigError(f"no invitation was written yet. Run: medfl study invite {folder}")
    invitation = Invitation.read(path)
    changed = [
        name
        for name, content, invited in (
            ("config.yaml", (folder / "config.yaml").read_bytes(), invitation.config.encode()),
            ("app.fab", (folder / "app.fab").read_bytes(), invitation.app),
        )
        if content != invited
    ]
    if changed:
        raise ConfigError(
            f"{changed[0]} is not the one of {path.name}, which the sites approve. Restore it, or run "
            f"medfl study invite {folder} and let every site approve the new invitation."
        )
    return invitation
