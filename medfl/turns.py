"""Updates in the order of site names, whatever the order in which they come; those that wait lie on disk."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from medfl.files import room_for
from medfl.gate import Update

IN_MEMORY = 4  # updates that may wait there

Take = Callable[[Update], Update]


class Turns:
    """Hands each update to `take` when all sites before it have come or are gone.

    The order makes sums the same bits whoever was first; the disk makes memory the same however many wait.

    Args:
        names: of all sites that were asked.
        take: what it returns is kept; None: the updates, all in memory.
        folder: where updates wait, in files without a name: nothing is left of them after a crash.
    """

    def __init__(self, names: Sequence[str], take: Take | None, folder: Path) -> None:
        self.done: list[Update] = []  # what `take` returned, in order
        self._names, self._take, self._folder = sorted(names, reverse=True), take, folder
        self._waiting: dict[str, Update | Stored | None] = {}

    def came(self, update: Update) -> None:
        """
        Raises:
            ResourceError: it has to wait and the disk is full.
        """
        self._waiting[update.site] = update
        self._go_on()
        early = [waiting for waiting in self._waiting.values() if isinstance(waiting, Update)]
        if self._take and len(early) > IN_MEMORY and update.site in self._waiting:
            self._waiting[update.site] = Stored.of(update, self._folder)

    def gone(self, name: str) -> None:
        """This site gives nothing usable."""
        self._waiting[name] = None
        self._go_on()

    def _go_on(self) -> None:
        while self._names and self._names[-1] in self._waiting:
            waiting = self._waiting.pop(self._names.pop())
            if isinstance(waiting, Stored):
                waiting = waiting.read()
            if waiting is not None:
                self.done.append(self._take(waiting) if self._take else waiting)


def detached(update: Update) -> Update:
    """The update with its arrays copied: nothing holds the message that it came in."""
    return replace(update, flat={group: array.copy() for group, array in update.flat.items()})


@dataclass(frozen=True)
class Stored:
    """An update whose arrays are in a file."""

    update: Update  # without them
    file: IO[bytes]
    places: dict[str, tuple[str, int]]  # group -> dtype, elements; in the order of the file

    @classmethod
    def of(cls, update: Update, folder: Path) -> "Stored":
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it is read later
        with room_for(folder):
            for array in update.flat.values():
                file.write(np.ascontiguousarray(array).data)
            file.flush()
        places = {group: (str(array.dtype), array.size) for group, array in update.flat.items()}
        return cls(replace(update, flat={}), file, places)

    def read(self) -> Update:
        """The update; its file is gone afterwards."""
        with self.file:
            self.file.seek(0)
            flat = {group: np.fromfile(self.file, dtype, size) for group, (dtype, size) in self.places.items()}
        return replace(self.update, flat=flat)
