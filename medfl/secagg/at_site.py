"""Secure aggregation at a site: the steps around a masked answer, and the answer itself."""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medfl.errors import PolicyError
from medfl.layout import Layout
from medfl.messages import Answer, Broadcast, Order
from medfl.secagg import layouts
from medfl.secagg.hiding import Hiding, digest_of
from medfl.secagg.roster import AVERAGED, Roster, Ticket
from medfl.secagg.session import Session
from medfl.site import Site
from medfl.state import SiteState

LINEAGE = re.compile(r"[0-9a-f]{32}")
STEPS = ("keys", "shares", "unmask")
Act = Callable[[Site, Broadcast], Answer]


def answered(site: Site, kind: str, broadcast: Broadcast, act: Act) -> tuple[Answer, Layout]:
    """The answer to a request, and what it may hold: under secure aggregation no sum or weight of this site as it is.

    Raises:
        PolicyError: a request that secure aggregation forbids, or a step of it that does not hide this site.
    """
    active = site.shop.study.secagg.active
    if (kind == "codebook" and active) or (kind in STEPS and not active):
        raise PolicyError(f"request {kind}: not with secagg.active={str(active).lower()}. Nothing was sent.")
    if kind in STEPS:
        return act(site, broadcast), _of_step(kind, broadcast.order)
    plain = site.leaves(kind)
    if not active or not _all(site, kind).slots:
        return act(site, broadcast), plain
    hiding = _receive(site, kind, broadcast)  # before hours of training
    return _hidden(site, hiding, act(site, broadcast), broadcast, kind), layouts.masked(plain)


def offer(site: Site, broadcast: Broadcast) -> Answer:
    """Fresh public keys for one sum; at a real site they leave signed."""
    order = broadcast.order
    kind = str(_peers(order).get("kind"))
    if not _all(site, kind).slots:
        raise PolicyError(f"keys for a sum of {kind[:40]!r}, which is none. Nothing was sent.")
    ticket = Ticket(order.nonce, kind, order.lineage, order.round)
    session = Session.begin(_folder(site, order), site.data.name, ticket)
    parts = {"keys": session.public, "signature": bytes(layouts.SIGNATURE)}
    return _answer(site, order, layouts.OFFERED, parts)


def share(site: Site, broadcast: Broadcast) -> Answer:
    """Shares of this site's secrets, each sealed for one of the others."""
    order, study = broadcast.order, site.shop.study
    roster = Roster.read(order.peers)
    session = Session.load(_folder(site, order), site.data.name, roster.ticket.session)
    sealed = session.share(roster, study.secagg, tuple(site.holdings), study.rounds.max_share)
    sealed[site.data.name] = bytes(layouts.SEALED)
    return _answer(site, order, layouts.sealed(sealed), {f"for {name}": text for name, text in sealed.items()})


def unmask(site: Site, broadcast: Broadcast) -> Answer:
    """Shares that lift the masks of the sum; the session is over then."""
    order = broadcast.order
    session = Session.load(_folder(site, order), site.data.name, str(_peers(order).get("session")))
    alive, gone = _named(order)
    answers = layouts.masked(_all(site, session.ticket.kind))
    revealed = session.reveal(alive, gone, answers, site.shop.study.secagg)
    return _answer(site, order, layouts.opened(alive, gone), revealed)


def _receive(site: Site, kind: str, broadcast: Broadcast) -> Hiding:
    """Open what the peers sealed for this site, and commit to one masked answer."""
    order = broadcast.order
    tree = _peers(order)
    session = Session.load(_folder(site, order), site.data.name, str(tree.get("session")))
    if session.ticket.kind != kind or session.ticket.round != order.round:
        raise PolicyError(f"request {kind}: the keys were made for another sum. Nothing was sent.")
    me = site.data.name
    try:
        sealed = {
            str(maker): {me: base64.b64decode(parts[me], validate=True)} if maker != me else {}
            for maker, parts in tree["shares"].items()
        }
    except (KeyError, TypeError, AttributeError, binascii.Error, ValueError):
        raise PolicyError("the request lacks shares sealed for this site. Nothing was sent.") from None
    answers, settings = layouts.masked(_all(site, kind)), site.shop.study.secagg
    return session.receive(sealed, answers, settings, broadcast=digest_of(broadcast.flat))


def _hidden(site: Site, hiding: Hiding, answer: Answer, broadcast: Broadcast, kind: str) -> Answer:
    """The answer under masks; a site bounds its own update here, since nobody else can.

    Raises:
        PolicyError: the update is longer than the study allows.
    """
    study, before = site.shop.study, broadcast.flat
    flat, squares = hiding.masked(layouts.masked(site.leaves(kind)), answer.flat, before, study.secagg)
    size = sum(float(np.dot(array, array)) for group, array in before.items() if group.startswith(AVERAGED))
    if math.sqrt(squares) > study.rounds.max_update * math.sqrt(size):
        raise PolicyError(
            f"the update has norm {math.sqrt(squares):.3g}, more than rounds.max_update={study.rounds.max_update:g} "
            f"times the broadcast's {math.sqrt(size):.3g}. Lower training.optimizer.lr. Nothing was sent."
        )
    return replace(answer, layout=layouts.masked(_all(site, kind)).digest, flat=flat)


def _all(site: Site, kind: str) -> Layout:
    """What the plain answers of all sites hold together, where they are summed."""
    shop = site.shop
    return {"pretrain": shop.answers, "finetune": shop.answers, "refresh": shop.sums}.get(kind, Layout(()))


def _answer(site: Site, order: Order, layout: Layout, parts: dict[str, bytes]) -> Answer:
    return Answer(site.data.name, order.nonce, layout.digest, {}, layouts.packed(layout, parts))


def _of_step(kind: str, order: Order) -> Layout:
    if kind == "keys":
        return layouts.OFFERED
    if kind == "shares":
        return layouts.sealed(Roster.read(order.peers).sites)
    return layouts.opened(*_named(order))


def _folder(site: Site, order: Order) -> Path:
    if not LINEAGE.fullmatch(order.lineage):
        raise PolicyError("the request is of no lineage that a server of this release makes. Nothing was sent.")
    return SiteState(Path(site.shop.study.state_dir), order.lineage, site.data.name).folder


def _peers(order: Order) -> dict[str, Any]:
    try:
        tree = json.loads(order.peers)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise PolicyError("under secagg.active a request names the other sites; this one does not. Nothing was sent.")
    return tree


def _named(order: Order) -> tuple[list[str], list[str]]:
    tree = _peers(order)
    alive, gone = tree.get("alive"), tree.get("gone")
    if not isinstance(alive, list) or not isinstance(gone, list) or not all(isinstance(n, str) for n in alive + gone):
        raise PolicyError("the request to unmask does not say whose answers came. Nothing was sent.")
    return sorted(set(alive)), sorted(set(gone))
