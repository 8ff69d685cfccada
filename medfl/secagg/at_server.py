"""Secure aggregation at the server: three small exchanges around the one that brings masked answers."""

import base64
import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medfl.enrolment import Enrolled, Federation
from medfl.errors import NetworkError
from medfl.exchange import Request, collect
from medfl.gate import Update
from medfl.layout import Flat, Layout
from medfl.messages import KEYS, SHARES, UNMASK, Order
from medfl.secagg import layouts
from medfl.secagg.hiding import digest_of, secrets_of, unmask
from medfl.secagg.roster import AVERAGED, Entry, Roster, Ticket

ALL = "all sites"  # whose name a sum bears
Weigh = Callable[[Sequence[str]], Mapping[str, Mapping[str, float]]]
REMARK = (
    "secure aggregation: the server sees sums over the sites alone. There is no check of one site's update, no bound "
    "on its growth, no codebook or feature diagnostics by site, and the codes of sites that join late are not matched."
)


ONE_SITE = ("/exclusivity", "/rare", "/site_separability")  # ends of figures that need the sums of each site


def collect_added(
    federation: Federation,
    request: Request,
    sites: Sequence[Enrolled],
    weigh: Weigh,
    take: Callable[[Update], Update] | None = None,
) -> tuple[list[Update], list[Update]]:
    """The sites' answers, and what is to be added up of them: those, or their sum alone under secure aggregation.

    Args:
        take: as of `collect`; a sum is not taken.
    """
    if not (federation.study.secagg.active and request.answers.slots):
        updates = collect(federation, request, sites, take)
        return updates, updates
    updates, total = collect_sum(federation, request, sites, weigh)
    return updates, [total]


def is_sum(updates: Sequence[Update]) -> bool:
    return [update.site for update in updates] == [ALL]


def of_all(told: Sequence[tuple[str, str, float]]) -> list[tuple[str, str, float]]:
    """Those of the (site, name, value) that a sum over the sites can tell."""
    return [row for row in told if not row[0] and not row[1].endswith(ONE_SITE)]


def collect_sum(
    federation: Federation, request: Request, sites: Sequence[Enrolled], weigh: Weigh
) -> tuple[list[Update], Update]:
    """Send a request whose answers are added under masks: each site's numbers without tensors, and the sum of these.

    Args:
        weigh: names of the sites -> group -> site -> its weight in the mean.

    Raises:
        PolicyError: too few sites behind a part of the sum.
        NetworkError (or the sites' common error): too few sites at the end of a step; nothing is known of any then.
    """
    added = Sum.begin(federation, request, sites, weigh)
    shares = added.shares()
    updates = added.hidden(shares)
    masked = {update.site: update.flat for update in updates}
    found = added.unmasked(masked, sorted(shares.keys() - masked.keys()))
    total = Update(ALL, _placed(found, request.flat), 0, {"site/steps": float(request.order.steps)}, 0.0)
    return [replace(update, flat={}) for update in updates], total


