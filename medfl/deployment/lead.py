"""What the study lead does to a coordinator's folder. Every decision about a site touches that site's files alone."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml

from medfl import PROTOCOL, __version__, config
from medfl.deployment.status import invitation_name
from medfl.errors import ConfigError, PolicyError
from medfl.files import write_bytes
from medfl.provision import authority
from medfl.provision.app import build_fab, write_app
from medfl.provision.documents import Invitation, JoinRequest, check_site, last_day, now, registry, today
from medfl.provision.keys import load_signing_key, new_secret, new_signing_key, public_of
from medfl.provision.study_file import StudyFile

RESERVED = ("run.dir", "run.study", "resume")
LONGEST_SLUG = 31


@dataclass(frozen=True)
class Plan:
    """The answers that a new study needs."""

    name: str
    address: str
    port: int
    link_port: int
    sites: int
    until: str
    overrides: Sequence[str] = ()


def create(folder: Path, plan: Plan, passphrase: str) -> StudyFile:
    """Make a coordinator's folder: all of it or nothing.

    Raises:
        ConfigError: the folder exists, or an answer or override cannot be used.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists. Name a new folder, or remove it if nobody was invited to its study.")
    if last_day(plan.until) < today():
        raise ConfigError(f"until: got {plan.until}, need a day to come.")
    if odd := [word for word in plan.overrides if word.partition("=")[0] in RESERVED]:
        raise ConfigError(f"got {odd[0]!r}, which medfl study init sets itself. Leave it out.")
    study = StudyFile(
        name=plan.name,
        id=f"{_slug(plan.name)}-{secrets.token_hex(4)}",
        address=plan.address,
        port=plan.port,
        link_port=plan.link_port,
        link_host="127.0.0.1",
        sites=plan.sites,
        until=plan.until,
        created=now(),
        medfl=__version__,
        protocol=PROTOCOL,
    )
    study.check()
    source = config.compose([*plan.overrides, "run.dir=run", f"run.study={study.id}"]).source
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    draft.mkdir(parents=True, mode=0o700)
    try:
        study.write(draft)
        write_bytes(draft / "config.yaml", source.encode())
        _fill(draft, study, passphrase)
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return study


def _fill(folder: Path, study: StudyFile, passphrase: str) -> None:
    until = date.fromisoformat(study.until)
    place = folder / "authority"
    authority.create(place, name=study.id, names=study.names, until=until, passphrase=passphrase)
    new_signing_key(folder / "keys" / "study")
    new_secret(folder / "keys" / "superexec.secret")
    renew_app(folder)
    for name in ("sites", "state/logs", "run"):
        (folder / name).mkdir(parents=True)


def renew_app(folder: Path) -> None:
    """Write the app of this installation, in place of the one that is there."""
    shutil.rmtree(folder / "app", ignore_errors=True)
    write_app(folder / "app")
    write_bytes(folder / "app.fab", build_fab(folder / "app"))


def invite(folder: Path) -> tuple[Invitation, Path, str]:
    """Write the invitation; returns it, its place, and whether it is "new", "changed" or "unchanged".

    Raises:
        ConfigError: config.yaml cannot be used, or app/ is not what app.fab was built from.
        CredentialError: the study's key cannot be used.
    """
    study = StudyFile.read(folder)
    source = (folder / "config.yaml").read_text()
    _check_source(source, study)
    check_app(folder)
    key = load_signing_key(folder / "keys" / "study")
    path = folder / invitation_name(study)
    before = Invitation.read(path) if path.exists() else None
    invitation = Invitation(
        study_id=study.id,
        name=study.name,
        address=study.address,
        port=study.port,
        until=study.until,
        created=before.created if before else now(),
        medfl=__version__,
        protocol=PROTOCOL,
        config=source,
        authority=(folder / "authority" / "ca.crt").read_text(),
        app=(folder / "app.fab").read_bytes(),
        study_key=public_of(key),
    )
    if invitation != before:
        invitation.write(path, key)
    return invitation, path, "new" if before is None else "unchanged" if invitation == before else "changed"


def _check_source(source: str, study: StudyFile) -> None:
    config.parse(source)
    run = yaml.safe_load(source)["run"]
    if run.get("study") != study.id or run["dir"] != "run":
        raise ConfigError(f"config.yaml: need run.study: {study.id} and run.dir: run. Set both back.")


def check_app(folder: Path) -> None:
    """
    Raises:
        ConfigError: app/, which `flwr run` would send, is not what app.fab holds, which the sites approve.
    """
    if build_fab(folder / "app") != (folder / "app.fab").read_bytes():
        raise ConfigError(
            f"{folder}/app is not what app.fab was built from: a site would refuse it. Undo the change, or write both "
            f"anew with: medfl study invite {folder} --new-app"
        )


