"""Sites that lack modalities, over whole federations: who moves which weights, and what each phase asks of whom."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from client.app import app as client
from medfl import config
from medfl.carriers import InProcessGrid
from medfl.checkpoint import newest
from medfl.errors import ConfigError
from medfl.messages import PRETRAIN, Broadcast, Order, from_array
from medfl.run_folder import RunFolder
from medfl.site import Site, open_site
from medfl.study import Study
from medfl.workshop import new_method
from server.app import app as server
from tests.federation.small import run, small_study

BRAINS = (
    "data=brain",
    "method=nslf",
    "method.base_width=2",
    "method.levels=2",
    "data.count=30",
    "views.size=16",
    "views.dropout=0.0",
    "sites=modalities",
    "sites.min_images=1",
    "rounds.count=3",
    "training.steps=2",  # the last one of a phase has a rate of zero
    "training.batch_size=4",
    "arms=[federated]",
)
pytestmark = pytest.mark.federation


def brains(folder: Path, sites: str, *overrides: str) -> Study:
    given = [word for word in BRAINS if word.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    count = sites.count("[") - 1
    return small_study(folder, *given, f"sites.modalities={sites}", f"sites.count={count}", *overrides)


class Listening(InProcessGrid):
    """Keeps every reply to a round, by round and site."""

    heard: dict[int, dict[str, dict[str, np.ndarray]]]

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        if message.metadata.message_type == PRETRAIN:
            number = Broadcast.from_record(message.content).order.round
            site = str(reply.content.config_records["identity"]["site"])
            self.heard.setdefault(number, {})[site] = {
                f"{role}/{name}": from_array(array).copy()
                for role, arrays in reply.content.array_records.items()
                for name, array in arrays.items()
            }
        return reply


def heard(study: Study, nodes: int) -> tuple[RunFolder, dict[int, dict[str, dict[str, np.ndarray]]]]:
    folder = RunFolder.create(Path(study.run_dir), study.source, resume=True)
    asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": nodes}
    grid = Listening(client, nodes)
    grid.heard = {}
    server(grid, Context(1, 1, {}, RecordDict(), dict(asked)))
    return folder, grid.heard


def test_a_round_averages_each_modality_over_its_owners_bit_for_bit(tmp_path: Path) -> None:
    study = brains(tmp_path, "[[t1,t2],[t2,flair]]", "rounds.keep_checkpoints=9", "sites.quantity=null")
    folder, replies = heard(study, 3)
    first, second = replies[1]["site-1"], replies[1]["site-2"]
    saved = load_file(folder.path / "checkpoints" / "round-0001" / "state.safetensors")
    group = "parameter/modality:{}/float32".format
    assert group("t1") not in second
    assert group("flair") not in first
    assert (saved[group("t1")].numpy() == first[group("t1")]).all()
    assert (saved[group("flair")].numpy() == second[group("flair")]).all()
    sizes = [len(open_site(study.source, place).data.train) for place in (0, 1)]
    used = np.minimum(sizes, study.training.batch_size * study.training.steps)
    mean = (used[0] * first[group("t2")].astype(np.float64) + used[1] * second[group("t2")]) / used.sum()
    assert (saved[group("t2")].numpy() == mean.astype(np.float32)).all()


def test_weights_of_a_modality_that_no_site_has_never_change(tmp_path: Path) -> None:
    study = brains(tmp_path, "[[flair,t2],[flair,t2]]")
    folder = run(study)
    before, after = new_method(study).state_dict(), load_file(folder.path / "model.safetensors")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    absent = {name for name in after if "t1" in name}  # t1 and t1ce: nets, and slots of matching and segmentation
    assert {name.partition(".t1")[0] for name in absent} >= {"encoder.nets", "encoder.segmenter.slots"}
    assert not moved & absent
    assert any(name.startswith("encoder.nets.flair.") for name in moved)
    assert any(name.startswith("encoder.segmenter.slots.t2.") for name in moved)


def test_sites_are_asked_in_the_phases_they_can_teach_only(tmp_path: Path) -> None:
    study = brains(tmp_path, "[[flair,t2],[t1ce]]")
    folder, replies = heard(study, 3)
    assert {number: set(found) for number, found in replies.items()} == {
        1: {"site-1", "site-2"},
        2: {"site-1"},  # one contrast cannot be fused
        3: {"site-1", "site-2"},
    }
    phases = [(event["round"], event["reason"]) for event in folder.events() if event["name"] == "phase"]
    assert phases == [(1, "features"), (2, "fusion"), (3, "segmentation")]


def test_a_phase_nobody_can_teach_leaves_the_weights_and_says_so(tmp_path: Path) -> None:
    study = brains(tmp_path, "[[flair],[t2]]", "rounds.keep_checkpoints=9")
    folder, replies = heard(study, 3)
    assert sorted(replies) == [1, 3]
    assert [e["value"] for e in folder.events() if e["name"] == "round/sites"] == [2, 0, 2]  # each round is closed
    remarks = [event for event in folder.events() if event["name"] == "remark" and event["round"] == 2]
    assert any("phase 'fusion': no site of this arm holds what it needs (paired)" in row["reason"] for row in remarks)


def test_a_site_in_another_phase_refuses(tmp_path: Path) -> None:
    study = brains(tmp_path, "[[flair,t2],[flair,t2]]")
    heard(study, 3)
    site: Site = open_site(study.source, 0)
    saved, _ = newest(tmp_path / "checkpoints")
    assert saved is not None
    order = Order(study.source, "x", "federated", "fusion", 1, 3, 1, site.shop.sends.digest, "n")
    flat = {group: tensor.numpy() for group, tensor in saved.tensors.items() if group in site.shop.sends.sizes}
    with pytest.raises(ConfigError, match="round 1: the server is in phase 'fusion', the study says 'features'"):
        site.train(Broadcast(order, flat))


def test_too_few_rounds_for_the_phases_are_refused_before_the_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rounds\.count: got 2, too few for the phases features"):
        run(brains(tmp_path, "[[flair,t2],[flair,t2]]", "rounds.count=2"))


def test_the_config_needs_named_modalities() -> None:
    with pytest.raises(ConfigError, match="method=nslf needs data with named modalities"):
        config.build(config.compose(["method=nslf", "data=phantom"]).method)
