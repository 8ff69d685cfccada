"""Bad sites among honest ones: what sticks out is named, what is only different is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medfl import conduct, inspector
from medfl.ballot import Ballot, influence
from medfl.conduct import Earlier, judge
from medfl.enrolment import Enrolled
from medfl.gate import Update
from medfl.layout import Flat
from medfl.rules import krum, median, trimmed_mean, weighted_mean
from medfl.server_state import Blueprint
from medfl.study import Study
from tests.federation.small import small_study

GROUP = "parameter/all/float32"
SITES = 6


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return small_study(tmp_path_factory.mktemp("study"), "method=simclr", "rounds.inspect=exclude")


@pytest.fixture(scope="module")
def blueprint(study: Study) -> Blueprint:
    return Blueprint.of(study)


def moves(blueprint: Blueprint, seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    """The broadcast, and honest sites' moves: a common part, and one of their own that is as long."""
    old, draw = blueprint.initial[GROUP], np.random.default_rng(seed)
    common = draw.standard_normal(old.size)
    return old, [(0.02 * (common + draw.standard_normal(old.size))).astype(np.float32) for _ in range(SITES)]


def judged(study: Study, blueprint: Blueprint, weights: list[np.ndarray], earlier: Earlier | None = None) -> Any:
    names = [f"site-{number + 1}" for number in range(len(weights))]
    updates = [Update(name, {GROUP: value}, 10, {}, 1.0) for name, value in zip(names, weights, strict=True)]
    ballot = ballot_of(blueprint, updates)
    return judge(study, blueprint.sends, updates, ballot, {} if earlier is None else earlier)


def ballot_of(blueprint: Blueprint, updates: list[Update], before: Flat | None = None) -> Ballot:
    sites = {update.site: Enrolled(1, update.site, 10, False) for update in updates}
    return Ballot.of(updates, sites, blueprint.sends, blueprint.initial if before is None else before)


