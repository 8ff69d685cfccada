"""The private names of Flower that medfl relies on: on a failure read flower_compat.py before upgrading flwr."""

import gc
import inspect
import weakref
from pathlib import Path

import flwr
import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.serverapp import Grid
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supernode import fleet_http_connection
from flwr.supernode.runtime import run_clientapp

from medfl.carriers import InProcessGrid
from medfl.flower_compat import identify_message, install_bundle, new_run, patient, take_identity, task_commands
from medfl.workers.grid import WorkerGrid


def test_the_simulation_entry_point_keeps_its_parameters() -> None:
    wanted = {
        "num_supernodes",
        "exit_event",
        "client_app",
        "server_app",
        "backend_config",
        "server_app_context",
    }
    assert wanted <= inspect.signature(_run_simulation).parameters.keys()


def test_the_grid_has_no_abstract_method_that_is_not_ours() -> None:
    assert Grid.__abstractmethods__
    assert not InProcessGrid.__abstractmethods__ | WorkerGrid.__abstractmethods__
    assert InProcessGrid(ClientApp(), 2).get_node_ids() == [1000, 1001]


def test_messages_can_be_built_and_named_outside_a_task() -> None:
    take_identity(5)
    message = Message(RecordDict(), dst_node_id=3, message_type="train")
    identify_message(message, "m-1")
    assert (message.metadata.message_id, message.metadata.run_id) == ("m-1", 5)
    assert new_run(5).run_id == 5


def test_a_record_ends_with_its_last_reader() -> None:
    record = RecordDict({"a": ArrayRecord({"x": Array("uint8", (4,), "raw", b"1234")})})
    ends = weakref.ref(record)
    with pytest.raises(TypeError, match="ArrayRecord"):  # its views still check what they are given
        record.array_records["b"] = ConfigRecord()  # type: ignore[assignment]
    gc.disable()
    try:
        assert (len(record.array_records), len(record.metric_records), len(record.config_records)) == (1, 0, 0)
        del record
        assert ends() is None
    finally:
        gc.enable()


def test_a_crashing_app_gives_an_error_reply() -> None:
    broken = ClientApp()

    @broken.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("/data/patients/0001.dcm")

    grid = InProcessGrid(broken, 1)
    (reply,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type="train")])
    assert reply.has_error()
    assert "0001" not in reply.error.reason


def test_the_run_of_a_client_app_calls_what_a_site_puts_in_its_place() -> None:
    source = inspect.getsource(run_clientapp.run_clientapp)
    for call in (
        "message, context, run, fab = pull_task_input(client)",
        "install_from_fab(fab.content, skip_prompt=True)",
        "get_project_dir(run.fab_id, run.fab_version, fab.hash_str)",
        "load_client_app_fn = get_load_client_app_fn(",
        "push_message(client, reply_message, context)",
    ):
        assert call in source
    assert source.index("install_from_fab(fab") < source.index("load_client_app_fn(\n            run.fab_id")
    assert set(inspect.signature(run_clientapp.push_task_output).parameters) >= {"client", "context", "details"}
    assert {"default_app_ref", "app_path", "multi_app"} == set(inspect.signature(get_load_client_app_fn).parameters)
    assert inspect.signature(install_bundle).return_annotation is Path


def test_a_superexec_starts_the_programs_that_a_site_replaces() -> None:
    assert task_commands()["flwr-clientapp"]
    assert not task_commands()["flwr-serverapp"]
    assert "TASK_TYPE_TO_COMMAND[spec.task_type]" in inspect.getsource(SubprocessExecutor.launch)


@pytest.mark.parametrize(
    ("error", "given_up"),
    [
        (httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"), False),
        (httpx.RemoteProtocolError("TLS/SSL connection has been closed (EOF)"), False),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed"), True),
    ],
)
def test_a_node_gives_up_for_a_wrong_certificate_alone(error: httpx.TransportError, given_up: bool) -> None:
    assert fleet_http_connection.make_simple_http_retry_invoker().should_giveup(error)  # Flower itself: always
    assert patient(fleet_http_connection.make_simple_http_retry_invoker)().should_giveup(error) is given_up


def test_flower_is_a_version_that_was_tested() -> None:
    assert flwr.__version__.startswith(("1.41.", "1.42."))
