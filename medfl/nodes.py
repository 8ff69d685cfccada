"""The sites of a simulation as nodes of a Grid on this machine; what carries the messages to them is a subclass's."""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from medfl.flower_compat import NodeInfo, identify_message, new_run, take_identity
from medfl.messages import borrowing

FIRST_NODE = 1000
CRASHED = 2  # Flower's code of an app that raised, or whose process ended


@runtime_checkable
class Prompt(Protocol):
    """A Grid that copies messages as they are pushed, and that can tell which replies are there."""

    def arrived(self, message_ids: Collection[str], timeout: float) -> list[str]:
        """Those of the messages whose replies can be pulled, once there are any; none after `timeout` seconds."""

    def forget(self, message_ids: Collection[str]) -> None:
        """Nobody waits for the replies to these messages any more."""


def lending(grid: Grid) -> AbstractContextManager[None]:
    """For messages that are made for this grid: their arrays are not copied where it copies them itself."""
    return borrowing() if isinstance(grid, Prompt) else nullcontext()


class Nodes(Grid):
    """All of a Grid but the way of its messages. `contexts` has the node of each site, with its place in the study."""

    def __init__(self, sites: int, run_id: int = 1) -> None:
        take_identity(run_id)
        self._run = new_run(run_id)
        self.contexts = {
            FIRST_NODE + index: Context(
                run_id, FIRST_NODE + index, {"partition-id": index, "num-partitions": sites}, RecordDict(), {}
            )
            for index in range(sites)
        }

    def set_run(self, run: object) -> None:
        """A simulation has one run; nothing changes."""

    @property
    def run(self) -> object:  # type: ignore[override]
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node) for node in self.contexts]


def answer(client: ClientApp, message: Message, context: Context) -> Message:
    """Have a site answer a message."""
    try:
        reply = client(message, context)
    except Exception as error:  # as a SuperNode does: a crash of the app is an error reply, not the end of the run
        reply = crash(message, type(error).__name__)
    identify_message(reply, uuid4().hex)
    return reply


def crash(message: Message, reason: str) -> Message:
    """The error reply in place of an app's."""
    return Message(Error(code=CRASHED, reason=reason), reply_to=message)