PLANTED = {
    "flipped": lambda move, draw: -move,
    "ten times": lambda move, draw: 10 * move,
    "long noise": lambda move, draw: (0.2 * draw.standard_normal(move.size)).astype(np.float32),
    "overflowing": lambda move, draw: np.full_like(move, 1e15),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_outlier_is_left_out_alone(kind: str, study: Study, blueprint: Blueprint) -> None:
    old, made = moves(blueprint)
    made[2] = PLANTED[kind](made[2], np.random.default_rng(9))
    found = judged(study, blueprint, [old + move for move in made])
    assert list(found.out) == [2]
    assert "'site-3' sticks out" in found.out[2]
    assert len(found.told) == 2 * SITES


@pytest.mark.parametrize("seed", range(3))
def test_sites_that_are_only_different_stay(seed: int, study: Study, blueprint: Blueprint) -> None:
    """One whose own part is four times as long as what it has in common with the others."""
    old, made = moves(blueprint, seed)
    own = np.random.default_rng(100 + seed).standard_normal(old.size)
    made[4] = (made[4] / 3 + 0.025 * own).astype(np.float32)
    found = judged(study, blueprint, [old + move for move in made])
    assert not found.remarks


def test_of_three_sites_nobody_is_the_odd_one(study: Study, blueprint: Blueprint) -> None:
    old, made = moves(blueprint)
    found = judged(study, blueprint, [old + made[0], old + made[1], old - made[2]])
    assert not found.remarks
    assert not found.told


def test_flag_only_says_so_and_none_does_not_look(study: Study, blueprint: Blueprint, tmp_path: Path) -> None:
    old, made = moves(blueprint)
    weights = [old + move for move in made[:-1]] + [old - made[-1]]
    for mode, remarks in {"flag": 1, "none": 0}.items():
        found = judged(small_study(tmp_path, "method=simclr", f"rounds.inspect={mode}"), blueprint, weights)
        assert (len(found.remarks), found.out) == (remarks, {})


def test_unchanged_copied_and_replayed_updates_are_named(study: Study, blueprint: Blueprint) -> None:
    old, made = moves(blueprint)
    earlier: Earlier = {}
    first = [old + move for move in made]
    assert not judged(study, blueprint, first, earlier).remarks
    _, new = moves(blueprint, 1)
    second = [old + 0.5 * move for move in new]
    second[0] = old.copy()
    second[2] = second[1] * np.float32(1 + 1e-7)  # not to the bit
    second[4] = first[4]
    found = judged(study, blueprint, second, earlier)
    assert sorted(found.out) == [0, 2, 4]
    assert "'site-1' sent the broadcast back unchanged" in found.out[0]
    assert "'site-2' and 'site-3' sent the same update" in found.out[2]
    assert "'site-5' sent an update of an earlier round again" in found.out[4]
    assert {name: len(kept) for name, kept in earlier.items()} == {f"site-{n + 1}": 2 for n in range(SITES)}
    again = conduct.of_tensors({**conduct.to_tensors(earlier), "parameter/x": torch.zeros(1)})
    assert again.keys() == earlier.keys()


def test_an_old_move_on_new_weights_is_a_replay_too(study: Study, blueprint: Blueprint) -> None:
    old, made = moves(blueprint)
    earlier: Earlier = {}
    judged(study, blueprint, [old + move for move in made], earlier)
    now, new = old + np.float32(0.3), moves(blueprint, 1)[1]
    values = [now + move for move in [*new[:-1], made[-1]]]
    updates = [Update(f"site-{n + 1}", {GROUP: value}, 10, {}, 1.0) for n, value in enumerate(values)]
    ballot = ballot_of(blueprint, updates, {**blueprint.initial, GROUP: now})
    found = judge(study, blueprint.sends, updates, ballot, earlier)
    assert list(found.out) == [SITES - 1]


def test_where_nobody_moved_all_are_named_and_nobody_is_left_out(study: Study, blueprint: Blueprint) -> None:
    found = judged(study, blueprint, [blueprint.initial[GROUP].copy() for _ in range(SITES)])
    assert len(found.remarks) == SITES
    assert not found.out


@given(st.integers(0, 10**6))
def test_strangeness_does_not_depend_on_order_or_on_the_scale_of_the_features(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    embedded = torch.randn(1, 16, 8, generator=draw) + 0.3 * torch.randn(5, 16, 8, generator=draw)
    order, plain = torch.randperm(5, generator=draw), inspector.strangeness(embedded)
    shuffled = inspector.strangeness(7 * embedded[order])
    np.testing.assert_allclose(shuffled, np.asarray(plain)[order], rtol=1e-5, atol=1e-5)
    assert inspector.strangeness(embedded[:1].expand(5, -1, -1)) == [0.0] * 5


RULES = {
    "weighted_mean": weighted_mean,
    "median": median,
    "trimmed_mean": lambda *g: trimmed_mean(*g, trim=1),
    "krum": lambda *g: krum(*g, bad=1, keep=None),
}


@pytest.mark.parametrize("name", RULES)
def test_influence_is_the_rule_without_each_site(name: str, blueprint: Blueprint) -> None:
    old, made = moves(blueprint)
    updates = [Update(f"site-{n + 1}", {GROUP: old + move}, 10, {}, 1.0) for n, move in enumerate(made)]
    rule, exact = RULES[name], []
    whole = ballot_of(blueprint, updates).count(rule, 1.0)[GROUP]
    for place in range(SITES):
        rest = ballot_of(blueprint, updates[:place] + updates[place + 1 :]).count(rule, 1.0)[GROUP]
        exact.append(np.linalg.norm(rest - whole) / np.linalg.norm(whole - old))
    np.testing.assert_allclose(influence(ballot_of(blueprint, updates), rule, 1.0), exact, rtol=0.1)


def test_there_is_no_influence_of_one_site_nor_where_nothing_moved_or_the_rule_needs_all(blueprint: Blueprint) -> None:
    old, made = moves(blueprint)
    updates = [Update(f"site-{n + 1}", {GROUP: old + move}, 10, {}, 1.0) for n, move in enumerate(made[:5])]
    assert influence(ballot_of(blueprint, updates[:1]), weighted_mean, 1.0) == []
    assert influence(ballot_of(blueprint, updates), RULES["krum"], 1.0) == []  # of five, four are too few
    still = [Update(update.site, {GROUP: old.copy()}, 10, {}, 1.0) for update in updates]
    assert influence(ballot_of(blueprint, still), weighted_mean, 1.0) == []
