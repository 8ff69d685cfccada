"""A whole study, small: phantom images, the tiny encoder, the real apps and carriers."""

import hashlib
from pathlib import Path

from client.app import app as client
from medfl import carriers, config
from medfl.run_folder import RunFolder
from medfl.study import Study
from server.app import app as server

SMALL = (
    "data.count=120",
    "data.size=16",
    "sites=iid",
    "sites.count=2",
    "sites.min_images=8",
    "encoder=tiny",
    "encoder.base_width=4",
    "rounds.count=2",
    "training.steps=2",
    "training.batch_size=32",
    "training.threads=1",
    "training.device=cpu",
    "evaluation.resamples=20",
)
OF_METHOD = {
    "nslf": (
        "data=brain",
        "data.count=60",
        "method.base_width=2",
        "method.levels=2",
        "training.batch_size=8",
        "rounds.count=3",
    )
}


def small_study(folder: Path, *overrides: str) -> Study:
    """The first words are of the method, where it needs others than most."""
    named = next((word.removeprefix("method=") for word in overrides if word.startswith("method=")), "")
    return config.compose([*SMALL, *OF_METHOD.get(named, ()), f"run.dir={folder}", *overrides])


def run(study: Study, *, stages: str = "pretrain", nodes: int = 3, carrier: str = "inprocess") -> RunFolder:
    """Run stages of a study with its sites (and one more node, where all data are)."""
    asked: dict[str, str | int] = {"study": study.source, "stages": stages, "sites": nodes}
    folder = RunFolder.create(Path(study.run_dir), study.source, resume=True)
    carriers.simulate(server, client, asked, carrier=carrier, threads=study.training.threads)
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
