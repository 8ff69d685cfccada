"""What stands between a message and a site: is it to be obeyed, with which data, and what is recorded of the answer.

In a simulation the study names the sites. At a real one the study must be approved, its order sealed by the study lead,
and the site's own file is merged last: data, device, state, and a policy that nothing received can change.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Message, RecordDict

from medfl import egress, envelope
from medfl.derived import follows
from medfl.errors import ConfigError, PolicyError
from medfl.layout import Layout
from medfl.messages import Answer, Broadcast, Order, sizes_of
from medfl.onsite import policy
from medfl.onsite.approvals import Approval, approval_of
from medfl.onsite.audit import Audit, parse_head
from medfl.onsite.site_file import SiteFile
from medfl.privacy.ledger import Ledger
from medfl.provision.keys import load_signing_key
from medfl.secagg.roster import Roster, signed_offer

SITE_FILE, PARTITION = "site-file", "partition-id"  # keys of a node's configuration
ANSWER_WITHIN = 86400.0  # s that a sealed answer counts
LINEAGE = re.compile(r"[0-9a-f]{32}|none|synthesis|")
WORDS = {"lineage": LINEAGE, "parent": LINEAGE, "arm": re.compile(r"([A-Za-z0-9][A-Za-z0-9:._-]{0,200})?")}  # in paths


@dataclass(frozen=True)
class Admitted:
    """An order that this site obeys: `source` is the study with its own data, `partition` its place in it."""

    broadcast: Broadcast
    kind: str  # of the request, such as "pretrain"
    source: str
    partition: int
    site: SiteFile | None = None  # None: a simulation
    study_id: str = ""
    order_digest: str = ""


def admit(message: Message, context: Context) -> Admitted:
    """
    Raises:
        VersionError: another release sent it.
        PolicyError: the study is not approved here, differs from the approved one, or asks what the policy forbids.
        CredentialError: the order is not sealed by the study lead, or is of another time.
        PrivacyError: the record of what was spent of the patients' privacy was cut or changed.
        ConfigError: a node that says neither its place in a simulation nor its site file.
    """
    kind = message.metadata.message_type.partition(".")[2]
    place = context.node_config.get(SITE_FILE)
    if place is None:
        if PARTITION not in context.node_config:
            raise ConfigError(f"the node's configuration has neither {SITE_FILE!r} nor {PARTITION!r}; need one.")
        broadcast = Broadcast.from_record(message.content)
        return Admitted(broadcast, kind, broadcast.order.study, int(str(context.node_config[PARTITION])))
    site = SiteFile.read(Path(str(place)))
    received = _tree(Broadcast.order_of(message.content))
    approval, invitation = approval_of(site, str(received["run"].get("study")))
    sealed_as = envelope.order_of(message.metadata.message_type)
    _, digest = envelope.opened(message.content, invitation.study_key, sealed_as)
    broadcast = Broadcast.from_record(message.content)
    approved = yaml.safe_load(invitation.config)
    _check_study(received, approved, site, kind)
    _check_order(broadcast.order, received, approved, site, kind)
    if received["privacy"]["mechanism"] != "none":
        check_ledger(site, digest)
    if kind == "shares" and site.policy.peers is not None:
        Roster.read(broadcast.order.peers).check_signed(site.site, site.policy.peers)
    local = localized(received, site, approval)
    return Admitted(broadcast, kind, local, 0, site, approval.study_id, digest)


def _tree(order: Order) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(order.study)
        return {**tree, "run": dict(tree["run"])}
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        raise ConfigError("the order holds no study. Install the same medfl release on both sides.") from None


def _check_study(received: dict[str, Any], approved: dict[str, Any], site: SiteFile, kind: str) -> None:
    """That the study is the approved one, in the form that this kind of request asks for."""
    same = received == approved
    if not follows(received, approved) or (kind == "pretrain" and not same) or (kind == "finetune" and same):
        odd = next((name for name in approved if received.get(name) != approved[name]), "another section")
        raise PolicyError(f"the study differs from the approved one, first in {odd!r}. Nothing was done.")
    rules = site.policy
    if found := policy.refusals(approved, rules):
        raise PolicyError(f"this site's rules forbid it: {found[0]} Change site.yaml, or leave the study.")


def _check_order(order: Order, received: dict[str, Any], approved: dict[str, Any], site: SiteFile, kind: str) -> None:
    """That the request is one of the approved stages, and that its words cannot lead out of the state folder."""
    rules, needed = site.policy, policy.STAGES.get(kind, ())
    if needed and not set(needed) & set(rules.stages):
        raise PolicyError(f"request {kind}: policy.stages allows {', '.join(rules.stages) or 'none'}.")
    if needed and not set(needed) & set(approved["stages"]):
        raise PolicyError(f"request {kind}: the approved study has the stages {', '.join(approved['stages'])} alone.")
    if kind in ("pretrain", "finetune") and order.steps < rules.least_steps:
        raise PolicyError(f"steps={order.steps}: policy.least_steps asks for {rules.least_steps} at least.")
    count = received["rounds"]["count"]
    if order.rounds != count or not 0 <= order.round <= count:
        raise PolicyError(f"round {order.round} of {order.rounds}: the approved study has {count}.")
    for name, form in WORDS.items():
        if not form.fullmatch(word := getattr(order, name)) or ".." in word:
            raise PolicyError(f"the order's {name} is none that a server of this release makes. Nothing was done.")


def check_ledger(site: SiteFile, order: str = "") -> None:
    """The ledger still has the line that the audit log noted with the last answer: nobody took ε back.

    Args:
        order: digest of the order that is to be obeyed: a second time it would spend ε again.

    Raises:
        PrivacyError: it has not.
        PolicyError: the order was answered before.
    """
    entries = [entry for entry in Audit(site.audit).entries() if entry.get("ledger")]
    Ledger.of(site.state, site.site).releases(parse_head(str(entries[-1]["ledger"])) if entries else None)
    if order and order in {entry.get("order") for entry in entries}:
        raise PolicyError("the order was answered before. Nothing was done.")


def localized(received: dict[str, Any], site: SiteFile, approval: Approval) -> str:
    """The study as this site runs it: its own data, state, device and privacy limits take the received ones' place.

    Raises:
        PolicyError: a data set that site.yaml no longer has.
    """
    if approval.data not in site.data:
        raise PolicyError(f"data set {approval.data!r} was approved, and is not in site.yaml any more.")
    alone = {"site": None} if "site" in received["data"] else {}
    tree = {**received, "data": {**received["data"], **alone, **site.data[approval.data]}}
    held_out = received["sites"].get("held_out") == site.site
    tree["sites"] = {
        "_target_": "medfl.data.single.Single", "name": site.site, "held_out": held_out,
        "min_images": site.policy.least_images,
    }  # fmt: skip
    tree["privacy"] = policy.private(received, site.policy)
    threads = received["training"]["threads"] if site.threads is None else site.threads
    tree["training"] = {**received["training"], "device": site.device, "threads": threads}
    tree["run"] = {**received["run"], "dir": str(site.state), "state_dir": str(site.state)}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def release(admitted: Admitted, answer: Answer, layout: Layout) -> RecordDict:
    """The answer as it leaves: checked by the egress gate, written to the audit log, sealed.

    Raises:
        PolicyError: something that must not leave, or more bytes than the policy allows.
        DivergedError: a tensor that is not finite.
    """
    egress.check(answer, layout)
    site = admitted.site
    if site is None:
        return answer.to_record()
    if admitted.kind == "keys":
        answer = signed_offer(answer, admitted.broadcast.order, _key(site.signing_key))
    record = answer.to_record()
    order, sizes = admitted.broadcast.order, sizes_of(record)
    size = sum(sizes.values())
    if size > site.policy.most_bytes:
        raise PolicyError(f"the answer has {size} bytes, policy.most_bytes allows {site.policy.most_bytes}.")
    key, ledger = _key(site.signing_key), Ledger.of(site.state, site.site)
    spent = {"ledger": "{}:{}".format(*ledger.head())} if ledger.path.exists() else {}
    number, hash_ = Audit(site.audit).write(
        "answer", study=admitted.study_id, stage=admitted.kind, arm=order.arm, round=order.round,
        bytes=size + 8 * len(answer.metrics) + egress.fact_bytes(answer.facts), arrays=egress.contents(layout, sizes),
        metrics=sorted(answer.metrics), facts=dict(sorted(answer.facts.items())), order=admitted.order_digest, **spent,
    )  # fmt: skip
    now = envelope.now()
    seal = envelope.Seal("answer", now, now + ANSWER_WITHIN, admitted.order_digest, f"{number}:{hash_}")
    envelope.closed(record, key, seal)
    return record


@functools.cache
def _key(path: Path) -> Ed25519PrivateKey:
    return load_signing_key(path)


def refused(context: Context, kind: str, code: int, text: str, ticket: str) -> None:
    """Write a request that failed, and why, into the site's own audit log; in a simulation nothing."""
    place = context.node_config.get(SITE_FILE)
    if place is not None:
        audit = Audit(SiteFile.read(Path(str(place))).audit)
        audit.write("refused", stage=kind, code=code, reason=text, ticket=ticket)
