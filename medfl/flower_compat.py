"""Every private import of Flower, in one place; tests/test_flower_compat.py fails when a name or signature moves."""

import hashlib
import logging
import os
import ssl
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import httpx
from flwr.app import Context, Message, RecordDict
from flwr.app.message import recorddict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "ConnectionLost",
    "Guard",
    "NodeInfo",
    "control_client",
    "identify_message",
    "install_bundle",
    "limited",
    "message_of",
    "new_run",
    "patient",
    "run_client_app",
    "run_on_ray",
    "run_supernode",
    "start_request",
    "take_identity",
    "task_commands",
]
ConnectionLost = httpx.HTTPError  # the SuperLink cannot be reached, after Flower's own attempts
OURS = ("client", "configs", "medfl", "server")  # packages of an app bundle
log = logging.getLogger("medfl.site")


def _end_cycles() -> None:
    """Have a record end with its last reader.

    What `record.array_records` and its like give holds itself and the record, so without this all tensors of all
    messages stay until Python's next whole garbage collection, which comes late: it counts objects, not bytes.
    """
    views: Any = recorddict._SyncedDict
    check = views.check_value
    if isinstance(check, property):  # medfl was imported again
        return

    def weakly(view: Any) -> Callable[[Any], None]:
        own = weakref.ref(view)
        return lambda value: check(own(), value)

    views.check_value = property(weakly)


_end_cycles()


