"""What the report reads from a run's rows: budgets, rounds, and who took part."""

from medfl.report import privacy
from medfl.report.rows import Event
from medfl.report.tables import Run

PRIVATE = {"privacy": {"mechanism": "patient", "noise": 1.0, "clip": 1.0}}


def event(name, value=1.0, *, arm="federated", at=1, site="", stage="pretrain", reason=""):
    return Event("", stage, arm, at, site, name, value, reason)


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
