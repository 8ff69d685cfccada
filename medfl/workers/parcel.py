"""A message in two parts: tensors, which go into shared memory, and a few kB of everything else."""

import io
import pickle
from typing import Any

import numpy as np
from flwr.app import Array

LEAST = 4096  # bytes; a smaller array is sent along
ALIGNED = 64


class Packed(pickle.Pickler):
    """`body` is the object without its large arrays, which need `size` bytes of shared memory."""

    def __init__(self, thing: object) -> None:
        file = io.BytesIO()
        super().__init__(file, protocol=5)
        self._parts: list[tuple[int, bytes]] = []
        self.size = 0
        self.dump(thing)
        self.body = file.getvalue()

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, Array) or len(obj.data) < LEAST:
            return None
        place, length = self.size, len(obj.data)
        self._parts.append((place, obj.data))
        self.size += -(-length // ALIGNED) * ALIGNED
        return place, length, obj.dtype, tuple(obj.shape), obj.stype

    def reducer_override(self, obj: Any) -> Any:
        """The few bytes of a small array that is a view."""
        return (bytes, (bytes(obj),)) if isinstance(obj, memoryview) else NotImplemented

    def fill(self, memory: memoryview) -> None:
        """Copy the arrays to their places."""
        whole = np.frombuffer(memory, np.uint8)  # numpy's copy leaves the other threads running
        for place, data in self._parts:
            whole[place : place + len(data)] = np.frombuffer(data, np.uint8)


class _Unpacked(pickle.Unpickler):
    def __init__(self, body: bytes, memory: memoryview | None) -> None:
        super().__init__(io.BytesIO(body))
        self._memory = memory

    def persistent_load(self, pid: tuple[Any, ...]) -> Array:
        place, length, dtype, shape, stype = pid
        if self._memory is None:
            raise pickle.UnpicklingError("an array in shared memory, and no memory came with it")
        array = Array(dtype, shape, stype, b"")
        array.data = self._memory[place : place + length].toreadonly()  # type: ignore[assignment]
        return array


def unpacked(body: bytes, memory: memoryview | None) -> Any:
    """The object; its large arrays are views of `memory`. Only what processes of one simulation sent each other."""
    return _Unpacked(body, memory).load()
