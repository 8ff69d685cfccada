"""A worker process: it has sites answer, one request after another, until its server says that it is over."""

import copy
import importlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import torch
from flwr.clientapp import ClientApp

from medfl.flower_compat import message_of, take_identity
from medfl.machine import peak
from medfl.malloc import keep_freed
from medfl.messages import borrowing
from medfl.nodes import answer
from medfl.workers.memory import Mapped
from medfl.workers.notes import Ask, Done, Logged, Map, Memory, Ready, Room, Task
from medfl.workers.parcel import Packed, unpacked

RUN = 1


def serve(pipe: Connection, app: str, number: int, threads: int, cuda: bool) -> None:
    """Have sites answer with the ClientApp `app` ("module:name") until the pipe ends.

    Args:
        number: of this worker; on a machine with GPUs it has the one at `number` modulo their count.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the server ends this one
    threading.Thread(target=_end_with_server, daemon=True).start()
    keep_freed()
    torch.set_num_threads(threads)
    if cuda:
        torch.cuda.set_device(number % torch.cuda.device_count())
    said = _Said(pipe)
    logging.basicConfig(level=logging.INFO, handlers=[said], force=True)
    take_identity(RUN)
    client, mapped = _found(app), Mapped()
    said.send(Ready())
    while (task := _heard(pipe, mapped)) is not None:
        said.send(_answered(client, task, pipe, mapped, said))


class _Said(logging.Handler):
    """What this process sends; log records too, so that they reach the handlers of the server's process."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def send(self, note: object) -> None:
        with self.lock:  # type: ignore[union-attr]  # a reentrant one, which every handler has
            self._pipe.send(note)

    def emit(self, record: logging.LogRecord) -> None:
        plain = copy.copy(record)
        plain.msg, plain.args = record.getMessage(), None
        if record.exc_info:
            plain.exc_text = logging.Formatter().formatException(record.exc_info)
            plain.exc_info = None
        self.send(Logged(plain))


def _heard(pipe: Connection, mapped: Mapped) -> Task | Room | None:
    """The next task, or the room for an answer; None when the server is done or gone."""
    try:
        while isinstance(note := pipe.recv(), Map):
            mapped.add(note.number, note.size, recv_handle(pipe))
    except (EOFError, OSError):
        return None
    return note  # type: ignore[no-any-return]


def _answered(client: ClientApp, task: Task | Room, pipe: Connection, mapped: Mapped, said: _Said) -> Done:
    if not isinstance(task, Task):
        raise TypeError(f"got {type(task).__name__} in place of a task.")
    mapped.keep(task.known)
    began = time.perf_counter()
    packed = _reply(client, task, mapped)
    seconds, block = time.perf_counter() - began, None
    if packed.size:
        said.send(Ask(packed.size))
        room = _heard(pipe, mapped)
        if not isinstance(room, Room):
            raise SystemExit(0)
        block = room.block
        packed.fill(mapped.view(block))
    return Done(packed.body, block, task.context, seconds, mapped.held(), _memory() if task.measured else None)


def _reply(client: ClientApp, task: Task, mapped: Mapped) -> Packed:
    """The packed reply, whose arrays are still the site's own; nothing of the request outlives this."""
    memory = None if task.block is None else mapped.view(task.block)
    message = message_of(unpacked(task.body, memory), task.metadata)
    with borrowing():
        return Packed(answer(client, message, task.context))


def _memory() -> Memory:
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return Memory(peak())
    free = tuple(float(torch.cuda.mem_get_info(device)[0]) for device in range(torch.cuda.device_count()))
    return Memory(peak(), float(torch.cuda.max_memory_reserved()), free)


def _found(app: str) -> ClientApp:
    module, _, name = app.partition(":")
    found: ClientApp = getattr(importlib.import_module(module), name)
    return found


def _end_with_server() -> None:
    """A server that was killed tells nobody."""
    server = multiprocessing.parent_process()
    if server is not None:
        server.join()
    os._exit(1)
