"""Who takes part: sites that come online say who they are and what they can teach."""

import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from medfl.asking import replies
from medfl.errors import (
    ConfigError,
    CredentialError,
    DataError,
    DivergedError,
    MedflError,
    NetworkError,
    PolicyError,
    PrivacyError,
    ResourceError,
    VersionError,
)
from medfl.gate import ReplyRefused, checked_metrics
from medfl.messages import DESCRIBE, SITE_ERROR, Broadcast, Order
from medfl.run_folder import Event, RunFolder
from medfl.server_seals import Seals
from medfl.study import Study

POLL = 0.2  # s, while waiting for sites to come online
OWNER = re.compile(r"(?P<group>[a-z0-9_]{1,40}(:[a-z0-9_]{1,40})?)=(?P<count>[1-9][0-9]{0,11})")
NUMBERS = {f"site/{name}" for name in ("train", "val", "test", "labelled", "masked", "regions")}
NAMED = {"site", "nonce", "layout", "held_out", "owners", "classes"}  # "findings" may be there too
MOST_CLASSES, MOST_REGIONS = 1000, 254  # masks are of bytes, one of which means unknown
AGAIN = 5.0  # s between two questions to sites that were not reached
SETTLE = 5.0  # s without a new site, after which a study of unknown size starts
SHARED = (
    ConfigError, DataError, PolicyError, ResourceError, DivergedError, VersionError, CredentialError, PrivacyError,
)  # fmt: skip
BY_CODE = {error.exit_code: error for error in SHARED}


@dataclass(frozen=True)
class Enrolled:
    """A site that answered: Flower's node id, its own name, and its training volumes."""

    node: int
    name: str
    volumes: int
    held_out: bool
    holdings: Mapping[str, int] = field(default_factory=dict)  # owner group -> training volumes that can teach it
    classes: tuple[str, ...] = ()  # of which each image has one
    regions: int = 0  # labels of its masks, without background
    labelled: int = 0  # training volumes with a known label
    masked: int = 0  # training volumes with a known mask
    findings: tuple[str, ...] = ()  # of which each image has any number, in place of classes

    def share(self, owner: str, needed: str = "") -> float:
        """Volumes that can teach an owner group, for each training volume; all of them where nobody owns alone.

        Args:
            needed: group of the volumes that a phase trains on, such as "paired"; of "modality:t1" those in
                "paired:t1" count then.
        """
        if not owner:
            return 1.0
        kind, _, name = owner.partition(":")
        return self.holdings.get(f"{needed or kind}:{name}" if name else kind, 0) / self.volumes


@dataclass(frozen=True)
class Federation:
    """A study in progress: what reaches its sites, and where its records go."""

    grid: Grid
    study: Study
    folder: RunFolder
    stage: str = "pretrain"  # pretrain | finetune: which of the study's trainings its rounds are
    seals: Seals | None = None  # None: a simulation

    def sealed(self, record: RecordDict, within: float, kind: str) -> str:
        """Seal an order that is to be answered within so many seconds; its digest, "" in a simulation."""
        return self.seals.order(record, within, kind) if self.seals else ""

    def unsealed(self, reply: Message, site: str, order: str) -> str:
        """Check the seal of a reply and take it off; the head of the site's audit log, "" in a simulation.

        Raises:
            ReplyRefused: it was not made by that site for this order.
        """
        if self.seals is None or reply.has_error():
            return ""
        try:
            return self.seals.answer(reply.content, site, order)
        except CredentialError as error:
            raise ReplyRefused(f"site '{site}': {error}") from None


