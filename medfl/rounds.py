"""One round: ask the sites, aggregate what the gate admitted, and step."""

import time
import uuid
from collections.abc import Callable, Sequence

from medfl import features, rules, server_books
from medfl.aggregation import begin
from medfl.ballot import weights_before
from medfl.enrolment import Enrolled, Federation
from medfl.errors import DivergedError
from medfl.exchange import Request
from medfl.faults import point
from medfl.gate import Update
from medfl.layout import Layout, Tensors
from medfl.messages import REFRESH, SEED, TRAIN, Order
from medfl.methods.base import Role
from medfl.methods.phases import phase_of
from medfl.run_folder import CLOSED, Event
from medfl.secagg.at_server import REMARK, collect_added, is_sum, of_all
from medfl.server_books import Books
from medfl.server_state import Server
from medfl.study import Study
from medfl.turns import detached

LLOYD = 3  # exchanges of code sums before the first round
CONFIRMED = 2  # collapsed rounds running


def run_round(federation: Federation, server: Server, sites: Sequence[Enrolled], steps: int) -> None:
    """One round: the server's state moves by one round, or stays as it is.

    Sites that hold nothing of what the phase trains are not asked; where none is left, the weights stay.

    Args:
        steps: optimizer steps of each site.

    Raises:
        NetworkError (or the sites' common error): too few usable updates.
    """
    began, study, parts = time.perf_counter(), federation.study, server.blueprint.answers
    phase = _begin_phase(federation, server)
    needed = server.blueprint.needs.get(phase, "")
    able = [site for site in sites if site.share(needed)]
    if not able:
        server.round += 1
        text = f"phase '{phase}': no site of this arm holds what it needs ({needed}); the weights stay."
        said = {CLOSED: (0.0, ""), "remark": (1.0, text)}  # the first closes the round, as that of others
        federation.folder.write(Event(federation.stage, server.arm, server.round, "", n, *v) for n, v in said.items())
        return
    order = order_of(study, server, server.round + 1, steps)
    request = Request(
        TRAIN[federation.stage], order, server.blueprint.sends, server.flat, parts, parts.digest, True, server.norms
    )
    weigh = weights_before(server.blueprint.sends, study, able, steps, needed)
    aggregation = begin(federation, server, able, len(sites), needed)
    updates, added = collect_added(federation, request, able, weigh, aggregation.take)
    point("before_aggregate")
    told: list[tuple[str, str, float]] = []
    if hidden := is_sum(added):
        server.step({g: array for g, array in added[0].flat.items() if g.startswith(("parameter/", "target/"))})
        aggregation.pool.add(added[0])
    else:
        updates, told = aggregation.step(updates)
        added = updates
        server.norms = (server.norms + [update.norm for update in updates])[-1000:]
    weights = rules.site_weights([update.volumes for update in updates], study.rounds.max_share)
    point("after_aggregate")
    server.round += 1
    told += _take_sums(study, server, added, weights, aggregation.pool, server.round)
    seconds = time.perf_counter() - began
    events = _events(server, updates, weights, told, seconds=seconds, stage=federation.stage, hidden=hidden)
    federation.folder.write(events)
    point("after_round")


def _begin_phase(federation: Federation, server: Server) -> str:
    """The phase of the next round; before its first one the method may change the global weights."""
    phases, number = server.blueprint.phases, server.round + 1
    phase = phase_of(phases, number, federation.study.rounds.count)
    if len(phases) > 1 and number == phase.first:
        server.begin_phase(federation.study, phase.name)
        federation.folder.write([Event(federation.stage, server.arm, number, "", "phase", 1.0, phase.name)])
    server.blueprint.enter(phase.name)
    return phase.name


def refresh(federation: Federation, server: Server, sites: Sequence[Enrolled]) -> None:
    """Norm statistics and codebooks under the final weights, over all sites, and the monitors of the final encoder."""
    pool = features.Pool(server.blueprint.sums)
    updates, added = _ask(REFRESH, federation, server, sites, server.blueprint.sums, lambda u: detached(pool.add(u)))
    if is_sum(added):
        pool.add(added[0])
    told = _take_sums(federation.study, server, added, (), pool, 0)
    monitors = [
        (update.site, name, value)
        for update in updates
        for name, value in update.metrics.items()
        if name.startswith("monitor/")
    ]
    federation.folder.write(
        Event("refresh", server.arm, server.round, site, name, value) for site, name, value in (*monitors, *told)
    )


def seed_codebooks(federation: Federation, server: Server, sites: Sequence[Enrolled]) -> None:
    """The first codebooks: every site's own centres, clustered on the server, then Lloyd's steps on plain sums.

    Where a site's centres may not be seen, those of public images; under differential privacy each step would cost.
    """
    if not server.books.kinds:
        return
    study, seed = federation.study, federation.study.seed
    if study.privacy.on or study.secagg.active:
        server.set_books(server_books.public(study, server.tensors()))
    else:
        updates, _ = _ask(SEED, federation, server, sites, server.blueprint.seeds)
        server.set_books(server_books.first(server.books.kinds, updates, server.blueprint.seeds, seed))
    if study.privacy.on:
        return
    for _ in range(LLOYD):
        _, added = _ask(REFRESH, federation, server, sites, server.blueprint.sums)
        server.set_books(server_books.lloyd(server.get_books(), added, server.blueprint.sums, seed))
    images = 2 * federation.study.training.batch_size * len(sites)  # of one step everywhere, both views
    books = server.get_books()
    server.set_books({n: book.scaled(images * server.books.kinds[n].tokens) for n, book in books.items()})


