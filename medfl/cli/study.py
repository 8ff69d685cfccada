"""The study lead's commands: making a study, and deciding which sites take part."""

import argparse
import base64
import getpass
import json
import os
import socket
import ssl
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medfl.cli.main import asks_help
from medfl.cli.plain import plain
from medfl.errors import ConfigError, PolicyError
from medfl.provision.documents import JoinRequest, today
from medfl.provision.keys import fingerprint

PASSPHRASE = "MEDFL_CA_PASSPHRASE"  # noqa: S105 - the name of the variable
DEFAULT_DAYS = 365
PORT, LINK_PORT, SITES = 8443, 8000, 2


def study(words: Sequence[str]) -> None:
    """A study among real sites, from the study lead's side.

    medfl study init DIR [--name NAME] [--address HOST] [key=value ...]    make a study: settings, keys, app bundle
    medfl study invite DIR                  write the invitation that every site gets
    medfl study approve DIR REQUEST         let a site in, after comparing its fingerprint by phone
    medfl study list DIR [--json]           who is approved, revoked, connected
    medfl study renew DIR                   a new server certificate; no site needs to do anything
    medfl study renew DIR SITE REQUEST      new keys of one site
    medfl study revoke DIR SITE             shut a site out, at once
    medfl study up DIR [--background]       start the coordinator: proxy, link, apps, keeper
    medfl study run DIR [--wait]            run the study, or go on with it
    medfl study status DIR [--watch] [--json]   who is here, who is missing and why, round, time left
    medfl study stop DIR [--run]            end the run and the coordinator, or the run alone
    medfl study serve PART DIR              one part in the foreground, for containers and systemd

    Without DIR the current folder is meant. One verb's options: medfl study VERB --help
    """
    from medfl.cli import study_run

    deciding = {"init": _init, "invite": _invite, "approve": _approve, "renew": _renew, "revoke": _revoke}
    running = {"up": study_run.up, "run": study_run.run, "stop": study_run.stop, "serve": study_run.serve}
    verbs = deciding | running | {"list": _list, "status": study_run.show}
    if asks_help(study, words[:1] or ["--help"]):
        return
    if words[0] not in verbs:
        raise ConfigError(f"got {words[0]!r}, need one of {', '.join(verbs)}. Try: medfl study --help")
    verbs[words[0]](words[1:])


def parser(verb: str, text: str, places: str = "[DIR]") -> argparse.ArgumentParser:
    """A verb's options; what is not one is in `words`, the study's folder first among them."""
    found = argparse.ArgumentParser(prog=f"medfl study {verb}", description=text)
    found.add_argument("words", nargs="*", metavar=places)
    return found


def folder_in(words: Sequence[str], most: int = 0) -> tuple[Path, list[str]]:
    """The coordinator's folder and the other words; the current folder where none is named.

    Raises:
        ConfigError: no coordinator's folder, or more other words than the verb takes.
    """
    named = bool(words) and (Path(words[0]) / "study.yaml").is_file()
    folder, rest = (Path(words[0]), list(words[1:])) if named else (Path(), list(words))
    if not named and not Path("study.yaml").is_file():
        got = words[0] if words else "the current folder"
        raise ConfigError(f"{got} is no study: it has no study.yaml. Give the folder that medfl study init made.")
    if len(rest) > most:
        raise ConfigError(f"got {rest[most]!r}, which this command does not take. Try: medfl study --help")
    return folder.resolve(), rest


