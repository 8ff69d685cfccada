"""What this site approved: one study at a time, with the very bytes that were reviewed.

An approval is a folder: the invitation as it came, its app bundle unpacked and read-only, and who said yes. All of it
is compared with the approval each time it is used.
"""

import json
import shutil
import stat
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import yaml

from medfl import config
from medfl.errors import ConfigError, MedflError, PolicyError
from medfl.onsite import policy
from medfl.onsite.audit import Audit
from medfl.onsite.site_file import STUDY_ID, SiteFile, StudyFolder
from medfl.provision.app import contents
from medfl.provision.documents import Invitation, check_line, last_day, today


@dataclass(frozen=True)
class Approval:
    """One person's yes to one invitation."""

    study_id: str
    invitation: str  # SHA-256 of the invitation,
    config: str  # of the study in it,
    app: str  # and of the app bundle in it
    data: str  # the data set of site.yaml that the study may use
    by: str
    at: str  # UTC
    until: str  # the last day


def approval_of(site: SiteFile, study_id: str) -> tuple[Approval, Invitation]:
    """What this site approved of a study.

    Raises:
        PolicyError: nothing, it ended, or a file of it is not as it was approved.
    """
    folder = _known(site, study_id)
    approval = _read(folder.approval)
    try:
        if today() > last_day(approval.until):
            raise PolicyError(f"its approval ended on {approval.until}")
        invitation = Invitation.read(folder.invitation)
        same = (invitation.study_id, invitation.digest, invitation.config_digest, invitation.app_digest)
        if same != (study_id, approval.invitation, approval.config, approval.app):
            raise PolicyError("the invitation is not the approved one")
        if folder.authority.read_text() != invitation.authority:
            raise PolicyError(f"{folder.authority} was changed")
        _check_installed(app_folder(folder), contents(invitation.app))
    except (MedflError, OSError, UnicodeDecodeError) as error:
        text = str(error).rstrip(".")
        raise PolicyError(f"study {study_id}: {text}. Review it and approve it again, or leave the study.") from None
    return approval, invitation


def approve(site: SiteFile, invitation: Path, by: str, data: str | None = None, *, replace: bool = False) -> Approval:
    """Approve the study of an invitation file, and install its app bundle read-only.

    To approve the same again changes nothing.

    Args:
        by: who decided.
        data: a data set of site.yaml; None: the only one.
        replace: put this invitation in place of another one of the same study.

    Raises:
        ConfigError: a damaged invitation, no such data set, or no name.
        CredentialError: the study ended.
        PolicyError: the site's policy forbids it, or another invitation of this study was approved.
    """
    invited = Invitation.read(invitation)
    check_by(by)
    name = data_of(site, data)
    if found := forbidden(site, invited):
        raise PolicyError(f"this site's policy forbids the study {invited.name}: {' '.join(found)}")
    folder = site.study(invited.study_id)
    if folder.approval.exists():
        before = _read(folder.approval)
        if before.invitation != invited.digest and not replace:
            raise PolicyError(
                f"another invitation to the study {invited.study_id} was approved by {before.by} on {before.at[:10]}. "
                "If the study lead did change it: review the new one, then approve it with --replace."
            )
        if (before.invitation, before.by, before.data) == (invited.digest, by, name) and _holds(site, before.study_id):
            return before
    digests = (invited.digest, invited.config_digest, invited.app_digest)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    approval = Approval(invited.study_id, *digests, name, by, now, invited.until)
    _install(folder, invitation, invited)
    Audit(site.audit).write("approved", study=approval.study_id, by=by, data=name, until=approval.until,
                            invitation=digests[0], config=digests[1], app=digests[2])  # fmt: skip
    _write(folder.approval, json.dumps(asdict(approval), indent=1).encode())
    return approval


def every(site: SiteFile) -> list[Approval]:
    """All approvals that can be read, by study; those that ended too."""
    return [_read(path) for path in sorted(site.studies.glob("*/approval.json"))]


def the_one(site: SiteFile, study_id: str | None) -> str:
    """The id of the study that is meant; None: the only approved one.

    Raises:
        PolicyError: none is approved, several are, or not this one.
    """
    if study_id is not None:
        return _known(site, study_id).path.name
    found = [approval.study_id for approval in every(site)]
    if len(found) != 1:
        state = f"{len(found)} studies are approved here ({', '.join(found)}). Name one." if found else _NONE
        raise PolicyError(state)
    return found[0]


