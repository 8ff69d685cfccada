"""Whole federations with secure aggregation: the same encoder, and no single update anywhere at the server."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from client.app import app as client
from medfl.deployment.review import review
from medfl.errors import NetworkError
from medfl.layout import Flat
from medfl.messages import Answer, Broadcast
from medfl.onsite.site_file import SiteFile
from medfl.provision.documents import Invitation
from medfl.run_folder import RunFolder
from medfl.secagg.fixed import Scale
from medfl.site import Site
from medfl.study import Study
from server.app import app as server
from tests.federation.masked import LossyGrid
from tests.federation.real import NAMES, SealedGrid, real_study
from tests.federation.small import run, small_study

pytestmark = pytest.mark.federation
FOUR = ("sites.count=4", "data.count=160", "arms=[federated]", "rounds.count=1")
MASKED = "secagg.active=true"


def lossy(study: Study, lost: set[tuple[str, int]] = frozenset()) -> tuple[RunFolder, LossyGrid]:  # type: ignore[assignment]
    folder, grid = RunFolder.create(Path(study.run_dir), study.source, resume=True), LossyGrid(client, 5)
    grid.lost = set(lost)
    server(grid, Context(1, 1, {}, RecordDict(), {"study": study.source, "stages": "pretrain", "sites": 5}))
    return folder, grid


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_the_encoder_is_the_plain_one_up_to_fixed_point(method: str, tmp_path: Path) -> None:
    """One round of n sites: a weight differs by n 2^-28 and float32's rounding; statistics follow from the weights."""
    found = {}
    for name, more in {"plain": (), "masked": (MASKED,)}.items():
        folder = run(small_study(tmp_path / name, f"method={method}", *FOUR, *more), nodes=5)
        found[name] = load_file(folder.path / "model.safetensors")
    assert found["plain"].keys() == found["masked"].keys()
    for name, value in found["plain"].items():
        bound = 1e-5 if "running" in name else 4 * 2.0**-28 + 2.0**-23 * float(value.abs().max())
        assert float((value.double() - found["masked"][name].double()).abs().max()) <= bound, name
    # BYOL's target is averaged like its online net
    assert any(name.startswith("target") for name in found["masked"]) == (method == "byol")


@pytest.fixture
def plain_answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Flat, Flat]]:
    """What the sites would send without masks, and the broadcast that it is a change of."""
    kept: list[tuple[Flat, Flat]] = []
    for act in ("train", "refresh"):
        made = getattr(Site, act)

        def keeping(self: Site, broadcast: Broadcast, made=made) -> Answer:  # type: ignore[no-untyped-def]
            answer: Answer = made(self, broadcast)
            kept.append(({g: a.copy() for g, a in answer.flat.items()}, broadcast.flat))
            return answer

        monkeypatch.setattr(Site, act, keeping)
    return kept


def pieces(answer: Flat, before: Flat) -> Iterator[bytes]:
    """Four numbers in a row, in each form that they could have: as they are, as a change, in fixed point."""
    draw = np.random.default_rng(0)
    for group, values in answer.items():
        forms = [values, values.astype(np.float64)]
        if group in before and group.startswith(("parameter", "target")):
            change, into = values - before[group], np.empty(values.size, np.uint32)
            Scale.of("float32", 8.0, 8.0, "k").encode(values, into, factor=0.25, before=before[group])
            forms += [change, change * 0.25, into]
        for form in forms:
            for at in draw.integers(0, max(1, form.size - 4), 40):
                piece = form[at : at + 4]
                if len(np.unique(piece)) == len(piece) > 2 and np.all(piece):  # not zeros or ones of a start
                    yield piece.tobytes()


def server_side(folder: RunFolder, grid: LossyGrid) -> bytes:
    """Every byte that the server received or wrote."""
    replies = [
        array.data
        for *_, reply in grid.received
        if not reply.has_error()
        for record in reply.content.array_records.values()
        for array in record.values()
    ]
    numbers = [str(dict(record)).encode() for *_, r in grid.received if not r.has_error()
               for record in (*r.content.config_records.values(), *r.content.metric_records.values())]  # fmt: skip
    files = [path.read_bytes() for path in folder.path.rglob("*") if path.is_file() and "sites" not in path.parts]
    return b"".join([*replies, *numbers, *files])