def _init(words: Sequence[str]) -> None:
    from medfl.deployment.lead import Plan, create

    options = parser("init", "Make a study: settings, certificate authority, keys and app bundle.", "DIR|key=value")
    options.add_argument("--name", help="shown to people; default: the folder's name")
    options.add_argument("--address", help="DNS name or IP address where sites reach this host")
    options.add_argument("--port", type=int, default=PORT, help="the only public port (%(default)s)")
    options.add_argument("--link-port", type=int, default=LINK_PORT, help="on this host alone (%(default)s)")
    options.add_argument("--sites", type=int, default=SITES, help="how many sites a run waits for (%(default)s)")
    options.add_argument("--until", help=f"last day, such as 2027-12-31; default: in {DEFAULT_DAYS} days")
    asked = options.parse_intermixed_args(words)
    places = [word for word in asked.words if "=" not in word]
    if len(places) != 1:
        raise ConfigError(f"got {len(places)} folders, need one. Usage: medfl study init DIR [key=value ...]")
    folder = Path(places[0])
    plan = Plan(
        name=asked.name or folder.resolve().name,
        address=asked.address or _address(),
        port=asked.port,
        link_port=asked.link_port,
        sites=asked.sites,
        until=asked.until or (today() + timedelta(days=DEFAULT_DAYS)).isoformat(),
        overrides=[word for word in asked.words if "=" in word],
    )
    if folder.exists():
        raise ConfigError(f"{folder} exists. Name a new folder, or remove it if nobody was invited to its study.")
    made = create(folder, plan, _passphrase(new=True))
    print(
        f"made {folder}: the study {made.name!r} ({made.id}), until {made.until}; a run waits for "
        f"{made.sites} site{'s' * (made.sites > 1)}, which reach this host at {made.address}:{made.port}.\n"
        "Keep a copy of authority/ and keys/ in a safe place. ca.key is needed for renew alone and may be kept "
        "elsewhere.\n"
        f"next: look through {folder}/config.yaml, which is what the sites approve, then: medfl study invite {folder}"
    )


def _address() -> str:
    """Where sites reach this host, asked for where somebody can answer."""
    if sys.stdin.isatty():
        here = socket.getfqdn()
        return input(f"DNS name or IP address where sites reach this host [{here}]: ").strip() or here
    print("note: no --address was given, so only this machine can take part (localhost).")
    return "localhost"


def _passphrase(*, new: bool) -> str:
    """The passphrase of the certificate authority's key: from the environment, or asked for."""
    if given := os.environ.get(PASSPHRASE):
        return given
    if not sys.stdin.isatty():
        raise ConfigError(f"no passphrase for the authority's key: set {PASSPHRASE}, or run this in a terminal.")
    first = getpass.getpass("passphrase for the authority's key (8 characters or more): ")
    if new and getpass.getpass("the same again: ") != first:
        raise ConfigError("the two passphrases differ. Try again.")
    return first


def _invite(words: Sequence[str]) -> None:
    from medfl.deployment import lead
    from medfl.provision.app import app_digest

    options = parser("invite", "Write the invitation that every site gets; it holds no secret.")
    options.add_argument("--new-app", action="store_true", help="with the app of this installation, after an upgrade")
    asked = options.parse_intermixed_args(words)
    folder, _ = folder_in(asked.words)
    if asked.new_app:
        lead.renew_app(folder)
    invitation, path, state = lead.invite(folder)
    if invitation.app_digest != app_digest():
        print("note: the app is of another release than this installation's. To change that: add --new-app")
    size = path.stat().st_size / 1e6
    authority = fingerprint(ssl.PEM_cert_to_DER_cert(invitation.authority))
    verb = "unchanged:" if state == "unchanged" else "wrote"
    print(f"{verb} {path} ({size:.1f} MB, no secrets). Sites compare by phone:")
    print(f"  study lead's key  {fingerprint(base64.b64decode(invitation.study_key))}")
    print(f"  authority         {authority}")
    if state == "changed":
        print("Sites that approved an earlier invitation have to review and approve this one.")
    print(f"next: send it to every site; for each request that comes back: medfl study approve {folder} REQUEST")


def _approve(words: Sequence[str]) -> None:
    from medfl.deployment import lead

    options = parser("approve", "Let a site in: register its key.", "[DIR] REQUEST")
    options.add_argument("--yes", action="store_true", help="the fingerprint was compared already")
    asked = options.parse_intermixed_args(words)
    folder, paths = folder_in(asked.words, most=1)
    if not paths:
        raise ConfigError(f"got no request. Usage: medfl study approve {folder} REQUEST")
    request = lead.read_request(folder, Path(paths[0]))
    _compare(request, asked.yes)
    new = lead.approve(folder, request, Path(paths[0]).read_bytes())
    print(f"{request.site} is {'approved' if new else 'approved already'}.")
    print(f"next: the other requests, then: medfl study up {folder} --background   (who is here: medfl study list)")


