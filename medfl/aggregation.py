"""From the updates of a round to the server's step: as they come where the rule is a mean, else of all of them at once.

A mean needs each update once, so that the server's memory does not grow with the sites. A rule that looks at single
values or distances, and an inspection, need all updates together, in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from medfl import conduct, config, features, rules
from medfl.ballot import Ballot, Rule, counted_groups, influence, sample_for, steps_to, thin, volumes_of
from medfl.enrolment import Enrolled, Federation
from medfl.gate import Update
from medfl.layout import Flat
from medfl.rules import shares_of
from medfl.run_folder import Event
from medfl.server_state import Server
from medfl.turns import detached
from medfl.whole import Whole

Told = list[tuple[str, str, float]]  # site, name, value


def begin(federation: Federation, server: Server, sites: Sequence[Enrolled], asked: int, needed: str) -> "Together":
    """
    Args:
        sites: those that are asked in this round.
        asked: sites of the arm; a lone one is not outvoted.
        needed: owner group of the volumes that the phase trains on; "": all.
    """
    rule: Rule = config.partial(federation.study.rule) if asked > 1 else rules.weighted_mean
    kind = Streamed if rules.linear(rule) and federation.study.rounds.inspect == "none" else Together
    return kind(federation, server, {site.name: site for site in sites}, rule, needed)


class Together:
    """All updates are kept, and then count by the rule, less those that the inspection leaves out."""

    def __init__(
        self, federation: Federation, server: Server, sites: Mapping[str, Enrolled], rule: Rule, needed: str
    ) -> None:
        self.federation, self.server, self.sites, self.rule, self.needed = federation, server, sites, rule, needed
        self.study, self.max_share = federation.study, federation.study.rounds.max_share
        self._rehearse()
        self.pool = features.Pool(server.blueprint.answers)
        self.steps: Mapping[str, int] | None = None  # of samples, in place of whole arrays

    def _rehearse(self) -> None:
        """
        Raises:
            ConfigError: the rule needs more sites than can answer, told before hours of training.
        """
        if rules.linear(self.rule):
            return
        everybody = Whole(np.zeros((len(self.sites), len(self.sites))))
        for group, slots in counted_groups(self.server.blueprint.sends).items():
            able = [site for site in self.sites.values() if site.share(slots[0].owner, self.needed)]
            nothing = np.zeros(1, self.server.flat[group].dtype)
            before = rules.Before(nothing, (), everybody, range(len(able)))
            if able:
                self.rule([nothing] * len(able), [1.0] * len(able), before)

    def take(self, update: Update) -> Update:
        """An update in its turn, in the order of site names; what of it is still needed."""
        return self.pool.add(update)

    def step(self, updates: Sequence[Update]) -> tuple[list[Update], Told]:
        """Step the server to the aggregate; the updates that count, and what was seen of all."""
        server = self.server
        ballot = Ballot.of(
            self._seen(updates), self.sites, server.blueprint.sends, server.flat,
            needed=self.needed, accepted=server.norms, steps=self.steps,
        )  # fmt: skip
        judged = self._judged(updates, ballot)
        for place in sorted(judged.out, reverse=True):
            ballot = replace(ballot.without(place), missing=ballot.missing + 1)
        kept = [update for place, update in enumerate(updates) if place not in judged.out]
        moved = influence(ballot, self.rule, self.max_share)
        server.step(self._aggregate(ballot))
        return kept, judged.told + _influences(kept, moved)

    def _seen(self, updates: Sequence[Update]) -> Sequence[Update]:
        """What there is of the updates' arrays."""
        return updates

    def _aggregate(self, ballot: Ballot) -> Flat:
        return ballot.count(self.rule, self.max_share)

    def _judged(self, updates: Sequence[Update], ballot: Ballot) -> conduct.Judged:
        """What is remarked of the updates, in the run's records."""
        server, stage = self.server, self.federation.stage
        judged = conduct.judge(self.study, server.blueprint.sends, updates, ballot, server.earlier)
        number = server.round + 1
        out = [
            Event(stage, server.arm, number, updates[place].site, "refused", 1.0, f"left out: {text}")
            for place, text in sorted(judged.out.items())
        ]
        remarks = [Event(stage, server.arm, number, "", "remark", 1.0, text) for text in judged.remarks]
        self.federation.folder.write([*remarks, *out])
        return judged


class Streamed(Together):
    """Each update is added to the mean and let go; of its arrays a sample stays, for influence and conduct."""

    def __init__(
        self, federation: Federation, server: Server, sites: Mapping[str, Enrolled], rule: Rule, needed: str
    ) -> None:
        from medfl.adding import Mean  # numba takes half a second to import

        super().__init__(federation, server, sites, rule, needed)
        self.groups = counted_groups(server.blueprint.sends)
        self.sampling = self.steps = steps_to(
            {group: server.flat[group] for group in self.groups}, sample_for(len(sites))
        )
        self.uniform = rules.rule_of(rule) is rules.uniform_mean
        apart = 0 if self.uniform or self.max_share >= 1 else int(1 / self.max_share + 1e-9)
        self.means = {group: Mean(apart) for group in self.groups}
        self.samples: list[Update] = []

    def take(self, update: Update) -> Update:
        for group, slots in self.groups.items():
            volumes = volumes_of(update, self.sites[update.site], slots[0].owner, group, self.needed)
            if volumes:
                self.means[group].add(update.flat[group], 1.0 if self.uniform else volumes)
        sample = {group: array.copy() for group, array in thin(update.flat, self.sampling).items()}
        self.samples.append(replace(update, flat=sample))
        rest = self.pool.add(update)
        return detached(replace(rest, flat={g: array for g, array in rest.flat.items() if g not in self.groups}))

    def _seen(self, updates: Sequence[Update]) -> Sequence[Update]:
        del updates  # without arrays
        return self.samples

    def _aggregate(self, ballot: Ballot) -> Flat:
        del ballot  # of samples
        found: Flat = {}
        for group, mean in self.means.items():
            if mean.weights:
                volumes = mean.weights
                shares = shares_of(self.rule, volumes, self.max_share)
                capped = not self.uniform and max(volumes) > self.max_share * sum(volumes)
                found[group] = mean.mean(shares if capped else None)
        return found


def _influences(updates: Sequence[Update], moved: Sequence[float]) -> Told:
    return [(u.site, "round/influence", value) for u, value in zip(updates, moved, strict=bool(moved))]
