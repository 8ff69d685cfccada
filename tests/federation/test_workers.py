"""Sites in worker processes: the same result as in one process, whatever dies, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import app as client
from medfl.carriers import Host, simulate
from medfl.errors import ConfigError, ResourceError
from medfl.flower_compat import take_identity
from medfl.messages import RAW, borrowing, from_array, to_array
from medfl.workers.grid import WorkerGrid
from medfl.workers.notes import Memory
from medfl.workers.parcel import Packed, unpacked
from medfl.workers.room import worker_count
from medfl.workers.schedule import Line, Parcel, Waiting
from server.app import app as server
from tests.federation.small import digest, run, small_study

GB = 1e9
WIDE = 1 << 20  # numbers of a large array
echo = ClientApp()  # in the workers, of this file


@echo.train()
def add_one(message: Message, context: Context) -> Message:
    """The numbers sent along plus one; in the order's words, what else happens."""
    words = dict(message.content.config_records.get("do", {}))
    if words.get("die") == context.node_config["partition-id"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if "fail" in words:
        raise ValueError("a path that must not leave")
    time.sleep(float(words.get("sleep", 0)))
    numbers = from_array(message.content.array_records["x"]["x"])
    found = numbers + np.float32(1 + int(context.node_config["partition-id"]))
    content = RecordDict({"x": ArrayRecord(), "pid": ConfigRecord({"pid": os.getpid()})})
    content.array_records["x"]["x"] = to_array(found)
    return Message(content, reply_to=message)


def request(sites: int, size: int = WIDE, **words: int | float) -> list[Message]:
    take_identity(1)
    content = RecordDict({"x": ArrayRecord({"x": Array("float32", (size,), RAW, bytes(4 * size))})})
    content["do"] = ConfigRecord(dict(words))
    return [Message(content, dst_node_id=1000 + site, message_type="train") for site in range(sites)]


@pytest.fixture(scope="module")
def grid() -> Iterator[WorkerGrid]:
    with WorkerGrid(echo, 40, threads=1, workers=2) as made:
        yield made


def test_borrowed_arrays_are_views_that_arrive_whole() -> None:
    arrays = {"large": np.arange(WIDE, dtype=np.float32), "small": np.arange(3.0), "none": np.empty(0, np.int8)}
    content = RecordDict({"x": ArrayRecord()})
    with borrowing():
        for name, array in arrays.items():
            content.array_records["x"][name] = to_array(array)
    assert isinstance(to_array(arrays["small"]).data, bytes)  # outside they are copies, as ever
    arrays["large"][-1] = 7
    packed = Packed(content)
    memory = bytearray(packed.size)
    packed.fill(memoryview(memory))
    found = unpacked(packed.body, memoryview(memory)).array_records["x"]
    assert all(np.array_equal(from_array(found[name]), array) for name, array in arrays.items())


def test_memory_of_a_reply_is_used_again_only_after_its_last_view(grid: WorkerGrid) -> None:
    first, *_ = grid.send_and_receive(request(1))
    view = from_array(first.content.array_records["x"]["x"])
    copy = view.copy()
    del first
    grid.send_and_receive(request(6))
    np.testing.assert_array_equal(view, copy)
    del view
    block = 4 * WIDE + (1 << 16)
    for _ in range(3):
        waiting = set(grid.push_messages(request(40)))
        while waiting:
            for name in grid.arrived(waiting, 10):
                grid.pull_messages([name])
                waiting.remove(name)
    assert 0 < grid.crew.shared <= 10 * block  # 4 unread, 2 being written, 3 of requests and 1 being read; not 40


def test_every_site_gets_the_request_and_its_own_answer_comes_back(grid: WorkerGrid) -> None:
    for size in (1, WIDE):  # on the pipe, and in shared memory
        replies = grid.send_and_receive(request(40, size))
        found = {reply.metadata.src_node_id: from_array(reply.content.array_records["x"]["x"]) for reply in replies}
        assert sorted(found) == list(range(1000, 1040))
        assert all((numbers == node - 999).all() for node, numbers in found.items())
    assert len({reply.content.config_records["pid"]["pid"] for reply in replies}) == 2


def test_a_server_that_wants_one_reply_gets_it_before_those_it_does_not_read(grid: WorkerGrid) -> None:
    names = grid.push_messages(request(40))
    assert grid.arrived(names[-1:], 30) == names[-1:]
    left = set(names)
    while left:
        left -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(grid.arrived(left, 30))}


def test_a_crash_of_the_app_is_an_error_reply_without_its_text(grid: WorkerGrid) -> None:
    (reply,) = grid.send_and_receive(request(1, fail=1))
    assert (reply.error.code, reply.error.reason) == (2, "ValueError")


def test_a_killed_worker_costs_its_site_the_reply_and_is_started_again(grid: WorkerGrid) -> None:
    pids = set(grid.crew.pids)
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(request(8, die=3))}
    assert [node for node, reply in replies.items() if reply.has_error()] == [1003]
    assert replies[1003].error.reason == "WorkerDied (exit code -9)"
    idle = next(iter(pids & set(grid.crew.pids)))
    os.kill(idle, signal.SIGKILL)
    while idle in grid.crew.pids:  # until it is heard of, a request that it is given is lost with it
        time.sleep(0.01)
    assert not any(reply.has_error() for reply in grid.send_and_receive(request(8)))
    assert len(set(grid.crew.pids) - pids) == 2


