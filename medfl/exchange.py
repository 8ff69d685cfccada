"""Asking the sites: one request to many, and what crossed each site's border, into wire.csv."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message

from medfl.asking import replies
from medfl.enrolment import Enrolled, Federation, common
from medfl.evaluation.counts import LEAST
from medfl.forms import Form, forms_of
from medfl.gate import Expected, ReplyRefused, Update, admit, length_of
from medfl.layout import Flat, Layout
from medfl.messages import Broadcast, Order, sizes_of
from medfl.nodes import lending
from medfl.run_folder import Event
from medfl.study import Rounds
from medfl.turns import Take, Turns


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
    form: Form | None = None  # of the answers, where weights travel compressed
    weights: Flat = field(default_factory=dict)  # what was compressed into `flat`

    @property
    def stage(self) -> str:
        return self.kind.partition(".")[2]


def collect(
    federation: Federation, request: Request, sites: Sequence[Enrolled], take: Take | None = None
) -> list[Update]:
    """Send the request; the admitted replies in the order of site names.

    A refused reply costs its site this request and is recorded with its reason; nobody else is touched.

    Args:
        take: gets each update as early as that order allows; what it returns takes the update's place, so that arrays
            can be let go.

    Raises:
        NetworkError (or the sites' common error): fewer usable replies than rounds.quorum asks for.
    """
    limits, folder = federation.study.rounds, federation.folder
    request = _coded(request, limits)
    deadline = request.deadline or limits.deadline
    with lending(federation.grid):
        content = Broadcast(request.order, request.flat).to_record()
    digest = federation.sealed(content, deadline, request.kind)
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
    sizes = sizes_of(content)
    for asked_site in sites:
        folder.wire(_rows(request, asked_site.name, "down", request.sends, {}, sizes))
    turns = Turns([site.name for site in sites], take, folder.path)
    length = length_of(request.weights or request.flat) if request.trains else None
    heads: dict[str, str] = {}
    refused: list[tuple[Message, str, str]] = []
    for place, reply in replies(
        federation.grid, asked, deadline, most=sum(slot.bytes for slot in request.answers.slots)
    ):
        site = sites[place]
        try:
            if not reply.has_error() and reply.metadata.src_node_id != site.node:
                raise ReplyRefused(f"site '{site.name}': node {reply.metadata.src_node_id} answered in its place.")
            expected = _expected(federation, request, site, length)
            head = federation.unsealed(reply, site.name, digest)
            update = admit(reply, expected)
            heads[site.name] = head
            folder.wire(_rows(request, site.name, "up", expected.layout, update.metrics, sizes_of(reply.content)))
            turns.came(update)
        except ReplyRefused as error:
            refused.append((reply, site.name, str(error)))
            folder.wire(_refused_rows(request, site.name, reply))
            turns.gone(site.name)
    stage, order = request.stage, request.order
    heard = {*heads, *(name for _, name, _ in refused)}
    silent = [
        (site.name, f"site '{site.name}': no reply within {deadline:.0f} s.")
        for site in sites
        if site.name not in heard
    ]
    for name, _ in silent:
        turns.gone(name)
    lost = [*((name, text) for _, name, text in refused), *silent]
    folder.write(Event(stage, order.arm, order.round, name, "refused", 1.0, text) for name, text in lost)
    folder.write(
        Event(stage, order.arm, order.round, name, "audit/lines", float(head.partition(":")[0]), head)
        for name, head in sorted(heads.items())
        if head
    )
    need = math.ceil(limits.quorum * len(sites))
    if len(turns.done) < need:
        reasons = " ".join(text for _, text in lost)
        found = f"{len(turns.done)} of {len(sites)} sites gave a usable reply, rounds.quorum asks for {need}."
        raise common([r for r, *_ in refused], f"arm '{order.arm}', round {order.round}: {found} {reasons}")
    return turns.done


def _coded(request: Request, rounds: Rounds) -> Request:
    """The same request in the study's form: what trains compresses weights both ways, all else stays as it is."""
    if not request.trains or rounds.wire == "fp32":
        return request
    down, up = forms_of(rounds, request.sends, request.answers)
    return replace(
        request,
        order=replace(request.order, layout=down.digest),
        sends=down.coded,
        flat=down.encode(request.flat),
        answers=up.coded,
        digest=up.digest,
        form=up,
        weights=request.flat,
    )


def _expected(federation: Federation, request: Request, site: Enrolled, length: float | None) -> Expected:
    limits, owners = federation.study.rounds, tuple(site.holdings)
    return Expected(
        site=site.name,
        nonce=request.order.nonce,
        layout=request.answers.owned(owners),
        digest=request.digest,
        volumes=site.volumes if request.trains else 0,
        steps=request.order.steps,
        before=(request.weights or request.flat) if request.trains else {},
        length=length,
        max_update=limits.max_update,
        max_growth=limits.max_growth,
        accepted=request.norms,
        least=federation.study.evaluation.counts or LEAST,
        form=request.form and request.form.owned(owners),
    )


def _rows(
    request: Request,
    site: str,
    direction: str,
    layout: Layout,
    metrics: dict[str, float],
    sizes: Mapping[str, int],
) -> Iterator[dict[str, object]]:
    order = request.order
    common = {
        "round": order.round,
        "site": site,
        "direction": direction,
        "arm": order.arm,
        "stage": request.stage,
    }
    for slot, size in layout.crossing(sizes):
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
        if size := len(order.peers.encode()):
            yield common | {"name": "peers", "role": "order", "dtype": "text", "shape": str(size), "bytes": size}


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
