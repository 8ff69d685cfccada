"""Runs beside each other: what one row is, what it is called, and the numbers in it."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medfl import overrides
from medfl.cli.compare import compare as command
from medfl.errors import ConfigError
from medfl.report.compare import GAIN, VERSUS_FIRST, Question, compare, estimate, render, write
from tests.run_folder import CONFIG, EVALUATION, write_run, write_table

AUC = Question("linear", "auc")
SITES = ("site-1", "site-2", "site-3")  # of the made-up run, those with an AUC


def run(
    folder: Path, *, seed: int, gains: Mapping[str, float] | None = None, command: str = "", **changes: Any
) -> Path:
    """A made-up run of another seed. gains: arm -> added to its AUC at every site."""
    write_run(folder)
    tree = yaml.safe_load((folder / "config.yaml").read_text()) | {"seed": seed, **changes}
    tree["run"], tree["provenance"]["command"] = {"dir": str(folder), "state_dir": None}, command
    tree["data"]["seed"] = seed
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    rows = scores(folder)
    for row in rows:
        if row["metric"] == "auc" and row["value"]:
            row["value"] = str(float(row["value"]) + (gains or {}).get(row["arm"].partition(":")[0], 0.0))
    write_table(folder / "evaluation.csv", EVALUATION, [tuple(row.values()) for row in rows])
    return folder


def scores(folder: Path) -> list[dict[str, str]]:
    with (folder / "evaluation.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mean_auc(folder: Path, arm: str) -> float:
    own = {(row["arm"], row["site"]): row["value"] for row in scores(folder)
           if (row["protocol"], row["metric"]) == ("linear", "auc")}  # fmt: skip
    return float(np.mean([float(own[f"local:{site}" if arm == "local" else arm, site]) for site in SITES]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three seeds of SimCLR, two of BYOL."""
    root, noise = tmp_path_factory.mktemp("runs"), np.random.default_rng(0).normal(0, 0.02, (6, 2))
    kinds = [("simclr", 0), ("simclr", 1), ("simclr", 2), ("byol", 1), ("byol", 2)]
    return {
        f"{kind}-{seed}": run(
            root / f"{kind}-{seed}",
            seed=seed,
            gains={"federated": noise[place, 0], "local": noise[place, 1]},
            method={"_target_": f"medfl.methods.{kind}.{kind}"},
        )
        for place, (kind, seed) in enumerate(kinds)
    }


def test_one_row_is_one_study_with_students_interval_over_its_seeds(runs: dict[str, Path]) -> None:
    table = compare(list(runs.values()), AUC)
    assert [row.name for row in table.rows] == ["method=simclr", "method=byol"]
    assert [list(row.runs) for row in table.rows] == [[0, 1, 2], [1, 2]]
    for row, kind in zip(table.rows, ("simclr", "byol"), strict=True):
        for arm in ("local", "federated"):
            values = [mean_auc(path, arm) for name, path in runs.items() if name.startswith(kind)]
            wanted = [np.mean(values), *stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))]
            found = estimate(row.arms[arm])
            assert found is not None
            assert [found.value, found.low, found.high] == pytest.approx(wanted, abs=1e-9)


def test_differences_are_paired_by_seed(runs: dict[str, Path]) -> None:
    table = compare(list(runs.values()), AUC)
    gain = {seed: mean_auc(runs[f"simclr-{seed}"], "federated") - mean_auc(runs[f"simclr-{seed}"], "local")
            for seed in (0, 1, 2)}  # fmt: skip
    assert table.differences[GAIN][0] == pytest.approx(gain)
    versus = {seed: mean_auc(runs[f"byol-{seed}"], "federated") - mean_auc(runs[f"simclr-{seed}"], "federated")
              for seed in (1, 2)}  # fmt: skip
    assert list(table.differences[VERSUS_FIRST][0]) == []
    assert table.differences[VERSUS_FIRST][1] == pytest.approx(versus)


def test_one_seed_has_no_interval_and_fine_tuned_protocols_have_a_table(tmp_path: Path) -> None:
    folder = run(tmp_path / "one", seed=0)
    rows = [tuple(row.values()) for row in scores(folder)]
    tuned = [(*row[:3], "federated_finetune", *row[4:]) for row in rows if row[3] == "linear"]
    write_table(folder / "evaluation.csv", EVALUATION, [*rows, *tuned])
    table = compare([folder], AUC)
    found = estimate(table.tuned["federated_finetune"][0])
    assert found is not None
    assert (found.value, found.low, found.high) == (pytest.approx(mean_auc(folder, "federated")), None, None)
    assert compare([folder], Question("federated_finetune", "auc")).means.keys() == table.means.keys()


