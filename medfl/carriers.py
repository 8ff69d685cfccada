"""What carries the messages in a simulation: this process, worker processes, or Flower's engine on Ray.

The apps are the same, and so are their results, bit for bit, at equal `training.threads`.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from medfl.errors import NetworkError
from medfl.flower_compat import identify_message, run_on_ray
from medfl.nodes import FIRST_NODE, Nodes, answer
from medfl.workers.grid import WorkerGrid

__all__ = ["FIRST_NODE", "Host", "InProcessGrid", "simulate"]


@dataclass(frozen=True)
class Host:
    """What a carrier may use beside `training.threads`.

    Args:
        workers: processes of carrier=workers; None: as many as cores and memory allow.
        cuda: whether sites compute on CUDA devices.
        ray_address: of a Ray cluster that runs already; None: one is started on this machine.
        told: is told, in the server's thread, how many workers there are, and why.
    """

    workers: int | None = None
    cuda: bool = False
    ray_address: str | None = None
    told: Callable[[int, str], None] | None = None


class InProcessGrid(Nodes):
    """A Grid whose sites are called one after another in this process, in the order of the messages.

    A site runs when its reply is pulled, so a server that folds replies one by one holds one at a time.
    """

    def __init__(self, client: ClientApp, sites: int, run_id: int = 1) -> None:
        super().__init__(sites, run_id)
        self._client = client
        self._waiting: dict[str, Message] = {}

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
        return answer(self._client, message, self.contexts[message.metadata.dst_node_id])


def simulate(
    server: ServerApp,
    client: ClientApp,
    run_config: dict[str, str | int],
    *,
    carrier: str,
    threads: int,
    host: Host = Host(),
) -> None:
    """Run the two apps over `carrier` with `run_config["sites"]` nodes; the ServerApp's errors are raised here."""
    nodes = int(run_config["sites"])
    context = Context(1, 1, {}, RecordDict(), dict(run_config))
    if carrier == "ray":
        if host.ray_address:
            _check_ray(host.ray_address)
        run_on_ray(server, client, run_config, nodes, threads, host.ray_address)
    elif carrier == "workers":
        with WorkerGrid(client, nodes, threads=threads, workers=host.workers, cuda=host.cuda, told=host.told) as grid:
            server(grid, context)
    else:
        server(InProcessGrid(client, nodes), context)


def _check_ray(address: str) -> None:
    """
    Raises:
        NetworkError: no such cluster; Flower's engine would wait for it for ever.
    """
    import ray

    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise NetworkError(
            f"rounds.ray_address={address}: {text} Run `ray start --head` on one host, and "
            "`ray start --address=HOST:6379` on the others and on this one."
        ) from None
    ray.shutdown()