def join_codebooks(federation: Federation, server: Server, members: int, joined: Sequence[Enrolled]) -> None:
    """Codes for the tokens of sites that come late: theirs and the present ones as points, clustered to as many.

    Args:
        members: sites so far.
    """
    study = federation.study
    if not server.books.kinds or not joined or study.privacy.on or study.secagg.active:
        return
    layout = server.blueprint.seeds
    updates, _ = _ask(SEED, federation, server, joined, layout)
    server.set_books(server_books.joined(server.get_books(), members, updates, layout, federation.study.seed))
    server.books = Books.start(server.books.kinds, {})  # an index means another code now


def _ask(
    kind: str,
    federation: Federation,
    server: Server,
    sites: Sequence[Enrolled],
    answers: Layout,
    take: Callable[[Update], Update] | None = None,
) -> tuple[list[Update], list[Update]]:
    """Sums under the present state, without training: `answers` is what each reply holds; as `collect_added`."""
    order = order_of(federation.study, server, server.round, 1)
    request = Request(kind, order, server.blueprint.sends, server.flat, answers, answers.digest, trains=False)
    return collect_added(federation, request, sites, lambda names: {}, take)  # noqa: ARG005


def _take_sums(
    study: Study,
    server: Server,
    updates: Sequence[Update],
    weights: Sequence[float],
    pool: features.Pool,
    number: int,
) -> list[tuple[str, str, float]]:
    """Set what follows from the sums of the refresh pass; (site, name, value) of what they tell.

    Args:
        weights: of the sites; none needed for a refresh pass alone.
        pool: the sums of features.
        number: of the round; 0: a refresh pass alone.
    """
    layout = server.blueprint.answers if number else server.blueprint.sums
    sums = _sum_statistics(updates, layout)
    server.set_moments(sums)
    shares = (1.0,) if is_sum(updates) else weights
    found = server_books.round_of(
        server.books, server.tensors(), updates, shares, layout, study, number, sites=max(1, len(weights))
    )
    told = [*found, *pool.told()]
    return of_all(told) if is_sum(updates) else told


def stop_if_collapsed(study: Study, server: Server) -> None:
    """
    Raises:
        DivergedError: the embeddings collapsed in two rounds running and rounds.on_collapse=stop.
    """
    if server.alarms >= CONFIRMED and study.rounds.on_collapse == "stop":
        raise DivergedError(
            f"arm '{server.arm}', round {server.round}: the embeddings have collapsed, {server.alarms} rounds running "
            "(see the remarks in metrics.jsonl). Lower training.optimizer.lr, raise training.batch_size, or go on with "
            "rounds.on_collapse=warn resume=true."
        )


def order_of(study: Study, server: Server, number: int, steps: int) -> Order:
    """A fresh order: its nonce is never used again."""
    digest = server.blueprint.sends.digest
    return Order(
        study.source,
        server.lineage,
        server.arm,
        phase_of(server.blueprint.phases, number, study.rounds.count).name,
        number,
        study.rounds.count,
        steps,
        digest,
        uuid.uuid4().hex,
        server.parent,
    )


def _sum_statistics(updates: Sequence[Update], layout: Layout) -> Tensors:
    """Plain sums over the sites of the norms' inputs, in the order of their names."""
    total: Tensors = {}
    for update in updates:
        owned = tuple(slot for slot in layout.of_role(Role.NORM_MOMENTS).slots if slot.group in update.flat)
        for name, tensor in Layout(owned).unpack(update.flat).items():
            total[name] = total[name] + tensor if name in total else tensor.clone()
    return total


def _events(
    server: Server,
    updates: Sequence[Update],
    weights: Sequence[float],
    told: Sequence[tuple[str, str, float]],
    *,
    seconds: float,
    stage: str,
    hidden: bool,
) -> list[Event]:
    def event(site: str, name: str, value: float) -> Event:
        return Event(stage, server.arm, server.round, site, name, value)

    rows = [event("", "round/seconds", seconds)]
    for update, weight in zip(updates, weights, strict=True):
        rows.append(event(update.site, "round/weight", weight))
        if not hidden:
            rows.append(event(update.site, "round/update_norm", update.norm))
        rows += [event(update.site, name, value) for name, value in sorted(update.metrics.items())]
    means = _means(updates, weights)
    rows += [event("", name, value) for name, value in means.items()]
    rows += [event(site, name, value) for site, name, value in told]
    rows.append(event("", CLOSED, float(len(updates))))  # closes the round for those who watch
    terms = {name.removeprefix("loss/"): value for name, value in means.items() if name.startswith("loss/")}
    remarks = [*server.blueprint.remarks(terms), *_index_alarms(told)]
    if server.round == 1 and hidden:
        remarks.append(REMARK)
    if collapse := server.blueprint.alarm(terms):
        remarks.append(f"collapsed: {collapse}")
    server.alarms = server.alarms + 1 if collapse else 0
    return rows + [Event(stage, server.arm, server.round, "", "remark", 1.0, text) for text in remarks]


def _means(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, float]:
    """Weighted means of the loss terms and monitors, each over the sites that have it."""
    sums: dict[str, tuple[float, float]] = {}
    for update, weight in zip(updates, weights, strict=True):
        for name, value in update.metrics.items():
            if name.startswith(("loss/", "monitor/")):
                total, mass = sums.get(name, (0.0, 0.0))
                sums[name] = (total + value * weight, mass + weight)
    return {name: total / mass for name, (total, mass) in sorted(sums.items())}


def _index_alarms(told: Sequence[tuple[str, str, float]]) -> list[str]:
    return [
        f"site '{site}' answers with other code indices than the broadcast ones ({name}: {value:.0%} of its tokens). "
        "Check its release and its data."
        for site, name, value in told
        if name.endswith("/index_alarm") and value > 0
    ]
