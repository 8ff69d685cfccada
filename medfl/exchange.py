"""Asking the sites: who is there, one request to many, and what crossed each site's border, into wire.csv."""

import math
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from medfl.errors import (
    ConfigError,
    DataError,
    DivergedError,
    MedflError,
    NetworkError,
    PolicyError,
    ResourceError,
)
from medfl.gate import Expected, ReplyRefused, Update, admit, checked_metrics
from medfl.layout import Flat, Layout
from medfl.messages import DESCRIBE, SITE_ERROR, Broadcast, Order
from medfl.run_folder import Event, RunFolder
from medfl.study import Study

POLL = 0.2  # s, while waiting for sites to come online
OWNER = re.compile(r"(?P<group>[a-z0-9_]{1,40}(:[a-z0-9_]{1,40})?)=(?P<count>[1-9][0-9]{0,11})")
SETTLE = 5.0  # s without a new site, after which a study of unknown size starts
BY_CODE = {error.exit_code: error for error in (ConfigError, DataError, PolicyError, ResourceError, DivergedError)}


@dataclass(frozen=True)
class Enrolled:
    """A site that answered: Flower's node id, its own name, and its training volumes."""

    node: int
    name: str
    volumes: int
    held_out: bool
    holdings: Mapping[str, int] = field(default_factory=dict)  # owner group -> training volumes that can teach it

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


@dataclass(frozen=True)
class Request:
    """One order to many sites, the tensors sent along, and what each reply must hold."""

    kind: str  # message type
    order: Order
    sends: Layout
    flat: Flat
    answers: Layout
    digest: str
    trains: bool  # the reply changes the weights: it is weighed and its norm limited
    norms: Sequence[float] = ()
    deadline: float = 0.0  # s; 0: rounds.deadline

    @property
    def stage(self) -> str:
        return self.kind.partition(".")[2]


def enrol(federation: Federation, expected: int) -> list[Enrolled]:
    """Ask every connected site who it is; in the order of names.

    Args:
        expected: the number of sites to wait for; 0 where it is not known.

    Raises:
        NetworkError (or the sites' common error): none came online, or none could take part, with each reason.
    """
    found, refused = _ask_who(federation, _wait(federation.grid, expected, federation.study.rounds.deadline))
    if not found:
        reasons = " ".join(text for _, text in refused)
        raise _common([reply for reply, _ in refused], f"no site could take part. {reasons}")
    return found


def newcomers(federation: Federation, known: set[int]) -> list[Enrolled]:
    """Sites on nodes that are online and not in `known`; nobody waits for them. Every node is asked once.

    Args:
        known: nodes asked so far; the new ones are added.
    """
    nodes = sorted(set(federation.grid.get_node_ids()) - known)
    known.update(nodes)
    return _ask_who(federation, nodes)[0] if nodes else []


def _ask_who(federation: Federation, nodes: Sequence[int]) -> tuple[list[Enrolled], list[tuple[Message, str]]]:
    """Who answers, in the order of names, and the refused replies with their reasons."""
    study, folder = federation.study, federation.folder
    order = Order(study.source, "none", "none", "none", 0, study.rounds.count, 0, "none", uuid.uuid4().hex)
    content = Broadcast(order).to_record()
    asked = [Message(content, dst_node_id=node, message_type=DESCRIBE, group_id="enrol") for node in nodes]
    found: dict[str, Enrolled] = {}
    refused = []
    for reply in federation.grid.send_and_receive(asked, timeout=study.rounds.deadline):
        try:
            site = _enrolled(reply, order.nonce)
            if site.name in found:
                raise ReplyRefused(f"site '{site.name}': two nodes claim this name. Rename one.")
            found[site.name] = site
            folder.wire(_enrol_rows(site.name, reply))
        except ReplyRefused as error:
            refused.append((reply, str(error)))
    folder.write(Event("enrol", "", 0, "", "refused", 1.0, text) for _, text in refused)
    return [found[name] for name in sorted(found)], refused


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


def _enrolled(reply: Message, nonce: str) -> Enrolled:
    node = reply.metadata.src_node_id
    if reply.has_error():
        raise ReplyRefused(f"node {node}: {reply.error.reason}")
    identity = dict(reply.content.config_records.get("identity") or {})
    name = str(identity.get("site", ""))
    metrics = checked_metrics((reply.content.metric_records.get("metrics") or {}).items(), name or str(node))
    if identity.get("nonce") != nonce or not 0 < len(name) <= 64 or not name.isprintable():
        raise ReplyRefused(f"node {node}: got no valid name and nonce. Install the same medfl release there.")
    volumes, held_out = int(metrics.get("site/train", 0)), identity.get("held_out") == "yes"
    return Enrolled(node, name, volumes, held_out, _holdings(str(identity.get("owners", "")), name))


