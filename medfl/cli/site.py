"""The commands of a hospital: its settings and keys, what it lets a study do, and what left."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from medfl.cli import site_pages as pages
from medfl.cli.main import asks_help
from medfl.deployment import processes, site_init, site_processes, site_status, site_watch
from medfl.errors import ConfigError, MedflError, PolicyError, ResourceError
from medfl.onsite import approvals
from medfl.onsite.audit import Audit, parse_head
from medfl.onsite.site_file import SiteFile
from medfl.provision.documents import Invitation

HERE = Path("site")
STOP_WITHIN = 10.0  # s


def site(words: Sequence[str]) -> None:
    """A hospital's side of a study: medfl site init | check | review | approve | join | status | stop | egress.

    medfl site init [DIR]                     make the site's folder: settings, keys, request (--yes: no questions)
    medfl site check [--offline]              is this machine ready, are the data usable
    medfl site review INVITATION|STUDY        one page: what runs, what leaves, for how long
    medfl site approve INVITATION --by NAME   let the study run here, with these very bytes
    medfl site join [STUDY] [--background]    connect; Ctrl-C, or stop, ends it
    medfl site status                         connected? what was done last, what comes next
    medfl site stop                           disconnect, at once
    medfl site egress [STUDY]                 what left this site, round by round
    medfl site privacy                        what was spent of the patients' privacy
    medfl site audit verify                   is the record of all this whole
    medfl site serve node|apps [STUDY]        one of the two processes of join, for systemd and containers

    The folder is ./site, the present one if it holds site.yaml, or --site DIR. --json: for scripts. VERB --help: more.
    """
    if asks_help(site, words[:1] or ["--help"]):
        return
    if words[0] not in VERBS:
        raise ConfigError(f"got {words[0]!r}. Usage: medfl site {' | '.join(VERBS)}")
    VERBS[words[0]](words[1:])


def _init(words: Sequence[str]) -> None:
    parser = _parser("init", "Make a site's folder. Nothing is ever overwritten.", folder=False)
    parser.add_argument("dir", nargs="?", type=Path, default=HERE)
    parser.add_argument("--yes", action="store_true", help="ask nothing: take what is given here, or found by looking")
    parser.add_argument("--name", help="of the site: small letters, digits and hyphens")
    parser.add_argument("--data", type=Path, help="folder with the images")
    parser.add_argument("--list", type=Path, help="CSV file with a row per image")
    parser.add_argument("--contact", help="who answers questions, such as an e-mail address")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    asked = parser.parse_args(words)
    if (asked.dir / "site.yaml").exists():
        raise ConfigError(f"{asked.dir} is a site already, and is not overwritten. Choose another folder.")
    made, request = site_init.create(asked.dir, _answers(asked))
    found = made.folder in (HERE.absolute(), Path.cwd())
    print(pages.made(made, request, "" if found else f" --site {shlex.quote(str(asked.dir))}"))


def _answers(asked: argparse.Namespace) -> site_init.Answers:
    """From the options, then by asking, each with what was found as the default."""
    found = site_init.defaults(asked.dir)
    ask = (lambda _, default: default) if asked.yes else _ask
    name = asked.name or ask("Name of this site (a-z, 0-9, -)", found.name)
    data = (asked.data or Path(ask("Folder with the images", str(found.data)))).expanduser().absolute()
    listed = asked.list or Path(ask("CSV file with a row per image", str(site_init.list_in(data))))
    device = asked.device or ask("Device (auto, cpu or cuda)", found.device)
    contact = asked.contact if asked.contact is not None else ask("Contact (e-mail address)", found.contact)
    if not (data / listed).exists() and listed.exists():
        listed = listed.absolute()
    inside = listed.is_relative_to(data)
    return replace(
        found,
        name=name,
        data=data,
        list=listed.relative_to(data) if inside else listed,
        device=device,
        contact=contact,
    )


def _ask(question: str, default: str) -> str:
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        raise ConfigError("nobody answers here. Give --yes with --name, --data, --list, --contact, --device.") from None


def _check(words: Sequence[str]) -> None:
    from medfl.check import command

    command(words)


def _review(words: Sequence[str]) -> None:
    parser = _parser("review", "One page in plain words about a study, for the people who decide.")
    parser.add_argument("study", help="the invitation's file, or the id of an approved study")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    from medfl.deployment.review import review

    here = _site(asked)
    invitation = _invitation(here, asked.study)
    page = review(here, invitation)
    if asked.json:
        prints = {"key": pages.key_of(invitation), "authority": pages.authority_of(invitation)}
        print(json.dumps(page.facts() | {"fingerprints": prints}, indent=1))
    else:
        print(pages.review(here, invitation, page, asked.study, _where(asked)))


def _invitation(here: SiteFile, given: str) -> Invitation:
    if Path(given).is_file():
        return Invitation.read(Path(given))
    try:
        return approvals.approval_of(here, given)[1]
    except PolicyError as error:
        raise ConfigError(f"{given!r} is neither an invitation's file nor an approved study. {error}") from None


def _approve(words: Sequence[str]) -> None:
    parser = _parser("approve", "Let a study run here. Review it first.")
    parser.add_argument("invitation", type=Path)
    parser.add_argument("--by", required=True, help="name of who decides; it is recorded")
    parser.add_argument("--data", help="data set of site.yaml; not needed where there is one")
    parser.add_argument("--replace", action="store_true", help="in place of another invitation to the same study")
    asked = parser.parse_args(words)
    from medfl.deployment.review import review

    here = _site(asked)
    page = review(here, Invitation.read(asked.invitation))
    if page.refused:
        raise PolicyError(f"this site's policy forbids the study {page.name}: {' '.join(page.refused)}")
    approval = approvals.approve(here, asked.invitation, asked.by, asked.data, replace=asked.replace)
    print(
        f"approved: {page.name} ({approval.study_id}) until {approval.until}, with the data set {approval.data!r}, "
        f"by {approval.by}.\nnext: medfl site join {approval.study_id} --background{_where(asked)}"
    )


def _join(words: Sequence[str]) -> None:
    parser = _parser("join", "Connect to an approved study and stay connected.")
    parser.add_argument("study", nargs="?")
    parser.add_argument("--background", action="store_true", help="leave it running; end it with: medfl site stop")
    asked = parser.parse_args(words)
    here = _site(asked)
    study_id = approvals.the_one(here, asked.study)
    folder = here.study(study_id)
    for other in approvals.every(here):
        if process := processes.running(here.study(other.study_id).pid):
            raise ResourceError(f"{other.study_id} is joined already (process {process}). End it with: medfl site stop")
    parts = site_processes.processes(here, study_id)
    site_processes.check_port(here)
    if asked.background:
        again = [sys.executable, "-P", "-m", "medfl.cli.site", "join", study_id, "--site", str(here.folder)]
        process = processes.background(again, folder.logs / "join.log", folder.pid)
        print(f"joined {study_id} in the background (process {process}).\nnext: medfl site status{_where(asked)}")
        return
    print(f"joining {study_id}; Ctrl-C disconnects. What happens is in {folder.logs} and {here.audit}.", flush=True)
    audit = Audit(here.audit)
    audit.write("joined", study=study_id)
    try:
        with site_watch.watched(here, study_id):
            processes.supervise(parts, folder.pid, _say)
    finally:
        audit.write("left", study=study_id)


def _say(text: str) -> None:
    print(text, flush=True)


def _status(words: Sequence[str]) -> None:
    parser = _parser("status", "Is this site connected, what does it do, what comes next.")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    facts = site_status.status(_site(asked), _where(asked))
    print(json.dumps(facts, indent=1) if asked.json else pages.status(facts))


def _stop(words: Sequence[str]) -> None:
    parser = _parser("stop", "Disconnect: within ten seconds nothing of the study runs here any more.")
    parser.add_argument("study", nargs="?", help="not needed: all that is joined ends")
    asked = parser.parse_args(words)
    here = _site(asked)
    wanted = [approval.study_id for approval in approvals.every(here) if asked.study in (None, approval.study_id)]
    ended = [study_id for study_id in wanted if processes.stop(here.study(study_id).pid, seconds=STOP_WITHIN + 2)]
    print(f"stopped: {', '.join(ended)}" if ended else "nothing was joined.")


def _egress(words: Sequence[str]) -> None:
    parser = _parser("egress", "What left this site, round by round, from its own record.")
    parser.add_argument("study", nargs="?")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    facts = site_status.egress(_site(asked), asked.study)
    print(json.dumps(facts, indent=1) if asked.json else pages.egress(facts))


def _privacy(words: Sequence[str]) -> None:
    parser = _parser("privacy", "What was spent of the patients' privacy, by this site's own ledger.")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(words)
    from medfl.privacy.account import account

    here = _site(asked)
    facts = account(here.state, here.site, here.policy.privacy)
    print(json.dumps(facts, indent=1) if asked.json else pages.privacy(facts))


def _audit(words: Sequence[str]) -> None:
    parser = _parser("audit", "Check that no line of the record was changed, removed, added or moved.")
    parser.add_argument("verb", choices=("verify",))
    parser.add_argument("--head", help="NUMBER:HASH as the study lead noted it: finds lines cut off at the end")
    asked = parser.parse_args(words)
    here = _site(asked)
    findings = Audit.verify(here.audit, parse_head(asked.head) if asked.head else None)
    if findings:
        more = f" And {len(findings) - 5} more." if len(findings) > 5 else ""
        raise PolicyError(f"{here.audit} is not whole: {' '.join(findings[:5])}{more} Keep the file, and find out why.")
    print(pages.whole(here.audit))


def _serve(words: Sequence[str]) -> None:
    parser = _parser("serve", "One of the two processes of join. This command becomes the process.")
    parser.add_argument("part", choices=("node", "apps"))
    parser.add_argument("study", nargs="?")
    asked = parser.parse_args(words)
    here = _site(asked)
    study_id = approvals.the_one(here, asked.study)
    command, environment = getattr(site_processes, asked.part)(here, study_id)
    os.execvpe(command[0], command, environment)  # noqa: S606


def _parser(verb: str, text: str, *, folder: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"medfl site {verb}", description=text)
    if folder:
        parser.add_argument("--site", type=Path, help="the site's folder (./site, or the present one)")
    return parser


def _site(asked: argparse.Namespace) -> SiteFile:
    if asked.site is not None:
        return SiteFile.read(asked.site)
    return SiteFile.read(Path() if Path("site.yaml").exists() else HERE)


def _where(asked: argparse.Namespace) -> str:
    """What a next command needs to find the same folder."""
    return f" --site {shlex.quote(str(asked.site))}" if asked.site is not None else ""


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "init": _init,
    "check": _check,
    "review": _review,
    "approve": _approve,
    "join": _join,
    "status": _status,
    "stop": _stop,
    "egress": _egress,
    "privacy": _privacy,
    "audit": _audit,
    "serve": _serve,
}

if __name__ == "__main__":  # the background process of join
    try:
        site(sys.argv[1:])
    except MedflError as error:
        print(f"medfl site: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
