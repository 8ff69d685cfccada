"""What the report reads from a run's rows: budgets, rounds, and who took part."""

import numpy as np

from medfl.evaluation.counts import BINS
from medfl.exports import card
from medfl.report import panels, predicted, privacy, sections, summary, transfer
from medfl.report.rows import Counted, Event, Score, Transfer
from medfl.report.tables import Run

ENCODER = {
    "architecture": {"_target_": "medfl.models.encoders.ResNet"},
    "input": {"spatial_dims": 2, "channels": 1, "size": 8},
    "provenance": {},
    "sha256": "0",
}
PRIVATE = {"privacy": {"mechanism": "patient", "noise": 1.0, "clip": 1.0}}


def event(name, value=1.0, *, arm="federated", at=1, site="", stage="pretrain", reason=""):
    return Event("", stage, arm, at, site, name, value, reason)


def counted(arm, site):
    return Counted(arm, site, "linear", 1.0, ("no", "yes"), 3, np.zeros((2, 2, BINS), int), np.zeros((2, 2), int))


def spent(*told):
    """The section of a run in which site a told (name, value, arm, round)."""
    events = tuple(event(f"site/{name}", value, arm=arm, at=at, site="a") for name, value, arm, at in told)
    return privacy.section(Run("run", PRIVATE, events=events))


def test_a_tight_epsilon_counts_until_the_site_releases_more():
    first = (("delta", 1e-5, "local:a", 9), ("epsilon", 4.5, "local:a", 9), ("epsilon_rdp", 5.0, "local:a", 9))
    assert spent(*first)["rows"] == [("a", "5", "4.5", "1.0e-05")]
    later = spent(*first, ("epsilon_rdp", 9.0, "federated", 1), ("epsilon_rdp", 14.0, "federated", 2))
    assert (later["worst"], later["weak"], later["rows"]) == ("14", True, [("a", "14", "–", "1.0e-05")])
    last = (("epsilon_rdp", 16.0, "federated", 3), ("epsilon", 11.5, "federated", 3))
    for order in (last, last[::-1]):
        assert spent(*first, *order)["worst"] == "11.5"


def test_a_real_study_tells_its_held_out_site_apart_everywhere():
    """Only a simulation has sites.json; the study names the held-out one of real sites."""
    better = {"random": 0.6, "federated": 0.8}
    scores = [
        Score(arm, site, "classification", "linear", 1.0, "auc", auc - 0.3 * (site == "c"), 0.1, 0.9)
        for arm, auc in better.items()
        for site in "abc"
    ]
    scores += [Score(f"local:{site}", site, "classification", "linear", 1.0, "auc", 0.7, 0.6, 0.8) for site in "ab"]
    rows = [
        Transfer(arm, site, "representation", "auc", auc, 0.1, 0.9) for arm, auc in better.items() for site in "abc"
    ]
    counts = tuple(counted(arm, site) for arm in better for site in "abc")
    run = Run("run", {"sites": {"held_out": "c"}}, scores=tuple(scores), transfers=tuple(rows), counts=counts)
    table = summary.compare_arms(run, "linear", "auc")
    assert (table.compared, table.unseen, dict(table.left_out)) == (("a", "b"), ("c",), {})
    assert predicted.shared_sites(run, "linear") == ["a", "b"]
    assert ("c", "unseen") in transfer.section(run)["matrices"][0]["columns"]
    assert ("Sites", "2, and 1 unseen") in sections.study(run, table)["facts"]
    text = card.render(run, ENCODER, name="federated", width=8, uses={})
    assert "AUC (unseen sites) | 0.500" in text
    assert "AUC | 0.800" in text
    assert not Run("run", {"sites": {"held_out": "U"}}, scores=tuple(scores)).unseen


def test_a_round_is_finished_when_it_is_closed_and_not_before():
    closed = (event("loss/total", at=2), event("round/sites", 3.0, at=2))
    failed = [event(name, at=3, site="a", reason="late") for name in ("refused", "joined", "phase", "remark")]
    run = Run("run", {"rounds": {"count": 3}}, events=(*closed, *failed))
    assert panels.rounds_of(run) == {"federated": 2}
    facts = dict(sections.study(run, summary.headline(run))["facts"])
    assert facts["Federated rounds"] == "2 of 3 done"
    assert facts["Pretraining"] == "not finished: federated"
    skipped = event("round/sites", 0.0, at=3)  # of a phase that no site can teach
    assert panels.rounds_of(Run("run", events=(*closed, skipped))) == {"federated": 3}


def test_a_site_that_trained_without_a_score_of_its_own_keeps_its_row():
    values = {"aa": 0.8, "ba": 0.7, "ca": 0.9, "ab": 0.7, "bb": 0.9, "cb": 0.5}
    cells = {**{(name[0], name[1]): value for name, value in values.items()}, ("federated", "a"): 0.85}
    rows = [Transfer(*where, "representation", "auc", value, value, value) for where, value in cells.items()]
    matrix = transfer.section(Run("run", transfers=tuple(rows)))["matrices"][0]
    assert [row["name"] for row in matrix["rows"]] == ["a", "b", "c", "Federated"]
    assert [name for name, _ in matrix["columns"]] == ["a", "b"]
    facts = dict(matrix["facts"])
    assert facts["Other sites (off-diagonal mean)"].startswith("0.700")  # of 0.8 at a and 0.6 at b
    assert facts["Federated minus the best single site"] == "a −0.050"
    assert facts["Asymmetry, mean of |there − back|"] == "0.000"
