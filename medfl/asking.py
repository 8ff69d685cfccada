"""Messages out, replies back: one by one as they come, none of which can end the run of all."""

import time
from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Error, Message
from flwr.serverapp import Grid

from medfl.errors import NetworkError
from medfl.faults import point
from medfl.flower_compat import ConnectionLost, limited
from medfl.nodes import Prompt

POLL = 0.5  # s between two looks for replies
SPARE = 2_000_000  # bytes of a reply beside its tensors: numbers, names, Flower's own headers
UNREADABLE = 400  # code of the error reply that takes the place of what cannot be read


def replies(grid: Grid, asked: Sequence[Message], deadline: float, *, most: int) -> Iterator[tuple[int, Message]]:
    """Send the messages; (place of the message, reply) as they come, until all are there or the time (s) is over.

    A reply that cannot be read is an error reply of that site.

    Args:
        most: bytes of a reply's tensors; a larger one is an error reply too.

    Raises:
        NetworkError: the SuperLink cannot be reached any more.
    """
    point("before_send")
    waiting: dict[str, int] = {}
    try:
        waiting = {name: place for place, name in enumerate(grid.push_messages(asked)) if name}
        end = time.monotonic() + deadline
        point("waiting")
        while waiting:
            came = False
            for name in _there(grid, waiting):
                place = waiting[name]
                for reply in _pulled(grid, name, asked[place], most):
                    if waiting.pop(name, None) is None:
                        break  # a second reply to the same message
                    came = True
                    yield place, reply
                    point("after_one_reply")
            if time.monotonic() > end:
                return
            if not came and not isinstance(grid, Prompt):
                time.sleep(POLL)
    except ConnectionLost as error:
        raise NetworkError(f"the SuperLink cannot be reached: {error}. Start it; the run goes on by itself.") from None
    finally:
        if isinstance(grid, Prompt):
            grid.forget(list(waiting))


def _there(grid: Grid, waiting: Iterable[str]) -> list[str]:
    """The messages to pull replies to: all, or those that are there where the grid can tell, and wait for one."""
    return grid.arrived(list(waiting), POLL) if isinstance(grid, Prompt) else list(waiting)


def _pulled(grid: Grid, name: str, asked: Message, most: int) -> Iterable[Message]:
    """The reply to a message, or none yet."""
    try:
        with limited(most + SPARE):
            return list(grid.pull_messages([name]))
    except ConnectionLost:
        raise
    except Exception as error:  # what a site sent must not end the run of all
        text = f"its reply cannot be read: {type(error).__name__}."
        return [Message(Error(code=UNREADABLE, reason=text), reply_to=asked)]