@dataclass(frozen=True)
class Sum:
    """One sum in progress."""

    federation: Federation
    request: Request  # whose answers are added
    sites: Mapping[str, Enrolled]
    answers: Layout  # of the masked answers of all sites
    roster: Roster

    @classmethod
    def begin(cls, federation: Federation, request: Request, sites: Sequence[Enrolled], weigh: Weigh) -> "Sum":
        """Ask for keys; who sends them is on the roster."""
        study, kind = federation.study, request.stage
        asked = _small(request, KEYS, json.dumps({"kind": kind}), layouts.OFFERED)
        offers = {
            update.site: layouts.unpacked(layouts.OFFERED, update.flat) for update in collect(federation, asked, sites)
        }
        ticket = Ticket(asked.order.nonce, kind, asked.order.lineage, asked.order.round)
        weights, named = weigh(sorted(offers)), {site.name: site for site in sites}
        roster = Roster(ticket, {n: _entry(offers[n], named[n], weights) for n in offers})
        answers = layouts.masked(request.answers)
        roster.check(study.secagg, study.rounds.max_share)
        roster.check_left(roster.sites, answers, study.secagg)
        return cls(federation, request, named, answers, roster)

    def shares(self) -> dict[str, dict[str, str]]:
        """Maker -> recipient -> sealed shares, base64."""
        layout = layouts.sealed(self.roster.sites)
        found = {}
        for update in self._ask(_small(self.request, SHARES, self.roster.text, layout), self.roster.sites):
            parts = layouts.unpacked(layout, update.flat).items()
            found[update.site] = {name.removeprefix("for "): base64.b64encode(text).decode() for name, text in parts}
        return found

    def hidden(self, shares: Mapping[str, Mapping[str, str]]) -> list[Update]:
        """The masked answers."""
        order = _ordered(self.request, self._said(shares=shares))
        request = replace(self.request, order=order, answers=self.answers, digest=self.answers.digest, norms=())
        return self._ask(request, shares)

    def unmasked(self, masked: Mapping[str, Flat], gone: Sequence[str]) -> Flat:
        """The sums.

        Args:
            gone: sites that shared their secrets and sent no masked answer.
        """
        study, alive = self.federation.study, sorted(masked)
        layout = layouts.opened(alive, gone)
        asked = _small(self.request, UNMASK, self._said(alive=alive, gone=gone), layout)
        revealed = {u.site: layouts.unpacked(layout, u.flat) for u in self._ask(asked, alive)}
        try:
            secrets = secrets_of(self.roster, revealed, study.secagg.needed(len(self.roster.sites)))
            digest = digest_of(self.request.flat)
            return unmask(self.roster, self.answers, masked, secrets, study.secagg, broadcast=digest)
        except ValueError as error:
            raise NetworkError(
                f"{_where(self.request)}: {error}. A site sent a wrong share, or masked with other keys. Repeat the "
                "round; if it fails again, leave out the sites one by one."
            ) from None

    def _said(self, **more: object) -> str:
        return json.dumps({"session": self.roster.ticket.session} | more)

    def _ask(self, request: Request, names: Collection[str]) -> list[Update]:
        """
        Raises:
            NetworkError (or the sites' common error): the sum cannot be finished.
            PolicyError: too few sites are left behind a part of it.
        """
        settings = self.federation.study.secagg
        updates = collect(self.federation, request, [self.sites[name] for name in sorted(names)])
        if len(updates) < (need := settings.needed(len(self.roster.sites))):
            raise NetworkError(
                f"{_where(request)}: {len(updates)} of {len(self.roster.sites)} sites are left of the sum, "
                f"secagg.threshold and secagg.least ask for {need}. Nothing was revealed; the round can be repeated."
            )
        if request.kind != UNMASK:  # shares of a sum may come from any sites
            self.roster.check_left([update.site for update in updates], self.answers, settings)
        return updates


def _ordered(request: Request, peers: str) -> Order:
    """The order under a nonce of its own."""
    return replace(request.order, nonce=uuid.uuid4().hex, peers=peers)


def _small(request: Request, kind: str, peers: str, answers: Layout) -> Request:
    """A step around the masked answer: no tensors go out, bytes come back."""
    order, nothing = _ordered(request, peers), Layout(())
    return Request(kind, order, nothing, {}, answers, answers.digest, trains=False, deadline=request.deadline)


def _entry(offer: Mapping[str, bytes], site: Enrolled, weights: Mapping[str, Mapping[str, float]]) -> Entry:
    coded = {name: base64.b64encode(part).decode() for name, part in offer.items()}
    own = {group: shares.get(site.name, 0.0) for group, shares in weights.items()}
    return Entry(coded["keys"], coded["signature"], tuple(sorted(site.holdings)), own)


def _placed(found: Flat, before: Mapping[str, np.ndarray]) -> Flat:
    """Means as new values beside the broadcast; plain sums as they are."""
    return {
        group: (before[group] + values).astype(before[group].dtype) if group.startswith(AVERAGED) else values
        for group, values in found.items()
    }


def _where(request: Request) -> str:
    return f"arm '{request.order.arm}', round {request.order.round}, {request.stage}"