def enrol(federation: Federation, expected: int) -> list[Enrolled]:
    """Ask every connected site who it is; in the order of names.

    Args:
        expected: the number of sites to wait for; 0 where it is not known.

    Raises:
        NetworkError (or the sites' common error): none came online, or none could take part, with each reason.
    """
    deadline = federation.study.rounds.deadline
    end = time.monotonic() + deadline
    found, refused = _ask_who(federation, _wait(federation.grid, expected, deadline))
    while federation.seals and time.monotonic() < end:  # after a restart, sites need a minute to be back
        settled = {site.node for site in found} | {node for node, reply, _ in refused if not _unreached(reply)}
        if len(settled) >= expected:
            break
        time.sleep(AGAIN)
        more, lost = _ask_who(federation, sorted(set(federation.grid.get_node_ids()) - settled))
        found = sorted([*found, *more], key=lambda site: site.name)
        refused = [row for row in refused if row[0] in settled] + lost
    if not found:
        reasons = " ".join(text for *_, text in refused)
        raise common([reply for _, reply, _ in refused], f"no site could take part. {reasons}")
    return found


def _unreached(reply: Message) -> bool:
    """Whether Flower answered in a site's place."""
    return reply.has_error() and reply.error.code < SITE_ERROR


def newcomers(federation: Federation, known: set[int]) -> list[Enrolled]:
    """Sites on nodes that are online and not in `known`. Every node is asked until its site answers, or is silent.

    Args:
        known: nodes asked so far; the new ones are added.
    """
    nodes = sorted(set(federation.grid.get_node_ids()) - known)
    if not nodes:
        return []
    found, refused = _ask_who(federation, nodes)
    known.update(set(nodes) - {node for node, reply, _ in refused if _unreached(reply)})
    return found


def _ask_who(federation: Federation, nodes: Sequence[int]) -> tuple[list[Enrolled], list[tuple[int, Message, str]]]:
    """Who answers, in the order of names, and (node, reply, reason) of the refused."""
    study, folder = federation.study, federation.folder
    order = Order(study.source, "none", "none", "none", 0, study.rounds.count, 0, "none", uuid.uuid4().hex)
    content = Broadcast(order).to_record()
    digest = federation.sealed(content, study.rounds.deadline, DESCRIBE)
    registered = {node.node_id: node.name for node in federation.grid.get_nodes()}
    asked = [Message(content, dst_node_id=node, message_type=DESCRIBE, group_id="enrol") for node in nodes]
    found: dict[str, Enrolled] = {}
    refused = []
    for place, reply in replies(federation.grid, asked, study.rounds.deadline, most=0):
        try:
            if federation.seals:
                _check_maker(federation, reply, registered.get(nodes[place], ""), digest)
            site = _enrolled(reply, nodes[place], order.nonce)
            if site.name in found:
                raise ReplyRefused(f"site '{site.name}': two nodes claim this name. Rename one.")
            found[site.name] = site
            folder.wire(_enrol_rows(site.name, reply))
        except ReplyRefused as error:
            refused.append((nodes[place], reply, str(error)))
    folder.write(Event("enrol", "", 0, "", "refused", 1.0, text) for *_, text in refused)
    return [found[name] for name in sorted(found)], refused


def _check_maker(federation: Federation, reply: Message, registered: str, order: str) -> None:
    """
    Raises:
        ReplyRefused: the node is registered under another name than it gives, or its seal does not hold.
    """
    if reply.has_error():
        return
    identity = dict(reply.content.config_records.get("identity") or {})
    name = str(identity.get("site", ""))
    if name != registered:
        raise ReplyRefused(f"node {reply.metadata.src_node_id} is registered as {registered!r} and says {name[:40]!r}.")
    federation.unsealed(reply, name, order)


def _enrol_rows(site: str, reply: Message) -> Iterator[dict[str, object]]:
    common = {"round": 0, "site": site, "direction": "up", "arm": "", "stage": "enrol", "role": "metric"}
    for name in reply.content.metric_records["metrics"]:
        yield common | {"name": name, "dtype": "float64", "shape": "1", "bytes": 8}
    for name, value in reply.content.config_records["identity"].items():
        yield common | {"name": name, "dtype": "text", "shape": "1", "bytes": len(str(value).encode())}


