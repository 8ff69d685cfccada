"""The site's own keys, and how long the invitation is good for."""

import stat
from pathlib import Path

from medfl.check.finding import Finding
from medfl.check.scope import Scope
from medfl.errors import CredentialError
from medfl.provision.documents import last_day, today
from medfl.provision.keys import load_signing_key, private

SOON = 7  # days before the study's end


def findings(scope: Scope) -> list[Finding]:
    site = scope.site
    secret = {"node key": site.node_key, "signing key": site.signing_key, "secret of the two processes": site.secret}
    return [*(_key(name, path) for name, path in secret.items()), _folder(site.keys), _invitation(scope)]


def _key(name: str, path: Path) -> Finding:
    try:
        load_signing_key(path) if name == "signing key" else private(path)
    except CredentialError as error:
        why = "Whoever reads a private key can speak in this site's name."
        return Finding("keys", name, "fail", str(error), why, "See above; a new key needs a new approval by the lead.")
    return Finding("keys", name, "pass", "Only its owner may read it.")


def _folder(path: Path) -> Finding:
    if path.is_dir() and path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        why, fix = "Others could put another key in its place.", f"chmod 700 {path}"
        return Finding("keys", "folder", "fail", f"Others may write into {path}.", why, fix)
    return Finding("keys", "folder", "pass", "Only its owner may write into it.")


def _invitation(scope: Scope) -> Finding:
    invited = scope.invitation
    if invited is None:
        return Finding("keys", "invitation", "warn", "There is no invitation to a study yet.", counts={"invited": 0})
    days = (last_day(invited.until) - today()).days
    counts, what = {"invited": 1, "days": days}, f"The study runs until {invited.until} ({days} more days)."
    if days > SOON:
        what += " Whether this site is revoked, only the coordinator knows: it says so when the site joins."
        return Finding("keys", "invitation", "pass", what, counts=counts)
    why, fix = "After its last day nothing of the study runs here.", "Ask the study lead for a new invitation."
    return Finding("keys", "invitation", "warn" if days >= 0 else "fail", what, why, fix, counts)
