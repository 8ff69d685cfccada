"""Every private import of Flower, in one place; tests/test_flower_compat.py fails when a name or signature moves."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["NodeInfo", "identify_message", "new_run", "run_on_ray", "take_identity"]


def take_identity(run_id: int) -> None:
    """Let this process build messages: outside a Flower task they need a run, a task and a sender."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 1


def new_run(run_id: int) -> Run:
    return Run.create_empty(run_id=run_id)


def identify_message(message: Message, identifier: str) -> None:
    message.metadata.__dict__["_message_id"] = identifier


def run_on_ray(
    server: ServerApp, client: ClientApp, run_config: dict[str, str | int], sites: int, threads: int
) -> None:
    """Flower's simulation engine with one actor per `threads` CPUs; errors of the ServerApp are raised here."""
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
            "init_args": {"num_cpus": cpus, "include_dashboard": False},
        },
        server_app_context=Context(1, 0, {}, RecordDict(), dict(run_config)),
    )


def _gpu_share(cpus: int, threads: int) -> float:
    """An equal share of this machine's GPUs for each actor that its CPUs allow."""
    import torch

    actors = max(1, cpus // threads)
    return torch.cuda.device_count() / actors if torch.cuda.is_available() else 0.0
