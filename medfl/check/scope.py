"""What is checked: a site's folder, one of its data sets, and the study that would use it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medfl import config
from medfl.admission import localized
from medfl.check.finding import NOTHING, Finding
from medfl.errors import ConfigError, MedflError
from medfl.onsite import approvals
from medfl.onsite.approvals import Approval
from medfl.onsite.site_file import SiteFile
from medfl.provision.documents import Invitation
from medfl.study import Node, Study

SHARED = ("spatial_dims", "channels", "size", "depth")  # keys of a data source that the encoder follows
ALIKE = (*SHARED, "spacing", "fit", "normalize", "window", "classes", "regions", "modalities")  # at all sites


@dataclass(frozen=True)
class Scope:
    """The study as this site would run it, and what is known of its approval."""

    site: SiteFile
    data: str  # name of the data set
    study: Study
    invitation: Invitation | None
    approval: Approval | None
    offline: bool
    findings: tuple[Finding, ...] = field(default=())  # of the group "policy"


def scope(folder: Path, *, study: str | None, data: str | None, offline: bool) -> Scope:
    """
    Args:
        study: id of an approved study, or an invitation file; None: the approved one, else the default study.
        data: name of a data set of site.yaml; None: the approved one, or the only one.

    Raises:
        ConfigError: no site folder, no such data set, or an invitation that cannot be read.
        PolicyError: `study` is not approved here, or several are.
    """
    site = SiteFile.read(folder)
    if not site.data:
        raise ConfigError(f"{site.path}: has no data set. Add one under data, with root and datalist.")
    if study is not None and Path(study).is_file():
        return _invited(site, Path(study), data, offline)
    if study is None and not approvals.every(site):
        return _default(site, data, offline)
    name = approvals.the_one(site, study)
    try:
        approval, invitation = approvals.approval_of(site, name)
    except MedflError as error:
        why = "What is not exactly as it was approved never runs."
        spoilt = Finding("policy", "approval", "fail", str(error), why, "Review the study and approve it again.")
        return _default(site, data, offline, spoilt)
    chosen = Approval(**{**vars(approval), "data": data or approval.data})
    what = f"{name} is approved until {approval.until}, for the data set {approval.data}."
    approved = Finding("policy", "approval", "pass", what, counts={"approved": 1})
    local = config.parse(localized(yaml.safe_load(invitation.config), site, chosen))
    return Scope(
        site, chosen.data, local, invitation, approval, offline, (approved, *_rules(site, invitation, chosen.data))
    )


def _invited(site: SiteFile, path: Path, data: str | None, offline: bool) -> Scope:
    invitation = Invitation.read(path)
    name = approvals.data_of(site, data)
    local = localized(yaml.safe_load(invitation.config), site, _as_if(name, invitation))
    open_ = Finding(
        "policy", "approval", "warn", f"{invitation.study_id} is not approved here yet.",
        "Nothing runs at this site before someone approves it.", f"medfl site review {path}, then medfl site approve",
        {"approved": 0},
    )  # fmt: skip
    return Scope(site, name, config.parse(local), invitation, None, offline, (open_, *_rules(site, invitation, name)))


def _default(site: SiteFile, data: str | None, offline: bool, *findings: Finding) -> Scope:
    name = approvals.data_of(site, data)
    tree = yaml.safe_load(config.compose(_overrides(site.data_set(name))).source)
    local = yaml.safe_load(localized(tree, site, _as_if(name, None)))
    local["data"] = {key: value for key, value in local["data"].items() if key in tree["data"] or value is not None}
    none = Finding(
        "policy", "approval", "warn", "No study is approved here yet: the default study stands in for it.",
        "Time and memory depend on the study's method and image size.",
        "medfl site check --study INVITATION, once you were sent one", {"approved": 0},
    )  # fmt: skip
    resolved = config.parse(yaml.safe_dump(local, sort_keys=False))
    return Scope(site, name, resolved, None, None, offline, findings or (none,))


def _as_if(data: str, invitation: Invitation | None) -> Approval:
    return Approval("" if invitation is None else invitation.study_id, "", "", "", data, "", "", "")


def _rules(site: SiteFile, invitation: Invitation, data: str) -> tuple[Finding, Finding]:
    return _allowed(site, invitation), _alike(site.data_set(data), yaml.safe_load(invitation.config)["data"])


def _alike(entry: Node, asked: Node) -> Finding:
    """What a site's data entry says otherwise than the study, of what should be alike at all sites."""
    items = [f"{key}: {entry[key]} here, {asked[key]} in the study" for key in ALIKE
             if key in entry and key in asked and entry[key] != asked[key]]  # fmt: skip
    counts = {"settings": len(items)}
    if not items:
        return Finding("policy", "settings", "pass", NOTHING, counts=counts)
    what, why = f"{len(items)} data settings are not the study's", "Sites learn together from images of one form."
    return Finding("policy", "settings", "warn", what, why, "Leave them out of site.yaml.", counts, items)


def _allowed(site: SiteFile, invitation: Invitation) -> Finding:
    if refusals := approvals.forbidden(site, invitation):
        why = "The policy in site.yaml is merged last: a study that it forbids cannot run."
        fix = "Ask the study lead, or change policy in site.yaml if you agree with the study."
        return Finding("policy", "allowed", "fail", " ".join(refusals), why, fix, {"refusals": len(refusals)})
    return Finding("policy", "allowed", "pass", "The site's policy allows the study.", counts={"refusals": 0})


def _overrides(entry: Node) -> list[str]:
    """Of the default study, for the kind of data that an entry of site.yaml describes."""
    kind = "multimodal" if "modalities" in entry else "folder"
    if target := entry.get("_target_"):
        kind = next((file.stem for file in (config.CONFIGS / "data").glob("*.yaml") if _names(file, target)), kind)
    known: Any = yaml.safe_load((config.CONFIGS / "data" / f"{kind}.yaml").read_text())
    return [f"data={kind}", *(f"data.{key}={entry[key]}" for key in SHARED if key in entry and key in known)]


def _names(file: Path, target: str) -> bool:
    return bool(yaml.safe_load(file.read_text())["_target_"] == target)
