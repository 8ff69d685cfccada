"""What must hold for every method, over whole federations with the real apps (design: roles and invariants)."""

import csv
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import app as client
from medfl import config, site_books, site_queues
from medfl.carriers import InProcessGrid, simulate
from medfl.checkpoint import newest
from medfl.layout import Policy, broadcast_layout
from medfl.messages import PRETRAIN, Broadcast
from medfl.methods.phases import phases_of
from medfl.optimizers import scale_rates
from medfl.run_folder import RunFolder
from medfl.site import Site, open_site
from medfl.study import Study
from medfl.training import Device, Plan, Task, train_locally
from medfl.workshop import new_method, sites_of
from server.app import app as server
from tests.federation.small import OF_METHOD, digest, run, small_study

METHODS = sorted(path.stem for path in (config.CONFIGS / "method").glob("*.yaml"))
WITHOUT_ROUNDING = dict.fromkeys(("dcl", "moco"), ("rounds.target=local",))  # shift adds and takes away a lag
pytestmark = pytest.mark.federation


@pytest.mark.parametrize("method", METHODS)
def test_one_site_is_central_training_bit_for_bit(method: str, tmp_path: Path) -> None:
    study = small_study(
        tmp_path / "run",
        f"method={method}",
        "sites.count=1",
        "arms=[federated]",
        "training.optimizer_state=keep",
        "rounds.codebook=local",  # the broadcast one is a Lloyd step ahead of a plain loop
        "rounds.queue=keep",  # a plain loop refills nothing
        *WITHOUT_ROUNDING.get(method, ()),
    )
    folder = run(study, nodes=2)
    saved, _ = newest(folder.path / "checkpoints")
    assert saved is not None
    data = sites_of(study)[0]
    plain = new_method(study)
    for name, book in started_books(study).items():
        plain.codebooks()[name].set(*book)
    codes = site_queues.patient_codes(data.train.patients)
    task = Task(data.train.images, data.train.labels, config.build(study.views), codes, data.train.masks)
    batch = study.training.batch_size
    site_queues.begin(plain, mode="keep", age=1, batch=batch, images=len(task.images), number=1)
    for phase in phases_of(plain.phases, study.rounds.count):
        plain.start_phase(phase.name)
        plain.enter(phase.name)
        optimizer = config.build(study.training.optimizer, parameters=plain.trainable())
        rates = {id(parameter): plain.rate(name) for name, parameter in plain.named_parameters()}
        scale_rates(optimizer, lambda parameter, rates=rates: rates[id(parameter)])
        for number in range(phase.first, phase.last + 1):
            plan = Plan(study.seed, data.name, number, phase.rounds, study.training.steps, batch,
                        study.training.warmup, before=phase.first - 1)  # fmt: skip
            train_locally(plain, task, optimizer, plan, Device.choose("cpu", "fp32", "never"))
    sends = broadcast_layout(plain, Policy.of(plain, study.rounds))
    federated = sends.unpack({g: t.numpy() for g, t in saved.tensors.items()})
    for name, value in dict(plain.named_parameters()).items():
        if name in federated:
            torch.testing.assert_close(federated[name], value.detach(), rtol=0, atol=0, msg=name)


def started_books(study: Study) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The site's own k-means under the initial weights, scaled to the tokens of a step."""
    site = open_site(study.source, 0)
    site.shop.method.load_state_dict(new_method(study).state_dict())
    site._start_own_books()
    site_books.take_prior(site.shop.method, 2 * 32)
    return {name: (book.counts.clone(), book.sums.clone()) for name, book in site.shop.method.codebooks().items()}


def test_two_identical_sites_are_one(tmp_path: Path) -> None:
    """Two nodes that hold the same images and draw the same batches answer under different names."""
    twin = ClientApp()

    def as_first(act: str) -> None:
        kind = {"describe": twin.query, "refresh": twin.query, "pretrain": twin.train}[act]

        @kind(act)
        def answer(message: Message, context: Context) -> Message:
            broadcast = Broadcast.from_record(message.content)
            site = open_site(broadcast.order.study, 0)
            made = site.describe(broadcast.order) if act == "describe" else getattr(site, ACTS[act])(broadcast)
            record = made.to_record()
            record.config_records["identity"]["site"] = f"twin-{context.node_config['partition-id']}"
            return Message(record, reply_to=message)

    for act in ("describe", "refresh", "pretrain"):
        as_first(act)
    digests = []
    for nodes in (1, 2):
        study = small_study(tmp_path / str(nodes), "arms=[federated]", "rounds.max_share=1.0")
        folder = RunFolder.create(Path(study.run_dir), study.source, resume=True)
        asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": nodes}
        simulate(server, twin, asked, carrier="inprocess", threads=1)
        digests.append(digest(folder.path / "encoder.safetensors"))
    assert digests[0] == digests[1]


ACTS = {"refresh": "refresh", "pretrain": "train"}


class ShuffledGrid(InProcessGrid):
    """Nodes in any order, replies in any order."""

    def get_node_ids(self) -> list[int]:
        return random.Random(3).sample(super().get_node_ids(), len(super().get_node_ids()))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.asked = getattr(self, "asked", 0) + 1
        return super().pull_messages(message_ids) if random.Random(self.asked).random() < 0.4 else []


