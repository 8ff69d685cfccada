"""The private names of Flower that medfl relies on: on a failure read flower_compat.py before upgrading flwr."""

import inspect

import flwr
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.simulation.run_simulation import _run_simulation

from medfl.carriers import InProcessGrid
from medfl.flower_compat import identify_message, new_run, take_identity


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
    assert Grid.__abstractmethods__ <= vars(InProcessGrid).keys()
    assert InProcessGrid(ClientApp(), 2).get_node_ids() == [1000, 1001]


def test_messages_can_be_built_and_named_outside_a_task() -> None:
    take_identity(5)
    message = Message(RecordDict(), dst_node_id=3, message_type="train")
    identify_message(message, "m-1")
    assert (message.metadata.message_id, message.metadata.run_id) == ("m-1", 5)
    assert new_run(5).run_id == 5


def test_a_crashing_app_gives_an_error_reply() -> None:
    broken = ClientApp()

    @broken.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("/data/patients/0001.dcm")

    grid = InProcessGrid(broken, 1)
    (reply,) = grid.send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type="train")])
    assert reply.has_error()
    assert "0001" not in reply.error.reason


def test_flower_is_a_version_that_was_tested() -> None:
    assert flwr.__version__.startswith(("1.41.", "1.42."))