def test_page_and_sheet_say_the_same_and_fetch_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    table = compare(list(runs.values()), AUC)
    sheet, page = write(table, AUC, tmp_path)
    text = page.read_text()
    assert text == render(table)
    assert not re.search(r"https?:|@import|<script|<link|<iframe|\ssrc\s*=", text, re.IGNORECASE)
    with sheet.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["quantity"] for row in rows} == {*table.means, *table.differences}
    for row in rows:
        sign = "+" if "-" in row["quantity"] else ""
        assert f"{float(row['value']):{sign}.3f}".replace("-", "−") in text
        assert len(row["seeds"].split()) == len(row["runs"].split())
    assert {row["seeds"] for row in rows if row["quantity"] == VERSUS_FIRST} == {"1 2"}


def test_the_terminal_shows_it_in_a_hundred_columns(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command([str(path) for path in runs.values()])
    shown = capsys.readouterr().out
    tables = shown.partition("Scores are means")[0].splitlines()
    assert max(len(line.rstrip()) for line in tables) <= 100
    assert "1 method=simclr" in shown
    for arm in ("local", "federated"):
        found = estimate(compare(list(runs.values()), AUC).rows[0].arms[arm])
        assert found is not None
        assert f"{found.value:.3f}" in tables[4]


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["{none}"], "is no run folder"),
        (["{a}", "{a}/../again"], "are the same study with seed 0"),
        (["{a}", "metric=dice"], "no linear dice at fraction=1; there is .*linear auc"),
        (["{a}", "protocol=finetune", "fraction=0.1"], "no finetune auc at fraction=0.1"),
        (["{a}", "fraction=some"], "need a share"),
        (["to=x"], "usage: medfl compare"),
        (["{a}", "--all"], "usage: medfl compare"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(words: list[str], finding: str, tmp_path: Path) -> None:
    places = {"a": run(tmp_path / "a", seed=0), "none": tmp_path}
    run(tmp_path / "again", seed=0)
    with pytest.raises(ConfigError, match=finding) as caught:
        command([word.format(**places) for word in words])
    assert "\n" not in str(caught.value)


def config(command: str = "", **changes: Any) -> dict[str, Any]:
    return {**CONFIG, "provenance": {"command": command}, **changes}


def test_names_are_the_overrides_that_differ() -> None:
    shared = "medfl simulate sites=hospital seed={} run.dir=x{}"
    by_words = [config(shared.format(0, " method=simclr")), config(shared.format(0, " method=moco method.lr=0.1"))]
    by_words[0]["method"], by_words[1]["method"] = {"_target_": "a.B"}, {"_target_": "a.C"}
    assert overrides.names(by_words) == ["method=simclr", "method=moco method.lr=0.1"]
    rounds = [config(rounds={**CONFIG["rounds"], "count": n}) for n in (5, 9)]  # type: ignore[dict-item]
    assert overrides.names(rounds) == ["rounds.count=5", "rounds.count=9"]
    encoder = {"_target_": "medfl.models.encoders.ResNet", "norm": "batch"}
    method = {"_target_": "medfl.methods.simclr.SimCLR", "temperature": 0.2}
    nested = [config(encoder=encoder | {"norm": norm}, method=method | {"encoder": encoder | {"norm": norm}})
              for norm in ("batch", "group")]  # fmt: skip
    assert overrides.names(nested) == ["encoder.norm=batch", "encoder.norm=group"]
    kinds = [
        config(method=node) for node in (method, method | {"temperature": 0.5}, {"_target_": "medfl.methods.byol.BYOL"})
    ]
    assert overrides.names(kinds) == [
        "method=simclr method.temperature=0.2",
        "method=simclr method.temperature=0.5",
        "method=byol",
    ]


LEAVES = st.one_of(st.integers(0, 2), st.sampled_from("ab"), st.none())
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, max_size=3), max_leaves=6)


@given(
    st.lists(st.dictionaries(st.sampled_from(["data", "method", "rounds"]), TREES, min_size=1), min_size=2, max_size=4)
)
def test_different_studies_have_different_names(trees: list[dict[str, Any]]) -> None:
    different = [tree for place, tree in enumerate(trees) if tree not in trees[:place]]
    if len(different) > 1:
        found = overrides.names(different)
        assert len(set(found)) == len(different)
        assert all(found)


def test_a_study_is_not_its_seed_nor_its_place() -> None:
    one, other = config(seed=1), config("medfl simulate seed=2", seed=2, run={"dir": "elsewhere"}, stages=["pretrain"])
    one["data"], other["data"] = {**CONFIG["data"], "seed": 1}, {**CONFIG["data"], "seed": 2}  # type: ignore[dict-item]
    assert overrides.studied(one) == overrides.studied(other)
    assert overrides.studied(one) != overrides.studied(config(rounds={"count": 1}))
