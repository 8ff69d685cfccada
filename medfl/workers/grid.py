"""The Grid of a simulation whose sites answer in worker processes of this machine."""

import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable
from types import TracebackType
from typing import Self
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from medfl.errors import ConfigError
from medfl.flower_compat import identify_message
from medfl.nodes import Nodes
from medfl.workers.crew import Crew
from medfl.workers.parcel import Packed
from medfl.workers.schedule import Parcel, Waiting

log = logging.getLogger("medfl.workers")


class WorkerGrid(Nodes):
    """A Grid whose sites answer in processes that stay; replies come in any order.

    Tensors are views of shared memory: a reply's memory is used again when the last view of it has ended, so a server
    that drops each reply after reading it holds a few, however many sites there are.

    Args:
        threads: of torch, in each worker.
        workers: processes; None: as many as cores and free memory allow, found after the first training.
        cuda: whether the sites compute on CUDA devices.
        told: is told, in the thread that pulls, how many workers there are, and why.

    Raises:
        ConfigError: a ClientApp that another process cannot import.
    """

    def __init__(
        self,
        client: ClientApp,
        sites: int,
        *,
        threads: int,
        workers: int | None = None,
        cuda: bool = False,
        told: Callable[[int, str], None] | None = None,
    ) -> None:
        super().__init__(sites)
        self._told, self._count = told, 0
        self.crew = Crew(_place(client), self.contexts, threads=threads, workers=workers, cuda=cuda)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.crew.close()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        waiting, parcels = [], dict[int, tuple[RecordDict, Parcel]]()
        for message in messages:
            identify_message(message, uuid4().hex)
            content = message.content
            if id(content) not in parcels:
                parcels[id(content)] = content, self._parcel(content)
            self._count += 1
            waiting.append(Waiting(self._count, message, parcels[id(content)][1]))
        self.crew.ask(waiting)
        return [one.message.metadata.message_id for one in waiting]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        names = list(message_ids)
        found = self.crew.take(names)
        self._tell()
        return found

    def arrived(self, message_ids: Collection[str], timeout: float) -> list[str]:
        """Those of the messages whose replies can be pulled, as soon as there is one; none after `timeout` seconds."""
        found = self.crew.arrived(message_ids, timeout)
        self._tell()
        return found

    def forget(self, message_ids: Collection[str]) -> None:
        """Nobody waits for the replies to these messages any more."""
        self.crew.forget(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        waiting, found = dict.fromkeys(self.push_messages(messages)), list[Message]()
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while waiting and (left := end - time.monotonic()) > 0:
            names = self.arrived(waiting, min(left, 60.0))
            found += self.pull_messages(names)
            for name in names:
                del waiting[name]
        self.forget(waiting)
        return found

    def _parcel(self, content: RecordDict) -> Parcel:
        packed = Packed(content)
        if not packed.size:
            return Parcel(packed.body)
        block, view = self.crew.room(packed.size)
        packed.fill(view)
        return Parcel(packed.body, packed.size, block.number, view)

    def _tell(self) -> None:
        while self.crew.news:
            count, why = self.crew.news.pop(0)
            log.info("%d workers: %s", count, why)
            if self._told is not None:
                self._told(count, why)


def _place(client: ClientApp) -> str:
    """Where another process finds the app, "module:name"."""
    places = [
        f"{name}:{attribute}"
        for name, module in list(sys.modules.items())
        for attribute, found in list(getattr(module, "__dict__", {}).items())
        if found is client
    ]
    if places:
        return min(places, key=len)  # rather its own module than one that imported it
    raise ConfigError(
        "rounds.carrier=workers: the ClientApp is no name of a module, so other processes cannot import it. Define it "
        "at the top level of a module, or take rounds.carrier=inprocess."
    )
