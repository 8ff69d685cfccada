"""What the server and a worker process say to each other over their pipe."""

from dataclasses import dataclass
from logging import LogRecord

from flwr.app import Context
from flwr.app.metadata import Metadata


@dataclass(frozen=True)
class Map:
    """To a worker: the descriptor of this block follows."""

    number: int
    size: int


@dataclass(frozen=True)
class Task:
    """To a worker: have a site answer. `block` holds the content's tensors, `known` names all blocks there are."""

    metadata: Metadata
    body: bytes
    block: int | None
    context: Context
    known: tuple[int, ...]
    measured: bool  # whether the answer must say how much memory it took


@dataclass(frozen=True)
class Room:
    """To a worker: the block for its answer."""

    block: int


@dataclass(frozen=True)
class Ready:
    """From a worker: everything is imported."""


@dataclass(frozen=True)
class Ask:
    """From a worker: it needs a block of this size for its answer."""

    size: int


@dataclass(frozen=True)
class Memory:
    """The memory of a worker at its peak, and of each GPU what is free now; bytes."""

    peak: float
    reserved: float = 0.0  # of its own GPU
    free: tuple[float, ...] = ()


@dataclass(frozen=True)
class Done:
    """From a worker: the answer; `held` names the blocks that it still looks at."""

    body: bytes
    block: int | None
    context: Context
    seconds: float
    held: tuple[int, ...]
    memory: Memory | None


@dataclass(frozen=True)
class Logged:
    """From a worker: a line for the server's log."""

    record: LogRecord
