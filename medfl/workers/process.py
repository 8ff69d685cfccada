"""What the server knows of one worker process."""

from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from medfl.workers.memory import Block
from medfl.workers.schedule import Waiting


@dataclass(eq=False)
class Worker:
    """One process, and what it has."""

    number: int
    process: SpawnProcess
    pipe: Connection
    ready: bool = False
    waiting: Waiting | None = None  # what it works on
    answer: Block | None = None  # promised for its answer
    view: memoryview | None = None  # of that block, so that nobody else gets it
    mapped: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        return self.ready and self.waiting is None