def forbidden(site: SiteFile, invitation: Invitation) -> list[str]:
    """Why the site's policy forbids the study; empty: it allows it.

    Raises:
        ConfigError: the study cannot be read.
    """
    config.parse(invitation.config)
    return policy.refusals(yaml.safe_load(invitation.config), site.policy)


def data_of(site: SiteFile, name: str | None) -> str:
    """The data set that is meant; None: the only one.

    Raises:
        ConfigError: no such data set, or several.
    """
    if name is None:
        if len(site.data) != 1:
            raise ConfigError(f"site.yaml has {len(site.data)} data sets: {', '.join(site.data)}. Choose with --data.")
        return next(iter(site.data))
    site.data_set(name)
    return name


def check_by(by: str) -> None:
    """
    Raises:
        ConfigError: not a name on one line.
    """
    if not by.strip():
        raise ConfigError('by: got nothing, need the name of who decides, such as --by "Dr A. Smith".')
    check_line("by", by)


def app_folder(folder: StudyFolder) -> Path:
    """Where the approved bundle was unpacked.

    Raises:
        PolicyError: not exactly one.
    """
    found = sorted(folder.apps.iterdir()) if folder.apps.is_dir() else []
    if len(found) != 1 or found[0].is_symlink() or not found[0].is_dir():
        raise PolicyError(f"{folder.apps} holds {len(found)} apps, need exactly the approved one")
    return found[0]


_NONE = "no study is approved here. Next: medfl site review INVITATION, then medfl site approve INVITATION --by NAME."


def _known(site: SiteFile, study_id: str) -> StudyFolder:
    if not STUDY_ID.fullmatch(study_id) or not site.study(study_id).approval.is_file():
        have = ", ".join(approval.study_id for approval in every(site))
        raise PolicyError(f"study {study_id[:80]!r} is not approved here. {f'Approved: {have}.' if have else _NONE}")
    return site.study(study_id)


def _read(path: Path) -> Approval:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.keys() != {entry.name for entry in fields(Approval)} or not all(type(v) is str for v in tree.values()):
            raise ValueError("unknown or missing keys")
        return Approval(**tree)
    except (OSError, ValueError, AttributeError) as error:
        raise PolicyError(f"{path} cannot be read ({error}). Approve the study again.") from None


def _holds(site: SiteFile, study_id: str) -> bool:
    try:
        approval_of(site, study_id)
    except PolicyError:
        return False
    return True


def _check_installed(folder: Path, wanted: dict[str, bytes]) -> None:
    """Every file of the bundle, byte for byte, and nothing else."""
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if odd := sorted(wanted.keys() ^ found.keys()):
        raise PolicyError(f"{folder / odd[0]} was {'removed' if odd[0] in wanted else 'added'}")
    for name, content in wanted.items():
        if found[name].is_symlink() or found[name].read_bytes() != content:
            raise PolicyError(f"{found[name]} was changed")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _install(folder: StudyFolder, source: Path, invited: Invitation) -> None:
    from medfl.flower_compat import install_bundle

    folder.approval.unlink(missing_ok=True)
    _discard(folder.apps)
    for place in (folder.path, folder.home, folder.bin, folder.logs):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = source.read_bytes()
    if Invitation.parse(content).digest != invited.digest:
        raise PolicyError(f"{source} changed while it was read. Review it again.")
    _write(folder.invitation, content)
    _write(folder.authority, invited.authority.encode())
    with redirect_stdout(StringIO()):  # Flower says where it went
        install_bundle(invited.app, folder.home)
    _check_installed(app_folder(folder), contents(invited.app))
    for path in [*folder.apps.rglob("*"), folder.apps]:
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))


def _discard(folder: Path) -> None:
    """Remove a folder that was made read-only."""
    if not folder.exists():
        return
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(stat.S_IRWXU)
    shutil.rmtree(folder)


def _write(path: Path, content: bytes) -> None:
    from medfl.files import write_bytes  # brings torch along, which readers do without

    write_bytes(path, content)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