def take_identity(run_id: int) -> None:
    """Let this process build messages: outside a Flower task they need a run, a task and a sender."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 1


def new_run(run_id: int) -> Run:
    return Run.create_empty(run_id=run_id)


def identify_message(message: Message, identifier: str) -> None:
    message.metadata.__dict__["_message_id"] = identifier


def message_of(content: RecordDict, metadata: Metadata) -> Message:
    """A message as another process had it."""
    return Message(content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def run_on_ray(
    server: ServerApp,
    client: ClientApp,
    run_config: dict[str, str | int],
    sites: int,
    threads: int,
    address: str | None = None,
) -> None:
    """Flower's simulation engine with one actor per `threads` CPUs; errors of the ServerApp are raised here.

    Args:
        address: of a Ray cluster that runs already; its hosts have told Ray what they have.
    """
    from flwr.common import EventType
    from flwr.simulation.run_simulation import _run_simulation

    cpus = os.cpu_count() or 1
    _run_simulation(
        num_supernodes=sites,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app=client,
        server_app=server,
        backend_config={
            "client_resources": {
                "num_cpus": float(min(threads, cpus)),
                "num_gpus": _gpu_share(cpus, threads),
            },
            "init_args": {"address": address} if address else {"num_cpus": cpus, "include_dashboard": False},
        },
        server_app_context=Context(1, 0, {}, RecordDict(), dict(run_config)),
    )


@contextmanager
def limited(most: int) -> Iterator[None]:
    """While it lasts, each reply that is taken from a SuperLink is given up as an error when it passes `most` bytes.

    The size of a reply is nowhere said before its parts come, and a part is bounded by the proxy's limit of a request.
    """
    grid: Any = sys.modules.get("flwr.superlink.grid.http_grid")
    if grid is None:  # a simulation, which has no SuperLink; the import takes a second
        yield
        return
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

    plain = grid.make_pull_object_fn_protobuf

    def counting(*given: Any, **named: Any) -> Callable[[str], bytes]:
        pull, left = plain(*given, **named), most

        def part(name: str) -> bytes:
            nonlocal left
            content: bytes = pull(name)
            left -= len(content)
            if left < 0:
                raise ObjectPullError(name, f"the reply has more than {most} bytes.")
            return content

        return part

    grid.make_pull_object_fn_protobuf = counting
    try:
        yield
    finally:
        grid.make_pull_object_fn_protobuf = plain


def _gpu_share(cpus: int, threads: int) -> float:
    """An equal share of this machine's GPUs for each actor that its CPUs allow."""
    import torch

    actors = max(1, cpus // threads)
    return torch.cuda.device_count() / actors if torch.cuda.is_available() else 0.0


class Guard(Protocol):
    """What a site does around Flower's own run of one request."""

    def begun(self, message: Message) -> None:
        """This request was received."""

    def admitted(self, bundle: bytes) -> Path:
        """The folder of the reviewed app, if this bundle is it. An error's text is sent: it must hold no detail."""

    def answered(self) -> None:
        """The answer, or the error, is at the node."""


def run_client_app(words: Sequence[str], guard: Guard) -> None:
    """Flower's `flwr-clientapp`, which then installs nothing and runs the app of the guard's folder alone.

    Error texts of loading, and of what failed outside the app, stay in this site's log.
    """
    from flwr.clientapp.client_app import LoadClientAppError
    from flwr.clientapp.utils import get_load_client_app_fn
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as runtime

    folders: list[Path] = []
    pull, push, report = runtime.pull_task_input, runtime.push_message, runtime.push_task_output

    def pulled(*given: Any) -> Any:
        task = pull(*given)
        guard.begun(task[0])
        return task

    def pushed(*given: Any) -> None:
        push(*given)
        guard.answered()

    def load(*names: str) -> ClientApp:
        try:
            for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
                del sys.modules[name]  # the app's own files take the place of those of this launcher
            return get_load_client_app_fn(default_app_ref="", app_path=str(folders[0]), multi_app=True)(*names)
        except Exception as error:
            log.exception("the app cannot be loaded")
            raise LoadClientAppError("the app cannot be loaded") from error

    ours: dict[str, Any] = {
        "pull_task_input": pulled,
        "push_message": pushed,
        "push_task_output": lambda **o: report(**o | {"details": "see the site's log" if o["details"] else ""}),
        "install_from_fab": lambda bundle, **_: folders.append(guard.admitted(bundle)),
        "get_project_dir": lambda *_: folders[0],
        "get_load_client_app_fn": lambda **_: load,
    }
    for name, function in ours.items():
        setattr(runtime, name, function)
    sys.argv = ["flwr-clientapp", *(word for word in words if word != "--allow-runtime-dependency-installation")]
    flwr_clientapp()


def run_supernode(words: Sequence[str]) -> None:
    """Flower's `flower-supernode`, which then gives up its connection for a wrong certificate alone.

    Flower gives up for ever on any error whose text has "ssl" in it, and a proxy that starts again is enough for one.
    """
    from flwr.supernode import fleet_http_connection
    from flwr.supernode.cli import flower_supernode

    fleet: Any = fleet_http_connection
    fleet.make_simple_http_retry_invoker = patient(fleet.make_simple_http_retry_invoker)
    sys.argv = ["flower-supernode", *words]
    flower_supernode()


def patient(make: Callable[[], Any]) -> Callable[[], Any]:
    """A maker of retry invokers that go on after broken connections of every kind."""

    def made() -> Any:
        invoker = make()
        gives_up = invoker.should_giveup

        def hopeless(error: Exception) -> bool:
            broken = isinstance(error, httpx.TransportError) and "certificate" not in str(error).lower()
            return not broken and gives_up(error)

        invoker.should_giveup = hopeless
        return invoker

    return made


def install_bundle(bundle: bytes, home: Path) -> Path:
    """Unpack an app bundle as Flower does, under `home`/apps; returns its folder."""
    from flwr.cli.install import install_from_fab

    return install_from_fab(bundle, install_dir=home, skip_prompt=True)


def control_client(address: str, trusted: ssl.SSLContext) -> tuple[Any, Any]:
    """A client of a SuperLink's Control interface, and the module with its messages."""
    from flwr.proto import control_pb2
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

    version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    return ControlHttpClient(address, interceptors=[version], verify=trusted), control_pb2


def start_request(bundle: bytes, run_config: Mapping[str, str | int]) -> Any:
    """The message that submits a run of exactly this bundle."""
    from flwr.common.serde import user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab

    fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
    return StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(run_config)))


def task_commands() -> dict[str, bool]:
    """The programs that a SuperExec starts by name, and whether each runs a ClientApp."""
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType

    return {command: kind is TaskType.CLIENT_APP for kind, command in TASK_TYPE_TO_COMMAND.items()}
