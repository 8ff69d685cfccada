"""The worker processes and the thread of the server that talks to them."""

import logging
import multiprocessing
import selectors
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress
from multiprocessing.reduction import send_handle
from uuid import uuid4

from flwr.app import Context, Message

from medfl.errors import ResourceError
from medfl.flower_compat import identify_message
from medfl.machine import cores, memory
from medfl.nodes import crash
from medfl.workers.memory import Block, Blocks
from medfl.workers.notes import Ask, Done, Logged, Map, Ready, Room, Task
from medfl.workers.parcel import unpacked
from medfl.workers.process import Worker
from medfl.workers.room import worker_count
from medfl.workers.schedule import Line, Waiting
from medfl.workers.worker import serve

UNREAD = 2  # replies per worker that may wait for the server before workers wait for it
PATIENCE = 5.0  # s for a worker to end by itself
QUERY = "query"  # requests of this kind do not show how much memory a training takes
log = logging.getLogger("medfl.workers")


class Crew:
    """Worker processes that take messages and leave replies. What has no underscore is for the server's thread.

    Args:
        app: where workers find the ClientApp, "module:name".
        workers: how many; None: one, and more when its first training has shown the memory it takes.
    """

    def __init__(
        self, app: str, contexts: dict[int, Context], *, threads: int, workers: int | None, cuda: bool
    ) -> None:
        self.news: list[tuple[int, str]] = []  # how many workers there are, and why; for the caller to tell
        self._changed = threading.Condition()
        self._blocks, self._line = Blocks(), Line()
        self._replies: dict[str, Message] = {}
        self._forgotten: set[str] = set()  # of those that workers have
        self._failure: BaseException | None = None
        self._wanted: Collection[str] = ()  # ids that the caller waits for in vain
        self._app, self._contexts, self._threads, self._cuda = app, contexts, threads, cuda
        self._workers: list[Worker] = []
        self._decided, self._over, self._roused = workers is not None, False, False
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = multiprocessing.Pipe(duplex=False)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        if workers is not None:
            self.news.append((workers, f"rounds.workers={workers}"))
        for number in range(workers or 1):
            self._start(number)
        self._thread = threading.Thread(target=self._run, name="medfl-workers", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid or 0 for worker in self._workers]

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self._blocks.size

    @property
    def unread(self) -> int:
        """Replies that nobody has taken."""
        return len(self._replies)

    def room(self, size: int) -> tuple[Block, memoryview]:
        """A block for a request's content, and the view that keeps it in use."""
        with self._changed:
            block = self._blocks.take(size, self._held())
            return block, self._blocks.view(block)

    def ask(self, waiting: Iterable[Waiting]) -> None:
        """Let messages wait for workers."""
        with self._changed:
            for one in waiting:
                self._line.add(one)
            self._rouse()

    def take(self, names: Iterable[str]) -> list[Message]:
        """The replies to these messages that are there."""
        with self._changed:
            return [self._replies.pop(name) for name in self._there(names)]

    def arrived(self, names: Collection[str], timeout: float) -> list[str]:
        """Those of the messages whose replies are there, once there are any; [] after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._there(names), timeout)
            return self._there(names)

    def forget(self, names: Collection[str]) -> None:
        """Nobody waits for the replies to these messages any more: those that no worker has are not answered."""
        with self._changed:
            self._line.forget(names)
            for name in names:
                self._replies.pop(name, None)
            running = {worker.waiting.message.metadata.message_id for worker in self._workers if worker.waiting}
            self._forgotten |= running & set(names)
            self._rouse()

    def _there(self, names: Iterable[str]) -> list[str]:
        """
        Raises:
            the error that ended the thread.
        """
        if self._failure is not None:
            raise self._failure
        names = list(names)
        found = [name for name in names if name in self._replies]
        behind = len(self._replies) >= UNREAD * len(self._workers)
        self._wanted = () if found else names
        if found or behind:  # there is room for another reply, or the caller wants none of those that wait
            self._rouse()
        return found

    def _rouse(self) -> None:
        """Have the thread look for work; once is enough, and its pipe must never be full."""
        if not self._roused:
            self._roused = True
            self._wake.send_bytes(b"")

    def close(self) -> None:
        """End all processes and give back all memory."""
        self._over = True
        with self._changed:
            self._rouse()
        self._thread.join()
        for worker in self._workers:
            with suppress(OSError):
                worker.pipe.send(None)
            if not worker.idle:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
            worker.pipe.close()
            worker.view = None
        self._selector.close()
        self._woken.close()
        self._wake.close()
        self._blocks.close()

    def _held(self) -> set[int]:
        """Blocks that a worker looks at."""
        return set[int]().union(*(worker.held for worker in self._workers))

    def _run(self) -> None:
        try:
            while not self._over:
                for key, _ in self._selector.select():
                    if key.data is None:
                        self._woken.recv_bytes()
                    else:
                        self._listen(key.data)
                with self._changed:
                    self._roused = False
                    self._assign()
        except BaseException as error:  # for the caller, who would wait for ever
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _listen(self, worker: Worker) -> None:
        try:
            note = worker.pipe.recv()
        except (EOFError, OSError):
            self._lost(worker)
            return
        if isinstance(note, Ready):
            worker.ready = True
        elif isinstance(note, Logged):
            log_ = logging.getLogger(note.record.name)
            if log_.isEnabledFor(note.record.levelno):
                log_.handle(note.record)
        elif isinstance(note, Ask):
            worker.answer = self._blocks.take(note.size, self._held())
            worker.view = self._blocks.view(worker.answer)
            with suppress(OSError):  # a worker that died is heard of at the end of its pipe
                self._show(worker, worker.answer)
                worker.pipe.send(Room(worker.answer.number))
        else:
            self._done(worker, note)

    def _show(self, worker: Worker, block: Block) -> None:
        """Have the worker map a block that it has not seen."""
        worker.mapped.intersection_update(self._blocks.numbers())
        if block.number not in worker.mapped:
            worker.pipe.send(Map(block.number, block.size))
            send_handle(worker.pipe, block.file, worker.process.pid)
            worker.mapped.add(block.number)

    def _done(self, worker: Worker, done: Done) -> None:
        waiting, view = worker.waiting, worker.view
        worker.waiting = worker.answer = worker.view = None
        if waiting is None:
            raise RuntimeError(f"worker {worker.number} answered without a request.")
        reply = unpacked(done.body, view if done.block is not None else None)
        worker.held = set(done.held)
        if done.memory is not None:
            self._decide(worker_count(cores(), self._threads, memory(), done.memory))
        with self._changed:
            self._contexts[waiting.node] = done.context
            self._line.took(waiting, done.seconds)
            self._leave(waiting, reply)

    def _leave(self, waiting: Waiting, reply: Message) -> None:
        name = waiting.message.metadata.message_id
        if name in self._forgotten:
            self._forgotten.remove(name)
            return
        self._replies[name] = reply
        self._changed.notify_all()

    def _decide(self, found: tuple[int, str]) -> None:
        """Start the workers that there is room for."""
        if self._decided:
            return
        self._decided = True
        self.news.append(found)
        for number in range(1, found[0]):
            self._start(number)

    def _assign(self) -> None:
        """Give idle workers what waits, unless the server is behind with its replies."""
        running = {worker.waiting.node for worker in self._workers if worker.waiting is not None}
        for worker in self._workers:
            ahead = len(self._replies) >= UNREAD * len(self._workers)
            if not worker.idle or (ahead and (running or not self._wanted)):
                continue
            waiting = self._line.next(running, len(self._workers), self._wanted if ahead else ())
            if waiting is None:
                return
            running.add(waiting.node)
            self._send(worker, waiting)

    def _send(self, worker: Worker, waiting: Waiting) -> None:
        worker.waiting = waiting
        parcel, kind = waiting.parcel, waiting.kind
        measured = not self._decided and not kind.startswith(QUERY)
        with suppress(OSError):
            if parcel.block is not None:
                self._show(worker, self._blocks.known[parcel.block])
                worker.held.add(parcel.block)
            known, context = self._blocks.numbers(), self._contexts[waiting.node]
            worker.pipe.send(Task(waiting.message.metadata, parcel.body, parcel.block, context, known, measured))

    def _start(self, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        words = (theirs, self._app, number, self._threads, self._cuda)
        process = context.Process(target=serve, args=words, name=f"medfl-worker-{number}", daemon=True)
        process.start()
        theirs.close()
        worker = Worker(number, process, ours)
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _lost(self, worker: Worker) -> None:
        """A worker that died costs its site the reply, and is started again.

        Raises:
            ResourceError: it has never been ready, so another one would not be either.
        """
        self._selector.unregister(worker.pipe)
        worker.pipe.close()
        worker.process.join()
        how = f"exit code {worker.process.exitcode}"
        if not worker.ready:
            raise ResourceError(f"a worker process ended while it started ({how}). Its last words are above.")
        log.warning("worker %d (pid %d) died: %s; it is started again", worker.number, worker.process.pid, how)
        with self._changed:
            self._workers.remove(worker)
            if worker.waiting is not None:
                reply = crash(worker.waiting.message, f"WorkerDied ({how})")
                identify_message(reply, uuid4().hex)
                self._leave(worker.waiting, reply)
        self._start(worker.number)