def _compare(request: JoinRequest, sure: bool) -> None:
    """Show whose keys these are; without an answer from a terminal the command itself is the decision."""
    print(f"site {request.site}, contact {request.contact}, made with medfl {request.medfl} on {request.created}")
    print(f"fingerprint of the request, to compare by phone:  {fingerprint(request.canonical())}")
    if not sure and sys.stdin.isatty() and input("the site reads out the same? [y/N] ").strip().lower() != "y":
        raise PolicyError(f"{request.site} was not approved. Ask it for its request again over another way.")


def _renew(words: Sequence[str]) -> None:
    from medfl.deployment import lead
    from medfl.provision import authority
    from medfl.provision.study_file import StudyFile

    options = parser("renew", "A new server certificate, or new keys of one site.", "[DIR] [SITE REQUEST]")
    options.add_argument("--yes", action="store_true", help="the fingerprint was compared already")
    asked = options.parse_intermixed_args(words)
    folder, rest = folder_in(asked.words, most=2)
    if len(rest) == 1:
        raise ConfigError(f"got no request of {rest[0]}. Usage: medfl study renew {folder} {rest[0]} REQUEST")
    if rest:
        request = lead.read_request(folder, Path(rest[1]))
        _compare(request, asked.yes)
        lead.renew_site(folder, rest[0], request, Path(rest[1]).read_bytes())
        print(f"{rest[0]} has new keys; its old ones are refused as soon as the keeper sees it.")
        return
    place = folder / "authority"
    authority.renew(place, names=StudyFile.read(folder).names, passphrase=_passphrase(new=False))
    print(
        f"renewed the certificate: good for {authority.days_left(place / 'server.crt'):.0f} days. Sites need nothing.\n"
        f"next: start the coordinator again, so that it uses it: medfl study stop {folder}, medfl study up {folder}"
    )


def _revoke(words: Sequence[str]) -> None:
    from medfl.cli.study_run import shut_out
    from medfl.deployment import lead

    options = parser("revoke", "Shut a site out, at once.", "[DIR] SITE")
    options.add_argument("--why", default="", help="kept in the site's record")
    asked = options.parse_intermixed_args(words)
    folder, names = folder_in(asked.words, most=1)
    if not names:
        raise ConfigError(f"got no site. Usage: medfl study revoke {folder} SITE")
    new = lead.revoke(folder, names[0], asked.why)
    print(f"{names[0]} {'is revoked' if new else 'was revoked before'}. {shut_out(folder, names[0])}")
    print(f"To let it in again it needs new keys: medfl study renew {folder} {names[0]} REQUEST")


def _list(words: Sequence[str]) -> None:
    from medfl.deployment import status

    options = parser("list", "Who is approved, revoked, connected.")
    options.add_argument("--json", action="store_true", help="for scripts")
    asked = options.parse_intermixed_args(words)
    folder, _ = folder_in(asked.words)
    sites = status.read(folder)["sites"]
    for site in sites:
        path = folder / "sites" / site["name"] / "request.json"
        site["fingerprint"] = "" if site["state"] == "damaged" else fingerprint(JoinRequest.read(path).canonical())
    if asked.json:
        print(json.dumps(sites, indent=1))
        return
    table = Table()
    for name in ("site", "state", "since", "approved", "contact", "fingerprint"):
        table.add_column(name, no_wrap=name == "site")
    for site in sites:
        times = (status.when(site["since"]), status.when(site["approved"]))
        cells = (site["name"], site["state"], *times, site["contact"], site["fingerprint"])
        table.add_row(*map(plain, cells))
    Console(highlight=False).print(table if sites else "no site is approved yet")
    print(f"next: medfl study {'status' if sites else 'approve'} {folder}{'' if sites else ' REQUEST'}")
