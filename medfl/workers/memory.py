"""Shared memory without a name: blocks that the server makes, that workers map, and that end with their last user.

A block's file has no path, so no crash leaves one behind, and Docker's limit on /dev/shm does not count. Blocks are
used again, as the first touch of fresh pages costs more than the copy itself (47 MB: 20 ms against 3), but never while
anybody looks at them: a view is of a numpy array that nobody else has, and its end gives the block back.
"""

import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Collection
from threading import Lock

import numpy as np

PAGES = 1 << 16  # bytes; sizes are multiples


class Block:
    """One piece of shared memory; `file` is its descriptor."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.file = _nameless(size)
        self.memory = mmap.mmap(self.file, size)


class Blocks:
    """The server's blocks. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._made = 0
        self._free: list[Block] = []
        self._returned: deque[Block] = deque()  # by finalizers, which run anywhere: they may not wait for the lock
        self.known: dict[int, Block] = {}

    def take(self, size: int, besides: Collection[int] = ()) -> Block:
        """A block of at least `size` bytes that nobody uses: the smallest one, or a new one in the place of a smaller.

        Args:
            besides: numbers of blocks that workers still look at.
        """
        with self._lock:
            self._collect()
            usable = [block for block in self._free if block.number not in besides]
            if fitting := [block for block in usable if block.size >= size]:
                found = min(fitting, key=lambda block: block.size)
                self._free.remove(found)
                return found
            if usable:
                self._drop(max(usable, key=lambda block: block.size))
            self._made += 1
            block = Block(self._made, -(-size // PAGES) * PAGES)
            self.known[block.number] = block
            return block

    def view(self, block: Block) -> memoryview:
        """The block's bytes; when the last view of this view has ended, the block is free."""
        array = np.frombuffer(block.memory, np.uint8)
        weakref.finalize(array, self._returned.append, block).atexit = False
        return array.data

    @property
    def size(self) -> int:
        """Bytes of all blocks."""
        with self._lock:
            return sum(block.size for block in self.known.values())

    def numbers(self) -> tuple[int, ...]:
        """Of all blocks."""
        with self._lock:
            return tuple(self.known)

    def close(self) -> None:
        """End all blocks; views that are still held stay readable."""
        with self._lock:
            self._collect()
            for block in list(self.known.values()):
                self._drop(block)

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            if block.number in self.known:
                self._free.append(block)

    def _drop(self, block: Block) -> None:
        os.close(block.file)
        del self.known[block.number]
        if block in self._free:
            self._free.remove(block)


class Mapped:
    """A worker's maps of the server's blocks."""

    def __init__(self) -> None:
        self._maps: dict[int, mmap.mmap] = {}
        self._views: dict[int, weakref.ref[np.ndarray]] = {}

    def add(self, number: int, size: int, file: int) -> None:
        self._maps[number] = mmap.mmap(file, size)
        os.close(file)

    def keep(self, known: Collection[int]) -> None:
        """Unmap what the server has dropped."""
        for number in self._maps.keys() - set(known):
            del self._maps[number]

    def view(self, number: int) -> memoryview:
        array = np.frombuffer(self._maps[number], np.uint8)
        self._views[number] = weakref.ref(array)
        return array.data

    def held(self) -> tuple[int, ...]:
        """The blocks that somebody in this process still looks at."""
        return tuple(number for number, array in self._views.items() if array() is not None)


def _nameless(size: int) -> int:
    """The descriptor of a file in memory that has no path."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("medfl", os.MFD_CLOEXEC)
    else:  # macOS: the file's pages are shared all the same
        with tempfile.TemporaryFile() as made:
            file = os.dup(made.fileno())
    os.ftruncate(file, size)
    return file