def test_no_single_update_is_anywhere_at_the_server(tmp_path: Path, plain_answers: list[tuple[Flat, Flat]]) -> None:
    folder, grid = lossy(small_study(tmp_path / "plain", *FOUR))
    seen = server_side(folder, grid)
    hits = [piece in seen for answer, before in plain_answers for piece in pieces(answer, before)]
    assert sum(hits) > 0.15 * len(hits)  # the search finds what is there
    plain_answers.clear()
    folder, grid = lossy(small_study(tmp_path / "masked", *FOUR, MASKED), {("pretrain", 3)})
    seen = server_side(folder, grid)
    hits = [piece in seen for answer, before in plain_answers for piece in pieces(answer, before)]
    assert len(hits) > 1000
    assert not any(hits)
    roles = {row["role"] for row in folder.wire_rows() if row["direction"] == "up"}
    assert roles == {"masked", "key", "share", "metric"}
    assert {event["site"] for event in folder.events() if event["name"] == "round/update_norm"} == set()


def test_methods_with_codebooks_and_owners_are_summed(tmp_path: Path) -> None:
    """DiSSECT's codebooks start without any site's centres; a round and a refresh each remove what they kept."""
    study = small_study(tmp_path, "method=dissect", *FOUR, "rounds.count=2", MASKED)
    folder = run(study, nodes=5)
    told = {event["name"].rpartition("/")[2] for event in folder.events() if event["name"].startswith("codebook/")}
    assert {"perplexity", "dead", "drift", "revived"} <= told
    assert not told & {"exclusivity", "rare", "js", "index_alarm"}
    assert any("secure aggregation" in event.get("reason", "") for event in folder.events())
    assert not list(Path(study.state_dir).rglob("sum.json"))


@pytest.mark.parametrize("kind", ["query.codebook", "train.pretrain", "query.refresh"])
def test_a_site_answers_no_request_that_would_show_it(kind: str, tmp_path: Path) -> None:
    study = small_study(tmp_path, *FOUR, MASKED)
    sent: list[Message] = []

    class Curious(LossyGrid):
        def deliver(self, message: Message) -> Message:
            if message.metadata.message_type == "query.keys":  # asks for single answers instead
                order = Broadcast.from_record(message.content)
                asked = Message(order.to_record(), dst_node_id=message.metadata.dst_node_id, message_type=kind)
                sent.append(super().deliver(asked))
            return super().deliver(message)

    RunFolder.create(Path(study.run_dir), study.source, resume=True)
    server(
        Curious(client, 5), Context(1, 1, {}, RecordDict(), {"study": study.source, "stages": "pretrain", "sites": 5})
    )
    assert len(sent) == 8  # of the round and the last refresh
    assert {reply.error.code for reply in sent} == {1011}


def test_real_sites_take_only_peers_whose_keys_they_know(tmp_path: Path) -> None:
    study = real_study(tmp_path, MASKED, "arms=[federated]", "rounds.count=1", "stages=[pretrain]")
    keys = {name: (place / "keys" / "signing.pub").read_text().strip() for name, place in study.sites.items()}

    def know(name: str, peers: dict[str, str]) -> None:
        file = study.sites[name] / "site.yaml"
        tree = yaml.safe_load(file.read_text())
        tree["policy"]["peers"] = peers
        file.write_text(yaml.safe_dump(tree))

    for name in NAMES:
        know(name, {peer: key for peer, key in keys.items() if peer != name})
    page = review(SiteFile.read(study.sites["alpha"]), Invitation.read(study.lead / "invitation.json"))
    assert {row.request: row.times for row in page.asked if {"masked", "share", "key"} & row.bytes.keys()} == {
        "train.pretrain": 1, "query.refresh": 1, "query.keys": 2, "query.shares": 2, "query.unmask": 2,
    }  # fmt: skip
    assert not any({"parameter", "statistics"} & row.bytes.keys() for row in page.asked)
    folder = study.run(stages="pretrain", grid=SealedGrid)
    up = [row for row in folder.wire_rows() if row["direction"] == "up"]
    assert {row["role"] for row in up if row["stage"] == "pretrain"} == {"masked", "metric"}
    lines = (study.sites["alpha"] / "audit.jsonl").read_text()
    assert "masked parameter/all/float32" in lines
    assert '"parameter ' not in lines
    know("alpha", {"beta": keys["beta"], "gamma": keys["beta"]})
    (folder.path / "model.safetensors").unlink()
    with pytest.raises(NetworkError, match="2 of 3 sites are left of the sum"):
        study.run(stages="pretrain")