def _wait(grid: Grid, expected: int, deadline: float) -> list[int]:
    start = last = time.monotonic()
    nodes: list[int] = []
    while time.monotonic() - start < deadline:
        now = sorted(grid.get_node_ids())
        if len(now) != len(nodes):
            nodes, last = now, time.monotonic()
        settled = nodes and time.monotonic() - last > SETTLE
        if (expected and len(nodes) >= expected) or (settled and not expected):
            return nodes
        time.sleep(POLL)
    if nodes:
        return nodes
    raise NetworkError(
        f"no site came online within {deadline:.0f} s. Start the sites' SuperNodes, or raise rounds.deadline."
    )


def _enrolled(reply: Message, node: int, nonce: str) -> Enrolled:
    if reply.has_error():
        raise ReplyRefused(f"node {node}: {reply.error.reason}")
    _check_form(reply.content, node)
    identity = dict(reply.content.config_records["identity"])
    name = str(identity["site"])
    metrics = checked_metrics(reply.content.metric_records["metrics"].items(), name or str(node))
    if identity.get("nonce") != nonce or not 0 < len(name) <= 64 or not name.isprintable():
        raise ReplyRefused(f"node {node}: got no valid name and nonce. Install the same medfl release there.")
    counts = {kind: int(metrics[f"site/{kind}"]) for kind in ("regions", "labelled", "masked")}
    if not 0 <= counts["regions"] <= MOST_REGIONS:
        raise ReplyRefused(f"site '{name}': got {counts['regions']} labels of masks, need at most {MOST_REGIONS}.")
    return Enrolled(
        node,
        name,
        int(metrics["site/train"]),
        identity["held_out"] == "yes",
        _holdings(str(identity["owners"]), name),
        _names(identity["classes"], name),
        findings=_names(identity.get("findings"), name),
        **counts,
    )


def _check_form(content: RecordDict, node: int) -> None:
    """
    Raises:
        ReplyRefused: records, numbers or names other than those of an enrolment.
    """
    configs, metrics = content.config_records, content.metric_records
    got = sorted([*configs, *metrics, *content.array_records])
    if got != ["identity", "metrics"] or "identity" not in configs:
        raise ReplyRefused(f"node {node}: got the records {str(got)[:80]}, need 'identity' and 'metrics' alone.")
    odd = (metrics["metrics"].keys() ^ NUMBERS) | ((configs["identity"].keys() - {"findings"}) ^ NAMED)
    if odd:
        raise ReplyRefused(
            f"node {node}: {min(odd)[:60]!r} is missing or too much. Install the same medfl release there."
        )


def _names(given: object, site: str) -> tuple[str, ...]:
    """Names of classes or findings, such as ["benign", "malignant"]."""
    names = given if isinstance(given, list) else []
    if len(names) > MOST_CLASSES or not all(isinstance(n, str) and 0 < len(n) <= 64 and n.isprintable() for n in names):
        raise ReplyRefused(f"site '{site}': got names of classes that cannot be, need up to {MOST_CLASSES} short ones.")
    return tuple(names)


def _holdings(text: str, site: str) -> dict[str, int]:
    """Owner groups and their volumes from "modality:t1=3,paired=2"."""
    found = {}
    for item in filter(None, text.split(",")):
        if not (match := OWNER.fullmatch(item)):
            raise ReplyRefused(f"site '{site}': got the owner group {item[:60]!r}, need name=count.")
        found[match["group"]] = int(match["count"])
    return found


def common(replies: Sequence[Message], text: str) -> MedflError:
    """The error class that all failing sites share, else NetworkError."""
    codes = {reply.error.code - SITE_ERROR if reply.has_error() else 0 for reply in replies}
    return BY_CODE.get(codes.pop(), NetworkError)(text) if len(codes) == 1 else NetworkError(text)