def test_sites_that_missed_a_deadline_are_out_of_the_way_of_the_next_round(grid: WorkerGrid) -> None:
    large = 4 * WIDE  # so that few replies may be ahead of the earliest
    assert len(grid.send_and_receive(request(40, large, sleep=0.1), timeout=0.5)) < 40
    replies = grid.send_and_receive(request(40, large), timeout=60)
    assert sorted(reply.metadata.src_node_id for reply in replies) == list(range(1000, 1040))
    assert not grid.crew.unread


def test_replies_that_are_kept_get_more_memory(grid: WorkerGrid) -> None:
    kept = [reply for _ in range(2) for reply in grid.send_and_receive(request(20))]
    assert {float(from_array(r.content.array_records["x"]["x"])[-1]) for r in kept} == set(range(1, 21))


CASES = {
    "simclr": ("rounds.norm=local_statistics", "server_optimizer=momentum"),
    "dissect": ("rounds.target=shift", "training.optimizer_state=keep"),
    "dcl": ("rounds.queue=keep", "rounds.queue_age=2", "training.optimizer_state=keep"),
}


@pytest.mark.parametrize("method", CASES)
def test_workers_and_one_process_agree_bit_for_bit(method: str, tmp_path: Path) -> None:
    """Each site's next request lands in any worker; what it kept is on its disk."""
    found = {}
    for carrier in ("inprocess", "workers"):
        words = (f"method={method}", "sites.count=3", "arms=[federated]", "rounds.workers=2", *CASES[method])
        study = small_study(tmp_path / carrier, f"rounds.carrier={carrier}", *words)
        folder = run(study, carrier=carrier, nodes=4)
        kept = sorted(digest(path) for path in Path(study.state_dir).rglob("round-*.safetensors"))
        found[carrier] = digest(folder.path / "encoder.safetensors"), kept
        assert len(kept) == 6  # of three sites, after two rounds
    assert found["inprocess"] == found["workers"]


def test_how_many_workers_fit() -> None:
    def count(cores: int, threads: int, free: float, seen: Memory) -> int:
        return worker_count(cores, threads, free, seen)[0]

    assert count(8, 2, 100 * GB, Memory(1 * GB)) == 4
    assert count(1, 2, 100 * GB, Memory(1 * GB)) == 1
    assert count(8, 1, 4.4 * GB, Memory(1 * GB)) == 3  # one that runs, and two times 1.5 GB
    assert count(8, 1, 0, Memory(1 * GB)) == 1
    assert count(8, 1, 100 * GB, Memory(1 * GB, 10 * GB, (20 * GB,))) == 2
    assert count(8, 1, 100 * GB, Memory(1 * GB, 10 * GB, (20 * GB, 40 * GB))) == 4  # worker 4 would be on the first GPU
    assert (
        "2 GPUs, down to 20.0 GB free" in worker_count(8, 1, 100 * GB, Memory(1 * GB, 10 * GB, (20 * GB, 40 * GB)))[1]
    )
    assert "4.4 GB of memory free, 1.5 GB for each" in worker_count(8, 1, 4.4 * GB, Memory(1 * GB))[1]


def test_the_longest_site_comes_first_but_not_far_ahead_of_the_others() -> None:
    line = Line()
    small, large = Parcel(b"", 0), Parcel(b"", 1_000_000_000)
    for parcel, wanted in ((small, 29), (large, 7)):  # a reply of 1 GB is no more than 4 x 2 places ahead
        every = [Waiting(order, message, parcel) for order, message in enumerate(request(30, 1))]
        for seconds, waiting in enumerate(every):
            line.took(waiting, float(seconds))
        for waiting in every:
            line.add(waiting)
        taken = [line.next((), 2) for _ in range(30)]
        assert taken[0] is every[wanted]
        assert sorted(one.order for one in taken if one) == list(range(30))
        assert len(line) == 0


def test_the_choice_is_told_after_the_first_training_and_written_down(tmp_path: Path) -> None:
    study, told = small_study(tmp_path, "arms=[federated]", "rounds.count=1"), []
    asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": 3}
    host = Host(told=lambda count, why: told.append((count, why)))
    simulate(server, client, asked, carrier="workers", threads=1, host=host)
    ((count, why),) = told
    assert count >= 1
    assert "threads each" in why or "memory free" in why


def test_an_app_that_cannot_be_imported_is_refused_and_one_that_fails_to_start_ends_the_run() -> None:
    with pytest.raises(ConfigError, match="top level of a module"):
        WorkerGrid(ClientApp(), 1, threads=1)
    with WorkerGrid(echo, 1, threads=0, workers=1) as broken:  # torch refuses no threads
        broken.push_messages(request(1))
        with pytest.raises(ResourceError, match="while it started"):
            broken.arrived(["any"], 30)


SCRIPT = """
import sys
from tests.federation import test_workers as t
if __name__ == "__main__":
    with t.WorkerGrid(t.echo, 8, threads=1, workers=2) as grid:
        kept = grid.send_and_receive(t.request(8))
        print(*grid.crew.pids, flush=True)
        grid.send_and_receive(t.request(8, sleep=60))
"""


def test_nothing_is_left_when_the_server_ends(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    before = set(Path("/dev/shm").iterdir())
    words, pipes = [sys.executable, str(tmp_path / "script.py")], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    servers = {how: subprocess.Popen(words, **pipes, text=True, env=env) for how in (signal.SIGINT, signal.SIGKILL)}
    pids = [int(word) for process in servers.values() for word in process.stdout.readline().split()]
    assert len(pids) == 4
    time.sleep(0.5)  # into the requests that take a minute
    for how, process in servers.items():
        process.send_signal(how)
    said = [process.communicate(timeout=60)[1] for process in servers.values()]
    end = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert set(Path("/dev/shm").iterdir()) == before
    assert not [word for word in ("resource_tracker", "leaked") for text in said if word in text]
