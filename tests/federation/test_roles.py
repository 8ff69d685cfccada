"""Codebooks, momentum encoders and plain sums through the real apps."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from client.app import app as client
from medfl import stages
from medfl.carriers import InProcessGrid
from medfl.enrolment import Federation
from medfl.layout import Tensors
from medfl.messages import PRETRAIN
from medfl.methods.base import Method
from medfl.models.quantizer import Quantizer
from medfl.models.queue import Queue
from medfl.run_folder import RunFolder
from medfl.site import open_site
from medfl.training import train_locally
from tests.federation.small import digest, run, small_study

pytestmark = pytest.mark.federation
DISSECT = ("method=dissect", "arms=[federated]", "method.images=80", "method.codes=[32,16,8]", "training.batch_size=16")


def events(folder: RunFolder, name: str) -> list[float]:
    return [e["value"] for e in folder.events() if e["name"] == name and e["stage"] == "pretrain" and not e["site"]]


@pytest.mark.parametrize(
    ("codebook", "target"), [("refresh", "average"), ("split_prior", "shift"), ("mean", "reset"), ("local", "local")]
)
def test_every_mode_runs_and_sends_what_its_name_says(codebook: str, target: str, tmp_path: Path) -> None:
    chosen = (f"rounds.codebook={codebook}", f"rounds.target={target}", "rounds.blend=paper")
    study = small_study(tmp_path / "a", *DISSECT, *chosen)
    folder = run(study)
    with (folder.path / "wire.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    roles = {row["role"] for row in rows}
    assert ("codebook" in roles) == (codebook != "local")
    assert ("target" in roles) == (target == "average")
    perplexity = events(folder, "codebook/scales.fine.quantizer/perplexity")
    assert len(perplexity) == (2 if codebook != "local" else 0)
    assert all(1 < value <= 32 for value in perplexity)
    kept = load_file(max(Path(study.state_dir).rglob("round-0002-*.safetensors")))
    assert any(name.startswith("target_encoder.") for name in kept) == (target in ("shift", "local"))
    assert ("scales.fine.quantizer.sums" in kept) == (codebook == "local")
    again = run(small_study(tmp_path / "b", *DISSECT, *chosen))
    assert digest(again.path / "encoder.safetensors") == digest(folder.path / "encoder.safetensors")


def test_sums_of_three_sites_are_those_of_their_pool(tmp_path: Path) -> None:
    """One refresh pass, three kinds of sums: codes, norm moments, feature products (no norm over the batch here)."""
    study = small_study(tmp_path, *DISSECT, "sites=hospital", "sites.count=3", "encoder.norm=group",
                        "rounds.codebook_images=1", "data.count=240", "sites.min_images=16")  # fmt: skip
    sites = [open_site(study.source, index) for index in range(4)]
    method = sites[3].shop.method
    found = sites[3]._seeds(least=1)
    parts: list[Tensors] = []
    for site in sites:
        for name, book in method.codebooks().items():
            book.set(found[f"{name}.counts"], found[f"{name}.sums"])
        parts.append(site._refresh()[0])
    assert len(parts[0]) == 3 * 3 + 3 + 2 * 3  # three codebooks, the features, the norms of two heads
    for name, pooled in parts[3].items():
        total = sum(part[name] for part in parts[:3])
        if name.startswith(("scales.", "features.")):
            torch.testing.assert_close(total, pooled, rtol=1e-5, atol=1e-5, msg=name)
            if name.endswith(("count", "counts")):
                assert torch.equal(total, pooled), name


class Listening(InProcessGrid):
    """Keeps the bytes of all arrays that sites send, by role."""

    heard: dict[str, list[bytes]]

    def deliver(self, message: Message) -> Message:
        reply = super().deliver(message)
        assert not reply.has_error(), reply.error
        for role, record in reply.content.array_records.items():
            self.heard.setdefault(role, []).extend(array.data for array in record.values())
        return reply


@pytest.fixture
def seen_tokens(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tokens of all forward passes through quantizers."""
    seen: list[torch.Tensor] = []
    plain = Quantizer.forward

    def forward(self: Quantizer, tokens: torch.Tensor) -> object:
        seen.append(tokens.detach().flatten(0, 1).clone())
        return plain(self, tokens)

    monkeypatch.setattr(Quantizer, "forward", forward)
    return seen


