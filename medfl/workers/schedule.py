"""Which site comes next: the one that takes longest, of those that the server will want soon."""

import bisect
from collections.abc import Collection
from dataclasses import dataclass, field

from flwr.app import Message

HELD = 256_000_000  # bytes of replies that a server may have to hold which adds them up in the order of its messages
UNKNOWN = float("inf")


@dataclass(frozen=True)
class Parcel:
    """The content of a request, packed once for all its sites; `view` keeps its block in use."""

    body: bytes
    size: int = 0
    block: int | None = None
    view: memoryview | None = None


@dataclass(frozen=True)
class Waiting:
    """A message that no worker has yet."""

    order: int
    message: Message
    parcel: Parcel

    @property
    def node(self) -> int:
        return self.message.metadata.dst_node_id

    @property
    def kind(self) -> str:
        return self.message.metadata.message_type


@dataclass
class Line:
    """The messages that wait, the longest first; of equal ones the earliest."""

    _seconds: dict[tuple[int, str], float] = field(default_factory=dict)  # (node, kind of request) -> the last time
    _waiting: list[tuple[float, int, Waiting]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, waiting: Waiting) -> None:
        seconds = self._seconds.get((waiting.node, waiting.kind), UNKNOWN)
        bisect.insort(self._waiting, (-seconds, waiting.order, waiting))

    def took(self, waiting: Waiting, seconds: float) -> None:
        self._seconds[waiting.node, waiting.kind] = seconds

    def forget(self, names: Collection[str]) -> None:
        """Drop the messages with these ids."""
        self._waiting = [row for row in self._waiting if row[2].message.metadata.message_id not in names]

    def next(self, busy: Collection[int], workers: int, wanted: Collection[str] = ()) -> Waiting | None:
        """Take one whose node is not `busy`: not one that is far ahead of the earliest, as the server may have to
        hold its reply until all before it are there.

        Args:
            wanted: ids of the only messages that may be taken; empty: any.
        """
        if not self._waiting:
            return None
        least = min(order for _, order, _ in self._waiting) if self._waiting[0][2].parcel.size else 0
        for place, (_, order, waiting) in enumerate(self._waiting):
            size = waiting.parcel.size
            near = not size or order - least < max(4 * workers, HELD // size)
            if near and waiting.node not in busy and (not wanted or waiting.message.metadata.message_id in wanted):
                del self._waiting[place]
                return waiting
        return None
