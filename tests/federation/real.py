"""A study among real sites in one process: the same folders, keys, approvals and apps as on separate machines."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import yaml
from flwr.app import Context, Message, RecordDict
from PIL import Image

from client.app import app as client
from medfl import PROTOCOL, __version__, config
from medfl.admission import SITE_FILE
from medfl.carriers import FIRST_NODE, InProcessGrid
from medfl.flower_compat import NodeInfo
from medfl.onsite.approvals import approve
from medfl.onsite.site_file import SiteFile
from medfl.provision import authority
from medfl.provision.app import bundle, release
from medfl.provision.documents import Invitation, JoinRequest
from medfl.provision.keys import load_signing_key, new_node_key, new_signing_key
from medfl.run_folder import RunFolder
from server.app import app as server

NAMES = ("alpha", "beta", "gamma")
STUDY_ID = "lungs-0a1b2c3d"
COLUMNS = (
    "data.image=file",
    "data.label=label",
    "data.patient=patient",
    "data.split=split",
    "data.classes=['no','yes']",
)
SMALL = (
    "method=simclr", "encoder=tiny", "encoder.base_width=4", "data=folder", *COLUMNS, "data.spatial_dims=2",
    "data.size=16", "rounds.count=2", "training.steps=2", "training.batch_size=16", "training.threads=1",
    "training.device=cpu", "evaluation.resamples=20", "finetune.rounds=1", "finetune.steps=2", "finetune.batch_size=8",
    "finetune.protocols=[finetune,federated_finetune]", "arms=[random,local,federated]", "sites=natural",
    "sites.min_images=8", "run.tensorboard=false", f"run.study={STUDY_ID}",
)  # fmt: skip
Row = dict[str, str]


def images(root: Path, names: Sequence[str] = NAMES, count: int = 40) -> dict[str, list[Row]]:
    """PNG files in `root`, and the rows of each site; label 1 has a bright square."""
    draw, rows = np.random.default_rng(0), {}
    for name in names:
        rows[name] = []
        for number in range(count):
            pixels, label = draw.integers(40, 160, (20, 20)), number % 2
            pixels[4:10, 4:10] += 80 * label
            file = f"{name}-{number:03d}.png"
            root.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(root / file)
            split = ("train", "train", "train", "val", "test")[number // 2 % 5]
            patient = f"{name}-p{number}"
            rows[name].append(
                {"file": file, "label": ("no", "yes")[label], "patient": patient, "split": split, "site": name}
            )
    return rows


def datalist(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@dataclass
class RealStudy:
    """The folder of the study lead, and those of the sites."""

    lead: Path
    sites: dict[str, Path]
    source: str

    def run(self, *, stages: str = "", grid: "type[SealedGrid] | None" = None) -> RunFolder:
        carried = (grid or SealedGrid)(self.sites)
        asked: dict[str, str | int] = {
            "study": self.source, "stages": stages, "sites": len(self.sites), "root": str(self.lead),
        }  # fmt: skip
        server(carried, Context(1, 1, {}, RecordDict(), dict(asked)))
        return RunFolder.open(self.lead / "run")

    def approve(self, name: str) -> None:
        approve(SiteFile.read(self.sites[name]), self.lead / "invitation.json", "Test", replace=True)


def real_study(
    folder: Path, *overrides: str, policy: str = "{least_images: 8, least_steps: 1, least_batch: 2}"
) -> RealStudy:
    """Three sites that approved the study, each with its own images."""
    lead, app = folder / "lead", bundle(release())
    source = config.compose([*SMALL, "data.root=null", "run.dir=run", *overrides]).source
    new_signing_key(lead / "keys" / "study")
    authority.create(
        lead / "authority", name="Lungs", names=["127.0.0.1"], until=date(2999, 12, 31), passphrase="for a test"
    )
    root = (lead / "authority" / "ca.crt").read_text()
    key, public = load_signing_key(lead / "keys" / "study"), (lead / "keys" / "study.pub").read_text().strip()
    invitation = Invitation(
        STUDY_ID,
        "Lungs",
        "127.0.0.1",
        8443,
        "2999-12-31",
        "2026-01-01",
        __version__,
        PROTOCOL,
        source,
        root,
        app,
        public,
    )
    invitation.write(lead / "invitation.json", key)
    study, held = RealStudy(lead, {}, source), images(folder / "images")
    for name, rows in held.items():
        place = study.sites[name] = folder / name
        place.mkdir()
        datalist(folder / "images" / f"{name}.csv", rows)
        data = {"own": {"root": str(folder / "images"), "datalist": f"{name}.csv"}}
        site = {"site": name, "device": "cpu", "data": data, "policy": yaml.safe_load(policy)}
        (place / "site.yaml").write_text(yaml.safe_dump(site))
        new_node_key(place / "keys" / "node")
        new_signing_key(place / "keys" / "signing")
        register(lead, place, name)
        study.approve(name)
    datalist(folder / "images" / "all.csv", [row for rows in held.values() for row in rows])
    return study


def register(lead: Path, place: Path, name: str) -> None:
    keys = ((place / "keys" / f"{kind}.pub").read_text().strip() for kind in ("node", "signing"))
    request = JoinRequest(name, "", *keys, "2026-01-01", __version__, PROTOCOL)
    there = lead / "sites" / name
    there.mkdir(parents=True, exist_ok=True)
    request.write(there / "request.json", load_signing_key(place / "keys" / "signing"))
    (there / "approved.json").write_text(f'{{"request": "{request.digest}"}}')


class SealedGrid(InProcessGrid):
    """Each node is a real site: it knows its site file, and is registered under its name."""

    change: Callable[[Message], Message] | None = None  # what a test does to a reply on its way

    def __init__(self, places: dict[str, Path]) -> None:
        super().__init__(client, len(places))
        self.names = dict(enumerate(places, FIRST_NODE))
        for node, name in self.names.items():
            self.contexts[node] = Context(1, node, {SITE_FILE: str(places[name])}, RecordDict(), {})

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, name=name) for node, name in self.names.items()]