def read_request(folder: Path, path: Path) -> JoinRequest:
    """A site's request, if no other site has its keys.

    Raises:
        ConfigError, CredentialError, VersionError: as JoinRequest.read.
        PolicyError: a key of it belongs to another site.
    """
    request = JoinRequest.read(path)
    for place in sorted((folder / "sites").glob("*/request.json")):
        other = JoinRequest.read(place)
        same = other.node_key == request.node_key or other.signing_key == request.signing_key
        if same and other.site != request.site:
            raise PolicyError(
                f"{request.site} has the keys of {other.site}: one key is one site. Have it make its own with: "
                "medfl site init"
            )
    return request


def approve(folder: Path, request: JoinRequest, content: bytes) -> bool:
    """Let a site in; False where this very request was approved before.

    Raises:
        PolicyError: the site has other keys already, or was revoked.
    """
    place = folder / "sites" / request.site
    if (place / "revoked.json").exists():
        raise PolicyError(
            f"{request.site} was revoked. To let it in again it needs new keys: medfl study renew {folder} "
            f"{request.site} REQUEST"
        )
    if known := _known(place):
        if known == request.digest:
            return False
        raise PolicyError(
            f"{request.site} is approved with other keys. If it made new ones: medfl study renew {folder} "
            f"{request.site} REQUEST"
        )
    _write_site(place, request, content)
    return True


def renew_site(folder: Path, site: str, request: JoinRequest, content: bytes) -> None:
    """Replace a site's keys, or let a revoked site in again with new ones; the same again goes on after a crash.

    Raises:
        ConfigError: the request is of another site.
        PolicyError: the site was never approved, or the keys are those it had.
    """
    place = folder / "sites" / site
    if request.site != site:
        raise ConfigError(f"the request is of {request.site}, not of {site}. Give the one that {site} sent.")
    if not (known := _known(place)):
        raise PolicyError(f"{site} was never approved. Run: medfl study approve {folder} REQUEST")
    old = JoinRequest.read(place / "request.json")
    same = request.node_key == old.node_key or request.signing_key == old.signing_key
    undecided = known not in (old.digest, request.digest)  # a crash left `old`, which nobody approved
    if same and not undecided and _revoked(place) in ("", known):
        raise PolicyError(f"{site} sent a key that it had before. Have it make new ones with: medfl site init")
    _write_site(place, request, content)
    (place / "revoked.json").unlink(missing_ok=True)


def revoke(folder: Path, site: str, why: str) -> bool:
    """Shut a site out; False where it was before.

    Raises:
        PolicyError: there is no such site.
    """
    check_site(site)
    place = folder / "sites" / site
    if not _known(place):
        names = ", ".join(registry(folder)) or "none"
        raise PolicyError(f"no site {site} was approved. Approved sites: {names}.")
    if (place / "revoked.json").exists():
        return False
    facts = {"site": site, "request": _known(place), "at": now(), "by": person(), "why": why}
    write_bytes(place / "revoked.json", _json(facts))
    return True


def _write_site(place: Path, request: JoinRequest, content: bytes) -> None:
    """The decision last: without it the request counts for nothing."""
    write_bytes(place / "request.json", content)
    record = {"site": request.site, "request": request.digest, "at": now(), "by": person()}
    write_bytes(place / "approved.json", _json(record))


def _known(place: Path) -> str:
    """The digest of the request that was approved; "": none was."""
    try:
        return str(json.loads((place / "approved.json").read_bytes())["request"])
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError):
        raise ConfigError(f"{place}/approved.json is damaged. Restore it from a backup.") from None


def _revoked(place: Path) -> str:
    """The digest of the request that was revoked; "": none was, or the release that did it noted none."""
    try:
        return str(json.loads((place / "revoked.json").read_bytes()).get("request", ""))
    except FileNotFoundError:
        return ""
    except (ValueError, AttributeError):
        raise ConfigError(f"{place}/revoked.json is damaged. Restore it from a backup.") from None


def person() -> str:
    """The account that decides, as this host knows it."""
    return os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())


def _json(facts: dict[str, str]) -> bytes:
    return json.dumps(facts, indent=1, ensure_ascii=False).encode() + b"\n"


def _slug(name: str) -> str:
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LONGEST_SLUG].strip("-")
    if not text:
        raise ConfigError(f"name: got {name!r}, need at least one letter or digit.")
    return text
