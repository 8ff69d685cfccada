"""The sections of a study on what protects its patients and sites, and what every section of a study is."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Self, get_args, get_origin

from medfl.errors import ConfigError, one_of


@dataclass(frozen=True)
class Section:
    """A typed part of the study; refuses unknown, missing and mistyped keys by name."""

    @classmethod
    def read(cls, node: Mapping[str, Any], at: str) -> Self:
        wanted = {field.name: field.type for field in fields(cls)}
        if strange := sorted(node.keys() - wanted.keys()):
            raise ConfigError(f"{at}: got unknown key {strange[0]!r}, need only {', '.join(wanted)}. Remove it.")
        if missing := sorted(wanted.keys() - node.keys()):
            raise ConfigError(f"{at}: {missing[0]!r} is missing. Add it, as in configs/{at}/default.yaml.")
        return cls(**{name: _typed(node[name], kind, f"{at}.{name}") for name, kind in wanted.items()})


def _typed(value: Any, kind: Any, at: str) -> Any:
    """`value` as `kind` (int passes for float); ConfigError otherwise."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(kind) is UnionType:  # X | None, or X | str
        kinds = get_args(kind)
        return value if type(value) in kinds else _typed(value, kinds[0], at)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{at}: got {value!r}, need a list such as [a, b].")
        return tuple(_typed(item, get_args(kind)[0], at) for item in value)
    base = get_origin(kind) or kind
    if not isinstance(value, base) or (isinstance(value, bool) and base is not bool):
        raise ConfigError(f"{at}: got {value!r} ({type(value).__name__}), need {base.__name__}.")
    return value


@dataclass(frozen=True)
class Privacy(Section):
    """Differential privacy at every site: of its patients, against everybody who sees what leaves it."""

    mechanism: str  # none | patient | group
    noise: float  # σ, in units of clip
    clip: float  # C, largest L2 norm of one unit's gradient
    bucket: int  # patients, on average; mechanism group
    images: int  # most of one patient in a step
    delta: float | None  # null: 1 / (10 patients of the site)
    max_epsilon: float | None  # per patient; null: no limit
    codes_noise: float  # σ of a release of the codebooks' sums
    codes_clip: float  # largest distance of a token to its code

    def __post_init__(self) -> None:
        one_of("privacy.mechanism", self.mechanism, ("none", "patient", "group"))
        for name in ("noise", "clip", "bucket", "images", "codes_noise", "codes_clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"privacy.{name}: got {getattr(self, name)}, need a number above 0.")
        if self.delta is not None and not 0 < self.delta < 0.1:
            raise ConfigError(f"privacy.delta: got {self.delta}, need a number in (0, 0.1), or null.")
        if self.max_epsilon is not None and not self.max_epsilon > 0:
            raise ConfigError(f"privacy.max_epsilon: got {self.max_epsilon}, need a number above 0, or null.")

    @property
    def on(self) -> bool:
        return self.mechanism != "none"


@dataclass(frozen=True)
class Secagg(Section):
    """Secure aggregation: the server gets sums over the sites in place of their updates."""

    active: bool
    least: int  # sites behind every sum
    threshold: float  # share of the sites that began a sum, without which nobody can finish it
    update_range: float  # largest change of a weight in one round
    sum_range: float  # largest plain sum of one site

    def __post_init__(self) -> None:
        if self.least < 3:
            raise ConfigError(f"secagg.least: got {self.least}, need at least 3: of two, each knows the other's part.")
        if not 0.6666 <= self.threshold <= 1:
            raise ConfigError(
                f"secagg.threshold: got {self.threshold}, need a share from 0.6666 to 1: with fewer, sites that are "
                "told of different drop-outs could unmask one of them."
            )
        for name in ("update_range", "sum_range"):
            if not 0 < (value := getattr(self, name)) < 1e15:
                raise ConfigError(f"secagg.{name}: got {value:g}, need a number above 0 and below 1e15.")

    def needed(self, sites: int) -> int:
        """How many of the sites that began a sum must be there at its end."""
        return max(math.ceil(self.threshold * sites), -(-2 * sites // 3), self.least)