def _holdings(text: str, site: str) -> dict[str, int]:
    """Owner groups and their volumes from "modality:t1=3,paired=2"."""
    found = {}
    for item in filter(None, text.split(",")):
        if not (match := OWNER.fullmatch(item)):
            raise ReplyRefused(f"site '{site}': got the owner group {item[:60]!r}, need name=count.")
        found[match["group"]] = int(match["count"])
    return found


def collect(federation: Federation, request: Request, sites: Sequence[Enrolled]) -> list[Update]:
    """Send the request; the admitted replies in the order of site names.

    A refused reply costs its site this request and is recorded with its reason; nobody else is touched.

    Raises:
        NetworkError (or the sites' common error): fewer usable replies than rounds.quorum asks for.
    """
    limits, folder = federation.study.rounds, federation.folder
    deadline = request.deadline or limits.deadline
    content = Broadcast(request.order, request.flat).to_record()
    asked = [
        Message(
            content,
            dst_node_id=s.node,
            message_type=request.kind,
            ttl=deadline,
            group_id=str(request.order.round),
        )
        for s in sites
    ]
    for asked_site in sites:
        folder.wire(_rows(request, asked_site.name, "down", request.sends, {}))
    by_node = {site.node: site for site in sites}
    updates: dict[str, Update] = {}
    refused: list[tuple[Message, str, str]] = []
    for reply in federation.grid.send_and_receive(asked, timeout=deadline):
        site = by_node.get(reply.metadata.src_node_id)
        try:
            if site is None or site.name in updates:
                raise ReplyRefused(f"node {reply.metadata.src_node_id}: its reply was not asked for, or came twice.")
            expected = _expected(federation, request, site)
            update = updates[site.name] = admit(reply, expected)
            folder.wire(_rows(request, site.name, "up", expected.layout, update.metrics))
        except ReplyRefused as error:
            refused.append((reply, site.name if site else "", str(error)))
            folder.wire(_refused_rows(request, refused[-1][1], reply))
    stage, order = request.stage, request.order
    folder.write(Event(stage, order.arm, order.round, name, "refused", 1.0, text) for _, name, text in refused)
    need = math.ceil(limits.quorum * len(sites))
    if len(updates) < need:
        reasons = " ".join(text for *_, text in refused) or f"The others gave none within {deadline:.0f} s."
        found = f"{len(updates)} of {len(sites)} sites gave a usable reply, rounds.quorum asks for {need}."
        raise _common([r for r, *_ in refused], f"arm '{order.arm}', round {order.round}: {found} {reasons}")
    return [updates[name] for name in sorted(updates)]


def _expected(federation: Federation, request: Request, site: Enrolled) -> Expected:
    limits = federation.study.rounds
    return Expected(
        site=site.name,
        nonce=request.order.nonce,
        layout=request.answers.owned(tuple(site.holdings)),
        digest=request.digest,
        volumes=site.volumes if request.trains else 0,
        steps=request.order.steps,
        before=request.flat if request.trains else {},
        max_update=limits.max_update,
        max_growth=limits.max_growth,
        accepted=request.norms,
    )


def _rows(
    request: Request, site: str, direction: str, layout: Layout, metrics: dict[str, float]
) -> Iterator[dict[str, object]]:
    order = request.order
    common = {
        "round": order.round,
        "site": site,
        "direction": direction,
        "arm": order.arm,
        "stage": request.stage,
    }
    for slot in layout.slots:
        size = slot.size * (4 if slot.dtype == "float32" else 8)
        shape = "x".join(map(str, slot.shape)) or "1"
        yield common | {
            "name": slot.name,
            "role": slot.role,
            "dtype": slot.dtype,
            "shape": shape,
            "bytes": size,
        }
    for name in metrics:
        yield common | {"name": name, "role": "metric", "dtype": "float64", "shape": "1", "bytes": 8}
    if direction == "down":
        size = len(order.study.encode())
        yield common | {"name": "study", "role": "order", "dtype": "text", "shape": str(size), "bytes": size}


def _refused_rows(request: Request, site: str, reply: Message) -> Iterator[dict[str, object]]:
    """What a refused reply held: it crossed the border all the same."""
    records = {} if reply.has_error() else reply.content.array_records
    for role, arrays in records.items():
        for name, array in arrays.items():
            yield {
                "round": request.order.round,
                "site": site,
                "direction": "up",
                "name": f"refused: {name[:80]}",
                "role": role[:40],
                "dtype": array.dtype[:20],
                "shape": "x".join(map(str, array.shape))[:80],
                "bytes": len(array.data),
                "arm": request.order.arm,
                "stage": request.stage,
            }


def _common(replies: Sequence[Message], text: str) -> MedflError:
    """The error class that all failing sites share, else NetworkError."""
    codes = {reply.error.code - SITE_ERROR if reply.has_error() else 0 for reply in replies}
    return BY_CODE.get(codes.pop(), NetworkError)(text) if len(codes) == 1 else NetworkError(text)