def pieces(tensor: torch.Tensor) -> Iterator[bytes]:
    """What a message would hold of it: 8 values from several places, in both float types."""
    values = tensor.detach().flatten().numpy()
    for start in range(0, len(values) - 8, max(8, len(values) // 5)):
        part = values[start : start + 8]
        if np.any(part != part[0]):  # a constant says nothing
            yield part.astype(np.float32).tobytes()
            yield part.astype(np.float64).tobytes()


@pytest.mark.parametrize("images", [5, 1])
def test_no_token_and_nothing_local_is_in_any_message(
    images: int, seen_tokens: list[torch.Tensor], tmp_path: Path
) -> None:
    """With codebook_images=1 a code of one token is that token: the search must find it, or it could find nothing."""
    study = small_study(tmp_path, *DISSECT, "rounds.target=shift", "training.optimizer_state=keep",
                        "method.codes=[256,64,8]", f"rounds.codebook_images={images}", "rounds.blend=code")  # fmt: skip
    grid = Listening(client, 3)
    grid.heard = {}
    stages.run(Federation(grid, study, RunFolder.create(tmp_path, study.source, resume=True)), ("pretrain",), 3)
    wire = b"".join(data for arrays in grid.heard.values() for data in arrays)
    assert len(wire) > 10**5
    sums = [data for role in ("codebook", "statistics") for data in grid.heard[role]]  # all that is made of features
    windows = {data[start : start + 64] for data in sums for start in range(0, len(data) - 63, 8)}
    rows = torch.cat([part.double() for part in seen_tokens]).numpy()
    found = sum(row[:8].tobytes() in windows for row in rows if row[:8].any())  # a map of zeros gives a token of zeros
    assert (found == 0) == (images > 1)
    if images > 1:
        kept = {n: t for path in Path(study.state_dir).rglob("*.safetensors") for n, t in load_file(path).items()}
        private = [t for n, t in kept.items() if n.startswith(("optimizer/", "target_")) and t.numel() > 64]
        assert len(private) > 20
        assert not [piece for tensor in private for piece in pieces(tensor) if piece in wire]


@pytest.mark.parametrize("queue", ["refresh", "keep"])
def test_no_key_of_a_queue_is_in_any_message(queue: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pushed: list[torch.Tensor] = []
    sent: list[torch.Tensor] = []
    plain = Queue.push

    def push(self: Queue, keys: torch.Tensor, patients: torch.Tensor | None) -> None:
        pushed.append(keys.detach().clone())
        plain(self, keys, patients)

    def train(method: Method, *rest: Any) -> dict[str, float]:
        losses = train_locally(method, *rest)
        sent.append(method.encoder.get_parameter("stem.0.weight").detach().clone())
        return losses

    monkeypatch.setattr(Queue, "push", push)
    monkeypatch.setattr("medfl.site.train_locally", train)
    study = small_study(tmp_path, "method=dcl", "arms=[federated]", f"rounds.queue={queue}")
    grid = Listening(client, 3)
    grid.heard = {}
    stages.run(Federation(grid, study, RunFolder.create(tmp_path, study.source, resume=True)), ("pretrain",), 3)
    wire = b"".join(data for arrays in grid.heard.values() for data in arrays)
    keys = torch.cat(pushed)
    assert len(keys) > 100
    assert not [row for row in keys for kind in (row, row.double()) if kind[:4].numpy().tobytes() in wire]
    assert len(sent) == 4  # two sites, two rounds: the same search finds what was sent
    assert all(weight.numpy().tobytes() in wire for weight in sent)
    kept = {n: t for path in Path(study.state_dir).rglob("*.safetensors") for n, t in load_file(path).items()}
    assert ("queue.keys" in kept) == (queue == "keep")
    with (tmp_path / "wire.csv").open(newline="") as file:
        assert not [row for row in csv.DictReader(file) if row["role"] == "queue" or row["name"].startswith("queue")]


class Late(InProcessGrid):
    """The third site comes online after the first round."""

    rounds = 0

    def get_node_ids(self) -> list[int]:
        nodes = sorted(super().get_node_ids())
        return nodes if self.rounds else nodes[:2]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        asked = list(messages)
        self.rounds += any(message.metadata.message_type == PRETRAIN for message in asked)
        return super().push_messages(asked)


def test_a_site_that_comes_late_joins_the_next_round_with_its_codes(tmp_path: Path) -> None:
    study = small_study(tmp_path, *DISSECT, "sites.count=3", "rounds.count=3")
    folder = RunFolder.create(tmp_path, study.source, resume=True)
    stages.run(Federation(Late(client, 3), study, folder), ("pretrain", "evaluate"), 2)
    seen = [(e["round"], e["value"]) for e in folder.events() if e["name"] == "round/sites"]
    assert seen == [(1, 2.0), (2, 3.0), (3, 3.0)]
    assert [(e["round"], e["site"]) for e in folder.events() if e["name"] == "joined"] == [(2, "site-3")]
    assert {row["site"] for row in folder.evaluations()} == {"site-1", "site-2", "site-3"}
    with (tmp_path / "wire.csv").open(newline="") as file:
        asked = {(row["stage"], row["site"]) for row in csv.DictReader(file) if row["direction"] == "up"}
    assert ("codebook", "site-3") in asked
    assert events(folder, "codebook/scales.fine.quantizer/perplexity")[-1] > 1
