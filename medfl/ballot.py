"""A round's admitted updates as a rule sees them: what each site's arrays are and count, group by group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medfl import rules
from medfl.enrolment import Enrolled
from medfl.errors import ConfigError, NetworkError
from medfl.gate import Update
from medfl.layout import Flat, Layout, Slot
from medfl.methods.base import Role
from medfl.study import Study
from medfl.whole import Whole

Rule = Callable[[Sequence[np.ndarray], Sequence[float], rules.Before], np.ndarray]
Weigh = Callable[[Sequence[str]], Mapping[str, Mapping[str, float]]]  # sites -> group -> site -> share
SAMPLE = 1 << 16  # coordinates of a group from which influence is estimated
SAMPLED = 1 << 20  # of all sites together


@dataclass(frozen=True)
class Ballot:
    """The sites' arrays, in site order, and what was broadcast, for the groups of parameters and momentum encoders.

    Attributes:
        flats: of each site, what it holds.
        before: the broadcast.
        layers: places of the tensors with two or more axes, by group.
        volumes: of each site that can teach the group, 0 where it cannot, by group.
        whole: the sites' whole updates.
        scales: coordinates of the update behind each of those here, by group; above 1 in a sample.
        missing: sites that were asked and have no update here.
    """

    flats: Sequence[Flat]
    before: Flat
    layers: Mapping[str, Sequence[tuple[int, int]]]
    volumes: Mapping[str, Sequence[float]]
    whole: Whole
    scales: Mapping[str, float]
    missing: int = 0

    @classmethod
    def of(
        cls,
        updates: Sequence[Update],
        sites: Mapping[str, Enrolled],
        sends: Layout,
        broadcast: Flat,
        *,
        needed: str = "",
        accepted: Sequence[float] = (),
        steps: Mapping[str, int] | None = None,
    ) -> "Ballot":
        """
        Args:
            sites: those that were asked, by name.
            needed: owner group of the volumes that the phase trains on; "": all.
            accepted: norms of the updates accepted so far.
            steps: where the updates hold samples as `thin` makes them.
        """
        groups = counted_groups(sends)
        steps = steps or dict.fromkeys(groups, 1)
        before, flats = thin({g: broadcast[g] for g in groups}, steps), [update.flat for update in updates]
        places = {g: [(s.offset, s.size) for s in slots if len(s.shape) > 1] for g, slots in groups.items()}
        layers = {g: _thinned(places[g], steps[g]) for g in groups}
        volumes = {g: [volumes_of(u, sites[u.site], s[0].owner, g, needed) for u in updates] for g, s in groups.items()}
        scales = {g: broadcast[g].size / max(array.size, 1) for g, array in before.items()}
        return cls(flats, before, layers, volumes, Whole.of(flats, before, accepted), scales, len(sites) - len(updates))

    def count(self, rule: Rule, max_share: float) -> Flat:
        """Each group over the sites that can teach it, by their volumes; what nobody can teach is left out."""
        aggregate: Flat = {}
        for group, volumes in self.volumes.items():
            places = [place for place, volume in enumerate(volumes) if volume]
            if places:
                weights = rules.site_weights([volumes[place] for place in places], max_share)
                before = rules.Before(self.before[group], self.layers[group], self.whole, places, self.missing)
                aggregate[group] = rule([self.flats[place][group] for place in places], weights, before)
        return aggregate

    def without(self, place: int) -> "Ballot":
        """The same without one site."""
        volumes = {group: [*found[:place], *found[place + 1 :]] for group, found in self.volumes.items()}
        flats = [*self.flats[:place], *self.flats[place + 1 :]]
        return replace(self, flats=flats, volumes=volumes, whole=self.whole.without(place))

    def thinned(self, most: int) -> "Ballot":
        """Every so many coordinates of each group alone, at most `most`; what is known of whole updates stays."""
        steps = steps_to(self.before, most)
        before = thin(self.before, steps)
        layers = {group: _thinned(places, steps[group]) for group, places in self.layers.items()}
        scales = {g: self.scales[g] * self.before[g].size / max(array.size, 1) for g, array in before.items()}
        return replace(self, flats=[thin(f, steps) for f in self.flats], before=before, layers=layers, scales=scales)


def counted_groups(sends: Layout) -> dict[str, tuple[Slot, ...]]:
    """The groups that a rule adds up."""
    return {g: slots for g, slots in sends.groups.items() if slots[0].role in (Role.PARAMETER, Role.TARGET)}


def volumes_of(update: Update, site: Enrolled, owner: str, group: str, needed: str) -> float:
    """Volumes by which an update counts in a group; 0 where it does not hold it.

    A site's share of volumes with a modality is taken to be the same in a round as in all its training volumes.
    """
    return update.volumes * site.share(owner, needed) * (group in update.flat)


def steps_to(before: Flat, most: int) -> dict[str, int]:
    """How many coordinates of each group become one, so that at most `most` of it are left."""
    return {group: -(-array.size // most) or 1 for group, array in before.items()}


def thin(flat: Flat, steps: Mapping[str, int]) -> Flat:
    """Every so many coordinates of each group that is there: views."""
    return {group: flat[group][::step] for group, step in steps.items() if group in flat}


def _thinned(places: Sequence[tuple[int, int]], step: int) -> list[tuple[int, int]]:
    """Offset and size of what is left of each layer, if every `step`-th coordinate of the group is."""
    ends = [(-(-offset // step), -(-(offset + size) // step)) for offset, size in places]
    return [(start, end - start) for start, end in ends if end > start]


def sample_for(sites: int) -> int:
    """Coordinates of a group that are looked at of each site."""
    return max(1, min(SAMPLE, SAMPLED // max(sites, 1)))


def influence(ballot: Ballot, rule: Rule, max_share: float) -> list[float]:
    """How far the aggregate would be without each site, in units of its own step, as the rule itself has it.

    Estimated on evenly spread coordinates of each group. [] for one site, where nothing moved, or where the rule
    refuses one site fewer.
    """
    small = ballot.thinned(sample_for(len(ballot.flats)))
    aggregate = small.count(rule, max_share)
    step = np.sqrt(_squares(small, aggregate, small.before))
    if len(ballot.flats) < 2 or not step:
        return []
    try:
        found = _without_each(small, rule, max_share, aggregate)
    except (ConfigError, NetworkError):
        return []
    return [float(np.sqrt(square) / step) for square in found]


def _squares(ballot: Ballot, one: Flat, other: Flat) -> float:
    """Squared distance of two aggregates; a group that is missing is as it was before."""
    gaps = {g: one.get(g, old).astype(np.float64) - other.get(g, old) for g, old in ballot.before.items()}
    return sum(ballot.scales[group] * float(gap @ gap) for group, gap in gaps.items())


def _without_each(ballot: Ballot, rule: Rule, max_share: float, aggregate: Flat) -> np.ndarray:
    """Squared distance of the aggregate to that without each site, (sites,)."""
    sites = range(len(ballot.flats))
    if not rules.linear(rule):
        return np.array([_squares(ballot, aggregate, ballot.without(n).count(rule, max_share)) for n in sites])
    found = np.zeros(len(sites))
    for group, volumes in ballot.volumes.items():
        places = [place for place in sites if volumes[place]]
        if not places:
            continue
        values = np.array([ballot.flats[place][group] for place in places], dtype=np.float64)
        others = _rest(rule, [volumes[place] for place in places], max_share) @ values
        if len(places) == 1:  # nobody else can teach it
            others = ballot.before[group].astype(np.float64)[None]
        gaps = others - aggregate[group]
        found[places] += ballot.scales[group] * np.einsum("ij,ij->i", gaps, gaps)
    return found


def _rest(rule: Rule, volumes: Sequence[float], max_share: float) -> np.ndarray:
    """What the sites weigh without each of them, (left out, site)."""
    weights = np.zeros((len(volumes), len(volumes)))
    for place in range(len(volumes)):
        rest = [*volumes[:place], *volumes[place + 1 :]]
        if rest:
            weights[place] = np.insert(rules.shares_of(rule, rest, max_share), place, 0.0)
    return weights


def weights_before(sends: Layout, study: Study, sites: Sequence[Enrolled], steps: int, needed: str) -> Weigh:
    """What `count` would weigh the sites' groups by, from what they enrolled with, before they answer."""
    named = {site.name: site for site in sites}
    uniform = str(study.rule["_target_"]).endswith(".uniform_mean")

    def weigh(names: Sequence[str]) -> dict[str, dict[str, float]]:
        found = {}
        for group, slots in sends.groups.items():
            if slots[0].role not in (Role.PARAMETER, Role.TARGET):
                continue
            seen = {name: min(named[name].volumes, steps * study.training.batch_size) for name in names}
            volumes = {n: v * named[n].share(slots[0].owner, needed) for n, v in seen.items()}
            held = {name: 1.0 if uniform else volume for name, volume in volumes.items() if volume}
            cap = 1.0 if uniform else study.rounds.max_share
            shares = rules.site_weights(list(held.values()), cap) if held else []
            found[group] = dict(zip(held, shares, strict=True))
        return found

    return weigh
