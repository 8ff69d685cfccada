"""That a federation learns: over equal sites it must come as far as one site with as many steps in a row."""

import math
from pathlib import Path

import pytest

from tests.federation.small import run, small_study

pytestmark = pytest.mark.federation
LENGTH = ("rounds.count=3", "training.steps=20", "arms=[federated]", "method=simclr", "views=light", "data.count=240",
          "data.size=24", "encoder.base_width=8", "training.optimizer.lr=5e-3")  # fmt: skip


def loss_by_round(folder: Path, sites: int) -> list[float]:
    finished = run(small_study(folder, *LENGTH, f"sites.count={sites}"), nodes=sites + 1)
    return [e["value"] for e in finished.events() if e["name"] == "loss/nt_xent" and not e["site"]]


def test_equal_sites_learn_as_fast_as_one(tmp_path: Path) -> None:
    alone, together = loss_by_round(tmp_path / "one", 1), loss_by_round(tmp_path / "three", 3)
    start = math.log(2 * 32 - 1)  # of embeddings that know nothing
    gained = [start - losses[-1] for losses in (alone, together)]
    assert alone[0] > alone[-1] > 0
    assert min(gained) > 1.5  # nats
    assert gained[1] > 0.85 * gained[0]
