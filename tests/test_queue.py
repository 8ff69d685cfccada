"""The queue of keys, against a plain list."""

import copy
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medfl.errors import ConfigError
from medfl.models.queue import Queue, limit_for


class Row(NamedTuple):
    """What a queue holds of one key."""

    key: tuple[float, ...]
    version: int
    patient: int


def rows_of(queue: Queue) -> list[Row]:
    """The rows with a key, oldest first: the next key goes where the oldest is."""
    order = [(int(queue.position) + place) % queue.limit for place in range(queue.limit)]
    rows = [Row(tuple(queue.keys[i].tolist()), int(queue.versions[i]), int(queue.patients[i])) for i in order]
    return [row for row in rows if row.version >= 0]


def pushed(queue: Queue, count: int, round: int = 0, first: int | None = None) -> list[Row]:  # noqa: A002
    """Push random unit keys, of patients from `first` on; returns them as rows."""
    keys = torch.nn.functional.normalize(torch.randn(count, queue.keys.shape[1]))
    queue.round = round
    patients = None if first is None else first + torch.arange(count)
    queue.push(keys, patients)
    told = [-1] * count if patients is None else patients.tolist()
    return [Row(tuple(key), round, patient) for key, patient in zip(keys.tolist(), told, strict=True)]


@given(
    capacity=st.integers(1, 12),
    share=st.floats(0.1, 1),
    batches=st.lists(st.tuples(st.integers(0, 15), st.one_of(st.none(), st.integers(0, 3))), max_size=8),
)
@settings(max_examples=80, deadline=None)
def test_the_queue_is_a_list_of_the_last_keys(
    capacity: int, share: float, batches: list[tuple[int, int | None]]
) -> None:
    queue, expected = Queue(capacity, 2), list[Row]()
    queue.limit = max(1, int(capacity * share))
    for round_, (count, first) in enumerate(batches):
        expected = (expected + pushed(queue, count, round_, first))[-queue.limit :]
        assert rows_of(queue) == expected
        assert int(queue.position) < queue.limit
    unused = queue.keys[queue.limit :], queue.versions[queue.limit :]
    assert not unused[0].any()
    assert bool((unused[1] == -1).all())


def test_batches_that_do_not_divide_the_queue_wrap_around_its_end() -> None:
    queue = Queue(10, 3)
    batches = [pushed(queue, 4) for _ in range(4)]
    rows = [Row(tuple(key), 0, -1) for key in queue.snapshot().tolist()]
    assert rows == [*batches[2][2:], *batches[3], *batches[1][2:], *batches[2][:2]]


def test_a_snapshot_stays_as_it_was_taken() -> None:
    queue = Queue(4, 3)
    pushed(queue, 4)
    taken = queue.snapshot()
    before = taken.clone()
    pushed(queue, 3)
    assert torch.equal(taken, before)
    assert not torch.equal(queue.snapshot(), before)


def test_what_is_pushed_leaves_its_graph_and_its_precision() -> None:
    queue = Queue(4, 3)
    queue.push(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), None)
    assert queue.keys.dtype == torch.float32
    assert not queue.keys.requires_grad
    assert not queue.snapshot().requires_grad


def test_empty_rows_and_those_of_the_same_patient_are_hidden() -> None:
    queue = Queue(6, 2)
    queue.limit = 5
    queue.push(torch.eye(2), torch.tensor([7, 8]))
    queue.push(torch.eye(2), torch.tensor([7, -1]))
    assert queue.hidden(None).tolist() == [[False, False, False, False, True]]
    asked = queue.hidden(torch.tensor([7, 8, 9, -1]))
    assert asked.tolist() == [
        [True, False, True, False, True],
        [False, True, False, False, True],
        [False, False, False, False, True],
        [False, False, False, False, True],  # two unknown patients are not one
    ]


def test_old_keys_are_dropped_and_the_queue_goes_on() -> None:
    queue, rows = Queue(7, 2), list[Row]()
    for round_, count in enumerate((2, 3, 4)):
        rows += pushed(queue, count, round_, first=round_)
    rows = rows[-7:]
    told = {name: float(value) for name, value in queue.monitors().items()}
    assert told == pytest.approx({"queue_filled": 1.0, "queue_stale": 3 / 7})
    queue.drop_older(2)
    rows = [row for row in rows if row.version >= 2]
    assert rows_of(queue) == rows
    told = {name: float(value) for name, value in queue.monitors().items()}
    assert told == pytest.approx({"queue_filled": 4 / 7, "queue_stale": 0.0})
    rows += pushed(queue, 2, 3)
    assert rows_of(queue) == rows


def test_a_cleared_queue_is_a_new_one() -> None:
    queue = Queue(5, 2)
    pushed(queue, 3, 4, first=2)
    queue.clear()
    torch.testing.assert_close(queue.state_dict(), Queue(5, 2).state_dict(), rtol=0, atol=0)
    assert {name: float(value) for name, value in queue.monitors().items()} == {"queue_filled": 0, "queue_stale": 0}
    assert bool(queue.hidden(torch.tensor([2])).all())


def test_the_state_holds_all_that_later_pushes_need() -> None:
    queue, other = Queue(6, 2), Queue(6, 2)
    pushed(queue, 4, 1, first=3)
    other.load_state_dict(copy.deepcopy(queue.state_dict()))
    keys: Tensor = torch.randn(5, 2)
    for one in (queue, other):
        one.round = 2
        one.push(keys, None)
    assert rows_of(other) == rows_of(queue)


@pytest.mark.parametrize(
    ("images", "batch", "limit"),
    [(100_000, 128, 4096), (1000, 64, 192), (1023, 64, 192), (1024, 64, 256), (40, 32, 32), (8, 8, 8), (9, 5000, 4096)],
)
def test_a_site_uses_whole_batches_up_to_a_quarter_of_its_images(images: int, batch: int, limit: int) -> None:
    assert limit_for(4096, batch=batch, images=images) == limit


def test_the_limit_grows_with_the_images_and_stays_in_its_bounds() -> None:
    draw = Random(0)
    for _ in range(200):
        capacity, batch = draw.randint(1, 500), draw.randint(1, 60)
        few, many = sorted((draw.randint(1, 3000), draw.randint(1, 3000)))
        small, large = (limit_for(capacity, batch=batch, images=images) for images in (few, many))
        assert min(batch, capacity) <= small <= large <= capacity
        assert small <= max(batch, few / 4)


def test_a_queue_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.capacity: got 0, need at least 1 key"):
        Queue(0, 2)
