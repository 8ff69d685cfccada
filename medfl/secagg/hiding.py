"""What a site adds to its numbers, and what of it the server can take off the sum."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from medfl.errors import PolicyError
from medfl.layout import Flat, Layout
from medfl.protection import Secagg
from medfl.secagg import layouts, masks, shamir
from medfl.secagg.fixed import Scale
from medfl.secagg.roster import AVERAGED, Roster


def scale_of(group: str, settings: Secagg, sites: int) -> Scale:
    """The fixed point of a group: weights add up to 1 at most, plain sums grow with the sites."""
    dtype = group.rpartition("/")[2]
    if group.startswith(AVERAGED):
        return Scale.of(dtype, settings.update_range, settings.update_range, "secagg.update_range")
    return Scale.of(dtype, settings.sum_range, settings.sum_range * sites, "secagg.sum_range")


@dataclass(frozen=True)
class Hiding:
    """The masks of one site: one of its own, and one with each peer that the peer takes away."""

    site: str
    roster: Roster
    own: bytes  # seed
    seeds: Mapping[str, bytes]  # by peer

    def masked(
        self, layout: Layout, flat: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], settings: Secagg
    ) -> tuple[Flat, float]:
        """A site's numbers as they leave, and ‖update‖².

        Args:
            layout: of the masked answer of this site.
            flat: the plain numbers; of the groups that are averaged the change from `before` is sent, by its weight.

        Raises:
            ConfigError, DivergedError: a number that cannot be summed.
            PolicyError: a group without this site's weight.
        """
        out, squares, me = layout.empty(), 0.0, self.roster.sites[self.site]
        for group, owner, place in layouts.views(layout, out):
            scale, averaged = scale_of(group, settings, len(self.roster.sites)), group.startswith(AVERAGED)
            if averaged and group not in me.weights:
                raise PolicyError(f"{group}: the list of the sites of the sum has no weight for it. Nothing was sent.")
            start = before[group] if averaged else None
            squared = scale.encode(flat[group], place, factor=me.weight(group), before=start)
            squares += squared * averaged
            masks.add(place, self.own, group, sign=1)
            for peer, seed in self.seeds.items():
                if self.roster.sites[peer].sends(owner):
                    masks.add(place, seed, group, sign=sign(self.site, peer))
        return out, squares


def sign(site: str, peer: str) -> int:
    """How a site adds the mask that it has with a peer; the peer adds it the other way."""
    return 1 if site < peer else -1


def digest_of(broadcast: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of what the answers of one sum are made from."""
    found = hashlib.sha256()
    for group in sorted(broadcast):
        array = np.ascontiguousarray(broadcast[group])
        found.update(f"{group} {array.dtype.str} {array.size}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def mask_seed(secret: bytes, roster: Roster, peer: str, broadcast: str) -> bytes:
    """Seed of the mask that the owner of a masking key has with a peer.

    Who got another broadcast has other masks: else the others could be sent weights that nothing moves from, and the
    sum would be one site's update (Pasquini et al., "Eluding secure aggregation", CCS 2022).
    """
    return masks.agreed(secret, roster.sites[peer].masking, roster.context, f"mask of {broadcast}")


def unmask(
    roster: Roster,
    layout: Layout,
    answers: Mapping[str, Flat],
    secrets: Mapping[str, bytes],
    settings: Secagg,
    *,
    broadcast: str,
) -> Flat:
    """The sums over the sites that answered: means (the change from the broadcast) or plain sums, float64.

    Groups that nobody behind them answered are left out.

    Args:
        layout: of the masked answers of all sites.
        answers: the masked answers, by site.
        secrets: seed of the mask of each site that answered, masking key of each that did not.
        broadcast: digest of what the answers were made from.

    Raises:
        ValueError: masks are left in a sum.
    """
    seeds = {gone: _seeds(roster, gone, secrets[gone], answers, broadcast) for gone in secrets.keys() - answers.keys()}
    found: Flat = {}
    for group, owner, size in _groups(layout):
        senders = [site for site in answers if roster.sites[site].sends(owner)]
        if not (behind := roster.behind(group, owner, senders)):
            continue
        scale = scale_of(group, settings, len(roster.sites))
        total = np.zeros(size, scale.dtype)
        for site in senders:
            parts = {name: place for name, _, place in layouts.views(layout, answers[site])}
            total += parts[group]
            masks.add(total, secrets[site], group, sign=-1)
            for gone, seed in seeds.items():
                if roster.sites[gone].sends(owner):
                    masks.add(total, seed[site], group, sign=-sign(site, gone))
        found[group] = scale.decode(total)
        if group.startswith(AVERAGED):
            found[group] /= sum(roster.sites[site].weight(group) for site in behind)
    return found


def _groups(layout: Layout) -> Iterator[tuple[str, str, int]]:
    return ((slot.name, slot.owner, slot.size) for slot in layout.slots)


def _seeds(roster: Roster, gone: str, secret: bytes, peers: Mapping[str, Flat], broadcast: str) -> dict[str, bytes]:
    """Seeds of the masks between a site that is gone and those that answered."""
    if masks.public_of(secret) != roster.sites[gone].masking:
        raise ValueError(f"the shares of the key of site '{gone}' are not of its key")
    return {peer: mask_seed(secret, roster, peer, broadcast) for peer in peers}


def secrets_of(roster: Roster, revealed: Mapping[str, Mapping[str, bytes]], need: int) -> dict[str, bytes]:
    """Each site's secret that the revealed shares are of.

    Args:
        revealed: site that answered -> "mask of SITE" or "key of SITE" -> its share.
        need: shares that give a secret.

    Raises:
        ValueError: the shares of one site are not of one secret.
    """
    labels = next(iter(revealed.values()))
    found = {}
    for label in labels:
        shares = {roster.place(site): parts[label] for site, parts in list(revealed.items())[:need]}
        found[label.partition(" of ")[2]] = shamir.join(shares)
    return found
