"""Who takes part in one sum: what every site must be told alike, since masks only cancel between sites that were."""

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medfl.errors import CredentialError, PolicyError
from medfl.layout import Layout
from medfl.messages import Answer, Order
from medfl.protection import Secagg
from medfl.provision.keys import verify
from medfl.secagg.layouts import OFFER, OFFERED, packed, unpacked

MOST_SITES = 1000
AVERAGED = ("parameter/", "target/")  # beginnings of the groups whose weighted mean is taken; of others the plain sum
SLACK = 1e-9  # of sums of weights, for rounding
MOST_LEFT = 0.75  # of a mean, one site's part where others dropped out


@dataclass(frozen=True)
class Ticket:
    """Which sum it is."""

    session: str  # the nonce of the request for keys
    kind: str  # pretrain | finetune | refresh: the answer that is masked
    lineage: str
    round: int

    def offer(self, site: str, keys: bytes) -> bytes:
        """What a site signs of its public keys."""
        return json.dumps(["keys for a sum", asdict(self), site, keys.hex()]).encode()


@dataclass(frozen=True)
class Entry:
    """One site: 64 bytes of public keys, whose signature they bear, what it owns, and its weight in each group."""

    keys: str  # base64
    signature: str  # base64
    owners: tuple[str, ...]
    weights: Mapping[str, float]  # of the groups that are averaged; 0: it sends zeros

    @cached_property
    def sealing(self) -> bytes:
        """The public key under which shares are sealed for it."""
        return base64.b64decode(self.keys)[: OFFER // 2]

    @cached_property
    def masking(self) -> bytes:
        """The public key from which its masks with others come."""
        return base64.b64decode(self.keys)[OFFER // 2 :]

    def sends(self, owner: str) -> bool:
        return not owner or owner in self.owners

    def weight(self, group: str) -> float:
        """The factor of its numbers in a group."""
        return self.weights.get(group, 0.0) if group.startswith(AVERAGED) else 1.0


@dataclass(frozen=True)
class Roster:
    """The sites of one sum, by name."""

    ticket: Ticket
    sites: Mapping[str, Entry]

    @cached_property
    def text(self) -> str:
        tree = {"ticket": asdict(self.ticket), "sites": {name: asdict(self.sites[name]) for name in sorted(self.sites)}}
        return json.dumps(tree, sort_keys=True)

    @cached_property
    def context(self) -> bytes:
        """SHA-256 of all of it. Every key is derived from it: who is told another roster gets other masks."""
        return hashlib.sha256(self.text.encode()).digest()

    @classmethod
    def read(cls, text: str) -> "Roster":
        """
        Raises:
            PolicyError: it is no roster.
        """
        try:
            tree = json.loads(text)
            sites = {str(name): _entry(node) for name, node in tree["sites"].items()}
            return cls(Ticket(**tree["ticket"]), sites)
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            raise PolicyError("the request holds no list of the sites of a sum. Nothing was sent.") from None

    def place(self, site: str) -> int:
        """The place of a site's shares, from 1."""
        return sorted(self.sites).index(site) + 1

    def behind(self, group: str, owner: str, among: Collection[str]) -> list[str]:
        """Those of some sites whose values count in a group."""
        return [n for n, e in self.sites.items() if n in among and e.sends(owner) and e.weight(group) > 0]

    def check(self, settings: Secagg, max_share: float) -> None:
        """What any site can see by itself.

        Raises:
            PolicyError: too few sites, a key that is there twice, or weights that would let one site stand out.
        """
        count = len(self.sites)
        if not settings.least <= count <= MOST_SITES:
            raise PolicyError(
                f"a sum over {count} sites: secagg.least asks for {settings.least}, at most {MOST_SITES} can be. "
                "Nothing was sent."
            )
        keys = [key for entry in self.sites.values() for key in (entry.sealing, entry.masking)]
        if len(set(keys)) < len(keys):
            raise PolicyError("two sites of a sum have one key, so they may be one. Nothing was sent.")
        for group in {group for entry in self.sites.values() for group in entry.weights}:
            _check_weights(group, [entry.weights.get(group, 0.0) for entry in self.sites.values()], max_share)

    def check_left(self, going: Collection[str], answers: Layout, settings: Secagg) -> None:
        """
        Args:
            answers: what the masked answers of all sites hold.

        Raises:
            PolicyError: too few sites to finish the sum, or to hide one another in each part of it.
        """
        many, need = len(set(going)), settings.needed(len(self.sites))
        if not set(going) <= self.sites.keys() or many < need:
            raise PolicyError(f"a sum over {many} of {len(self.sites)} sites, need {need}. Nothing was sent.")
        for slot in answers.slots:
            behind = self.behind(slot.name, slot.owner, going)
            if 0 < len(behind) < settings.least:
                raise PolicyError(
                    f"{slot.name}: a sum over {len(behind)} sites, secagg.least asks for {settings.least}. Nothing was "
                    "sent. More sites must hold what it is trained on, or take secagg.active=false."
                )
            weights = [self.sites[name].weight(slot.name) for name in behind]
            if behind and max(weights) > MOST_LEFT * math.fsum(weights):
                raise PolicyError(
                    f"{slot.name}: of the sites that are left, one would be {max(weights) / math.fsum(weights):.0%} of "
                    f"the mean, more than {MOST_LEFT:.0%}. Nothing was sent. Repeat the round when the others are back."
                )

    def check_signed(self, site: str, peers: Mapping[str, str]) -> None:
        """
        Args:
            site: whose own entry needs no signature.
            peers: public signing keys of the other sites, base64.

        Raises:
            CredentialError: a site that is not known here, or whose keys it did not sign.
        """
        for name, entry in self.sites.items():
            text = self.ticket.offer(name, base64.b64decode(entry.keys))
            if name != site and not (name in peers and verify(peers[name], text, entry.signature)):
                raise CredentialError(
                    f"the keys of site '{name[:40]}' for the sum are not signed by a key of policy.peers. Compare its "
                    "fingerprint with that site by phone, then add its signing key to site.yaml. Nothing was sent."
                )


def signed_offer(answer: Answer, order: Order, key: Ed25519PrivateKey) -> Answer:
    """An answer with public keys for a sum, signed by its site."""
    parts = unpacked(OFFERED, answer.flat)
    kind = str(json.loads(order.peers)["kind"])
    text = Ticket(order.nonce, kind, order.lineage, order.round).offer(answer.site, parts["keys"])
    return replace(answer, flat=packed(OFFERED, parts | {"signature": key.sign(text)}))


def _entry(node: Mapping[str, Any]) -> Entry:
    keys, signature = str(node["keys"]), str(node["signature"])
    weights = {str(group): float(weight) for group, weight in node["weights"].items()}
    if len(base64.b64decode(keys, validate=True)) != OFFER:
        raise ValueError("keys of another length")
    return Entry(keys, signature, tuple(str(owner) for owner in node["owners"]), weights)


def _check_weights(group: str, weights: list[float], max_share: float) -> None:
    """A weight near 1 beside others near 0 would make one site's update the mean, which is the sum over all weights."""
    used, total = [weight for weight in weights if weight > 0], math.fsum(weights)
    cap = max(max_share, 1 / max(len(used), 1))
    if not all(0 <= weight <= (cap + SLACK) * total for weight in weights) or not total <= 1 + SLACK:
        raise PolicyError(f"{group}: a weight is beyond rounds.max_share={max_share:g}. Nothing was sent.")