def test_order_of_sites_and_replies_changes_nothing(tmp_path: Path) -> None:
    straight = run(small_study(tmp_path / "a", "sites.count=3", "arms=[federated]"), nodes=4)
    study = small_study(tmp_path / "b", "sites.count=3", "arms=[federated]")
    folder = RunFolder.create(Path(study.run_dir), study.source, resume=True)
    asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": 4}
    server(ShuffledGrid(client, 4), Context(1, 1, {}, RecordDict(), dict(asked)))
    assert digest(folder.path / "encoder.safetensors") == digest(straight.path / "encoder.safetensors")


def test_in_process_and_ray_agree_bit_for_bit(tmp_path: Path) -> None:
    digests = []
    for carrier in ("inprocess", "ray"):
        study = small_study(tmp_path / carrier, f"rounds.carrier={carrier}", "arms=[federated]")
        folder = run(study, carrier=carrier, stages="pretrain,evaluate")
        digests.append((digest(folder.path / "encoder.safetensors"), digest(folder.path / "evaluation.csv")))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["pooled", "local_statistics", "local"])
def test_only_allowed_roles_leave_a_site(method: str, norm: str, tmp_path: Path) -> None:
    once = () if method in OF_METHOD else ("rounds.count=1",)
    folder = run(small_study(tmp_path, f"method={method}", f"rounds.norm={norm}", "arms=[federated]", *once))
    with (folder.path / "wire.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    up = {row["role"] for row in rows if row["direction"] == "up"}
    assert up <= {"parameter", "norm_moments", "codebook", "target", "statistics", "metric"}
    stays = {"pooled": set(), "local_statistics": {"norm_moments"}, "local": {"norm_moments"}}[norm]
    assert not up & stays
    assert not [row for row in rows if row["name"].endswith("num_batches_tracked")]
    if norm == "local" and method != "nslf":  # its instance norms are shared like any layer
        assert not [row for row in rows if ".bn" in row["name"] or ".norm" in row["name"]]


def test_local_norms_and_optimizer_state_survive_on_the_sites_disk(tmp_path: Path) -> None:
    study = small_study(tmp_path, "rounds.norm=local", "training.optimizer_state=keep", "arms=[federated]")
    run(study)
    kept = sorted(Path(study.state_dir).rglob("round-*.safetensors"))
    assert {path.parent.name for path in kept} == {"site-1", "site-2"}
    from safetensors.torch import load_file

    names = load_file(kept[-1]).keys()
    assert any(name.startswith("optimizer/") for name in names)
    assert any(name.endswith("running_var") for name in names)


def test_a_failing_site_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small_study(tmp_path, "sites.count=3", "arms=[federated]")
    train = Site.train

    def fail_at_second(self: Site, broadcast: Broadcast) -> object:
        if self.data.name == "site-2":
            raise RuntimeError("/data/patients/0001.dcm unreadable")
        return train(self, broadcast)

    monkeypatch.setattr(Site, "train", fail_at_second)
    folder = run(study, nodes=4)
    events = folder.events()
    refused = [event for event in events if event["name"] == "refused"]
    assert [event["round"] for event in refused] == [1, 2]
    assert all("0001.dcm" not in str(event) and "ticket" in event["reason"] for event in events if event in refused)
    trained = {event["site"] for event in events if event["name"] == "round/weight"}
    assert trained == {"site-1", "site-3"}


def test_a_refused_reply_is_on_the_wire_record_with_what_it_held(tmp_path: Path) -> None:
    study = small_study(tmp_path, "sites.count=3", "arms=[federated]", "rounds.count=1")

    class Leaking(InProcessGrid):
        def deliver(self, message: Message) -> Message:
            reply = super().deliver(message)
            identity = reply.content.config_records["identity"]
            if identity["site"] == "site-2" and "parameter" in reply.content.array_records:
                reply.content.array_records["queue"] = reply.content.array_records["parameter"].copy()
            return reply

    folder = RunFolder.create(Path(study.run_dir), study.source, resume=True)
    asked: dict[str, str | int] = {"study": study.source, "stages": "pretrain", "sites": 4}
    server(Leaking(client, 4), Context(1, 1, {}, RecordDict(), dict(asked)))
    with (folder.path / "wire.csv").open(newline="") as file:
        leaked = [row for row in csv.DictReader(file) if row["role"] == "queue"]
    assert [(row["site"], row["direction"], row["name"]) for row in leaked] == [
        ("site-2", "up", "refused: all/float32")
    ]
    assert [e["site"] for e in folder.events() if e["name"] == "round/weight"] == ["site-1", "site-3"]


@pytest.mark.parametrize(
    "own", [("rounds.norm=local", "training.optimizer_state=keep"), ("method=dcl", "rounds.queue=keep")]
)
def test_a_repeated_round_gives_the_same_reply(own: tuple[str, ...], tmp_path: Path) -> None:
    study = small_study(tmp_path, *own, "arms=[federated]")
    kept: list[tuple[bytes, bytes]] = []

    class Twice(InProcessGrid):
        def deliver(self, message: Message) -> Message:
            first, again = super().deliver(message), super().deliver(message)
            if message.metadata.message_type == PRETRAIN:
                kept.append((_bytes(first), _bytes(again)))
            return again

    RunFolder.create(Path(study.run_dir), study.source, resume=True)
    asked = {"study": study.source, "stages": "pretrain", "sites": 3}
    server(Twice(client, 3), Context(1, 1, {}, RecordDict(), dict(asked)))
    assert len(kept) == 4
    assert all(first == again for first, again in kept)


def _bytes(message: Message) -> bytes:
    return b"".join(array.data for record in message.content.array_records.values() for array in record.values())
