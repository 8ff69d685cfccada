"""The phases of a method as a function of the round's number: server and sites compute the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from medfl.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """One phase and its rounds, `first` to `last`, counted from 1."""

    name: str
    first: int
    last: int

    @property
    def rounds(self) -> int:
        return self.last - self.first + 1


def phases_of(shares: Mapping[str, float], rounds: int) -> list[Phase]:
    """All phases in order; each has its share of the rounds, to the nearest.

    Args:
        shares: name -> share of the rounds, above 0; they need not sum to 1.

    Raises:
        ConfigError: too few rounds for so many phases.
    """
    total = sum(shares.values())
    ends = [round(rounds * end / total) for end in accumulate(shares.values())]
    phases = [Phase(name, begin + 1, end) for name, begin, end in zip(shares, [0, *ends], ends, strict=False)]
    if any(phase.rounds < 1 for phase in phases):
        words = ", ".join(f"{name} {share / total:.0%}" for name, share in shares.items())
        raise ConfigError(f"rounds.count: got {rounds}, too few for the phases {words}. Raise it.")
    return phases


def phase_of(shares: Mapping[str, float], number: int, rounds: int) -> Phase:
    """The phase of round `number`; the first one for round 0, before training."""
    return next(phase for phase in phases_of(shares, rounds) if number <= phase.last)
