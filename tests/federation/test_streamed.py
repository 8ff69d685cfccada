"""A mean that is made as updates come is that of all updates together, whoever is large, and tells the same of them."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.federation.small import run, small_study

pytestmark = pytest.mark.federation


@pytest.mark.parametrize("words", [(), ("rounds.max_share=0.3",), ("rule=uniform_mean",), ("method=byol",)])
def test_a_streamed_round_is_that_of_all_updates_together(words: tuple[str, ...], tmp_path: Path) -> None:
    common = ("sites=quantity", "sites.count=4", "data.count=400", "rounds.count=1", "arms=[federated]",
              "training.batch_size=64", "sites.min_images=4", *words)  # fmt: skip
    found = {}
    for inspect in ("none", "flag"):
        place = tmp_path / inspect
        folder = run(small_study(place, *common, f"rounds.inspect={inspect}"), nodes=5)
        told = {
            (e["site"], e["name"]): e["value"] for e in folder.events() if e["name"].startswith(("round/", "features/"))
        }
        found[inspect] = load_file(folder.path / "encoder.safetensors"), told
    (streamed, seen), (together, expected) = found["none"], found["flag"]
    for name, tensor in together.items():
        assert (streamed[name] - tensor).abs().max() <= 1e-6 * (1 + tensor.abs().max()), name
    weights = [value for (_, name), value in expected.items() if name == "round/weight"]
    assert len(weights) == 4
    assert max(weights) > 1.5 * min(weights) or "uniform" in str(words)
    for key, value in expected.items():
        if key[1] != "round/seconds":
            assert seen[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
