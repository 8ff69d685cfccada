"""A round's admitted updates as a rule sees them: what each site's arrays are and count, group by group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from medfl import rules
from medfl.enrolment import Enrolled
from medfl.errors import ConfigError
from medfl.gate import Update
from medfl.layout import Flat, Layout
from medfl.methods.base import Role
from medfl.study import Study
from medfl.whole import Whole

Rule = Callable[[Sequence[np.ndarray], Sequence[float], rules.Before], np.ndarray]
Weigh = Callable[[Sequence[str]], Mapping[str, Mapping[str, float]]]  # sites -> group -> site -> share
SAMPLE = 1 << 16  # coordinates of a group from which influence is estimated


@dataclass(frozen=True)
class Ballot:
    """The sites' arrays, in site order, and what was broadcast, for the groups of parameters and momentum encoders.

    Attributes:
        flats: of each site, what it holds.
        before: the broadcast.
        layers: places of the tensors with two or more axes, by group.
        volumes: of each site that can teach the group, 0 where it cannot, by group.
        whole: the sites' whole updates.
    """

    flats: Sequence[Flat]
    before: Flat
    layers: Mapping[str, Sequence[tuple[int, int]]]
    volumes: Mapping[str, Sequence[float]]
    whole: Whole

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
    ) -> "Ballot":
        """
        A site's share of volumes with a modality is taken to be the same in a round as in all its training volumes.

        Args:
            needed: owner group of the volumes that the phase trains on; "": all.
            accepted: norms of the updates accepted so far.
        """
        groups = {g: slots for g, slots in sends.groups.items() if slots[0].role in (Role.PARAMETER, Role.TARGET)}
        before, flats = {group: broadcast[group] for group in groups}, [update.flat for update in updates]
        layers = {g: [(s.offset, s.size) for s in slots if len(s.shape) > 1] for g, slots in groups.items()}
        volumes = {
            group: [u.volumes * sites[u.site].share(slots[0].owner, needed) * (group in u.flat) for u in updates]
            for group, slots in groups.items()
        }
        return cls(flats, before, layers, volumes, Whole.of(flats, before, accepted))

    def count(self, rule: Rule, max_share: float) -> Flat:
        """Each group over the sites that can teach it, by their volumes; what nobody can teach is left out."""
        aggregate: Flat = {}
        for group, volumes in self.volumes.items():
            places = [place for place, volume in enumerate(volumes) if volume]
            if places:
                weights = rules.site_weights([volumes[place] for place in places], max_share)
                before = rules.Before(self.before[group], self.layers[group], self.whole, places)
                aggregate[group] = rule([self.flats[place][group] for place in places], weights, before)
        return aggregate

    def without(self, place: int) -> "Ballot":
        """The same without one site."""
        volumes = {group: [*found[:place], *found[place + 1 :]] for group, found in self.volumes.items()}
        flats = [*self.flats[:place], *self.flats[place + 1 :]]
        return replace(self, flats=flats, volumes=volumes, whole=self.whole.without(place))

    def thinned(self, most: int) -> "Ballot":
        """Every so many coordinates of each group alone, at most `most`; what is known of whole updates stays."""
        steps = {group: -(-array.size // most) or 1 for group, array in self.before.items()}
        flats = [{g: flat[g][:: steps[g]] for g in steps if g in flat} for flat in self.flats]
        layers = {
            group: [(start, end - start) for start, end in _thinned(places, steps[group]) if end > start]
            for group, places in self.layers.items()
        }
        return replace(self, flats=flats, before={g: self.before[g][:: steps[g]] for g in steps}, layers=layers)


def _thinned(places: Sequence[tuple[int, int]], step: int) -> list[tuple[int, int]]:
    """First and last place of what is left of each layer, if every `step`-th coordinate of the group is."""
    return [(-(-offset // step), -(-(offset + size) // step)) for offset, size in places]


def influence(ballot: Ballot, rule: Rule, max_share: float) -> list[float]:
    """How far the aggregate would be without each site, in units of its own step, as the rule itself has it.

    Estimated on at most SAMPLE evenly spread coordinates of each group. [] for one site, where nothing moved, or where
    the rule refuses one site fewer.
    """
    thin = ballot.thinned(SAMPLE)
    scales = {group: ballot.before[group].size / max(array.size, 1) for group, array in thin.before.items()}

    def distance(one: Flat, other: Flat) -> float:
        gaps = {g: one.get(g, old).astype(np.float64) - other.get(g, old) for g, old in thin.before.items()}
        return float(np.sqrt(sum(scales[group] * float(gap @ gap) for group, gap in gaps.items())))

    aggregate = thin.count(rule, max_share)
    step = distance(aggregate, thin.before)
    if len(ballot.flats) < 2 or not step:
        return []
    try:
        others = [thin.without(place).count(rule, max_share) for place in range(len(ballot.flats))]
    except ConfigError:
        return []
    return [distance(aggregate, other) / step for other in others]


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
