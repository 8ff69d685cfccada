"""What carries the messages in a simulation: this process, or Flower's engine on Ray. The apps are the same."""

from collections.abc import Iterable
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from medfl.flower_compat import NodeInfo, identify_message, new_run, run_on_ray, take_identity

FIRST_NODE = 1000


class InProcessGrid(Grid):
    """A Grid whose sites are called one after another in this process, in the order of the messages.

    A site runs when its reply is pulled, so a server that folds replies one by one holds one at a time.
    """

    def __init__(self, client: ClientApp, sites: int, run_id: int = 1) -> None:
        take_identity(run_id)
        self._client, self._run = client, new_run(run_id)
        self._waiting: dict[str, Message] = {}
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

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message in messages:
            identifier = uuid4().hex
            identify_message(message, identifier)
            self._waiting[identifier] = message
            pushed.append(identifier)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.deliver(self._waiting.pop(name)) for name in list(message_ids) if name in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:  # noqa: ARG002
        return self.pull_messages(self.push_messages(messages))

    def deliver(self, message: Message) -> Message:
        """Have a site answer a message."""
        try:
            reply = self._client(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # as a SuperNode does: a crash of the app is an error reply, not the end of the run
            reply = Message(Error(code=2, reason=type(error).__name__), reply_to=message)
        identify_message(reply, uuid4().hex)
        return reply


def simulate(
    server: ServerApp, client: ClientApp, run_config: dict[str, str | int], *, carrier: str, threads: int
) -> None:
    """Run the two apps over `carrier` with `run_config["sites"]` nodes; the ServerApp's errors are raised here."""
    nodes = int(run_config["sites"])
    if carrier == "ray":
        run_on_ray(server, client, run_config, nodes, threads)
        return
    server(InProcessGrid(client, nodes), Context(1, 1, {}, RecordDict(), dict(run_config)))
