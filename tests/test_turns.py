"""Updates in the order of names, whatever the order in which they come, and nothing left on disk."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl.gate import Update
from medfl.turns import IN_MEMORY, Turns, detached

NAMES = [f"site-{number:02d}" for number in range(9)]


def update(name: str) -> Update:
    draw = np.random.default_rng(NAMES.index(name))
    flat = {
        "parameter/all/float32": draw.standard_normal(70).astype(np.float32),
        "statistics/all/float64": draw.random(3),
    }
    return Update(name, flat, 5, {"loss/total": 1.0}, 1.0)


@settings(deadline=None)
@given(st.permutations(NAMES), st.sets(st.sampled_from(NAMES), max_size=5))
def test_updates_are_taken_in_the_order_of_names_with_all_their_bits(order: list[str], lost: set[str]) -> None:
    taken: list[Update] = []

    def take(one: Update) -> Update:
        taken.append(detached(one))
        return one

    turns = Turns(NAMES, take, Path(tempfile.gettempdir()))
    for name in order:
        turns.gone(name) if name in lost else turns.came(update(name))
    assert [one.site for one in taken] == [one.site for one in turns.done] == [n for n in NAMES if n not in lost]
    for one in taken:
        for group, array in update(one.site).flat.items():
            np.testing.assert_array_equal(one.flat[group], array)


def test_who_waits_for_one_site_waits_on_disk(tmp_path: Path) -> None:
    turns = Turns(NAMES, lambda one: one, tmp_path)
    for name in NAMES[1:]:
        turns.came(update(name))
    held = [waiting for waiting in turns._waiting.values() if isinstance(waiting, Update)]
    assert len(held) == IN_MEMORY
    assert not turns.done
    turns.came(update(NAMES[0]))
    assert len(turns.done) == len(NAMES)
    assert not list(tmp_path.iterdir())
