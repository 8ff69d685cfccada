"""The messages of a study, and their form as Flower records. The only file that knows the records' keys.

Tensors travel as raw little-endian bytes, one array per group of the layout: no pickle, no header to parse, and reading
is a view of the received bytes. 16-bit floats are packed without loss where that makes them shorter.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from medfl import PROTOCOL, __version__, codecs
from medfl.errors import VersionError
from medfl.layout import Flat

SITE_ERROR = 1000  # the code of an error reply is this plus the exit code of the error
DESCRIBE, REFRESH, SEED, EVALUATE = "query.describe", "query.refresh", "query.codebook", "evaluate.probe"
PRETRAIN, FINETUNE, SYNTHESIZE = "train.pretrain", "train.finetune", "train.synthesize"
KEYS, SHARES, UNMASK = "query.keys", "query.shares", "query.unmask"  # around a masked answer
TRAIN = {"pretrain": PRETRAIN, "finetune": FINETUNE}  # by stage
RAW, PACKED = "medfl.raw", "medfl.packed"  # the arrays' serialisation types
PACKABLE = 2  # bytes of a value that can be packed
_borrows = ContextVar("borrows", default=False)


@dataclass(frozen=True)
class Order:
    """What the server asks of a site; the reply must repeat `nonce`, so that an old reply never counts."""

    study: str  # resolved YAML
    lineage: str  # one per arm of a run; keys the site's own state
    arm: str
    phase: str
    round: int  # from 1
    rounds: int
    steps: int
    layout: str  # digest of the layout of the tensors sent along
    nonce: str
    parent: str = ""  # lineage of what this one started from: a site that kept parts of it goes on with them
    peers: str = ""  # secure aggregation: what this request says of the other sites, JSON


@dataclass(frozen=True)
class Broadcast:
    """Server to site: an order and the tensors to work with."""

    order: Order
    flat: Flat = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        order = ConfigRecord({**vars(self.order), "protocol": PROTOCOL, "release": __version__})
        return RecordDict({**_array_records(self.flat), "order": order})

    @classmethod
    def from_record(cls, record: RecordDict) -> "Broadcast":
        return cls(cls.order_of(record), {group: from_array(array) for group, array in arrays_of(record).items()})

    @staticmethod
    def order_of(record: RecordDict) -> Order:
        """
        Raises:
            VersionError: the server speaks another protocol.
        """
        order = record.config_records["order"]
        if order.get("protocol") != PROTOCOL:
            theirs = f"protocol {str(order.get('protocol'))[:10]} (medfl {str(order.get('release'))[:20]})"
            raise VersionError(
                f"the server speaks {theirs}, this site {PROTOCOL} (medfl {__version__}). Install one release on both."
            )
        kinds: dict[str, Any] = Order.__annotations__
        return Order(**{name: kind(order[name]) for name, kind in kinds.items()})


@dataclass(frozen=True)
class Answer:
    """Site to server: who it is, the request it answers, named numbers, and tensors if any were asked for."""

    site: str
    nonce: str
    layout: str
    metrics: Mapping[str, float | int]
    flat: Flat = field(default_factory=dict)
    facts: Mapping[str, str | list[str]] = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        identity = {"site": self.site, "nonce": self.nonce, "layout": self.layout, **self.facts}
        return RecordDict(
            {
                **_array_records(self.flat),
                "identity": ConfigRecord(identity),  # type: ignore[arg-type]
                "metrics": MetricRecord(dict(self.metrics)),
            }
        )


def _array_records(flat: Flat) -> dict[str, ArrayRecord]:
    """One ArrayRecord per role; inside, one array per "owner/dtype"."""
    found: dict[str, ArrayRecord] = {}
    for group, array in flat.items():
        role, rest = group.split("/", 1)
        found.setdefault(role, ArrayRecord())[rest] = to_array(array)
    return found


def arrays_of(record: RecordDict) -> dict[str, Array]:
    """The arrays of a message by group, as they came."""
    return {f"{role}/{rest}": array for role, arrays in record.array_records.items() for rest, array in arrays.items()}


def sizes_of(record: RecordDict) -> dict[str, int]:
    """Bytes of each array as it travels, by group."""
    return {group: len(array.data) for group, array in arrays_of(record).items()}


def to_array(array: np.ndarray) -> Array:
    if array.dtype.itemsize == PACKABLE and len(packed := codecs.to_packed(array)) < array.nbytes:
        return Array(str(array.dtype), array.shape, PACKED, packed)
    if not _borrows.get():
        return Array(str(array.dtype), array.shape, RAW, array.tobytes())
    borrowed = Array(str(array.dtype), array.shape, RAW, b"")
    borrowed.data = np.ascontiguousarray(array).data.cast("B").toreadonly()  # type: ignore[assignment]
    return borrowed


@contextmanager
def borrowing() -> Iterator[None]:
    """Arrays of messages made in here are views, for a carrier that copies them before anything else is done."""
    token = _borrows.set(True)
    try:
        yield
    finally:
        _borrows.reset(token)


def from_array(array: Array) -> np.ndarray:
    """A read-only view of the received bytes; of packed ones a new array.

    Raises:
        ValueError: packed bytes of something else.
    """
    if array.stype == PACKED:
        found = codecs.of_packed(array.data, math.prod(array.shape), np.dtype(array.dtype))
        return found.reshape(array.shape)
    return np.frombuffer(array.data, dtype=array.dtype).reshape(array.shape)
