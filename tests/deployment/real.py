"""A study of real processes on loopback, through the commands that a study lead and a hospital type."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medfl import config
from tests.federation.real import SMALL, datalist, images

MEDFL = Path(sys.executable).with_name("medfl")
LIMIT = 600  # s
SITES = ("alpha", "beta", "gamma")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass
class Loopback:
    """A coordinator and three sites, each with folders of its own."""

    folder: Path
    overrides: Sequence[str] = ()
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lead = self.folder / "lead"
        self.places = {name: self.folder / name for name in SITES}
        self.env = os.environ | {
            "MEDFL_CA_PASSPHRASE": "only for a test", "MEDFL_LISTEN": "127.0.0.1", "OMP_NUM_THREADS": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "NO_PROXY": "127.0.0.1",
        } | self.env  # fmt: skip

    def medfl(self, *words: str | Path, code: int = 0, env: dict[str, str] | None = None) -> str:
        """One command; its output."""
        done = subprocess.run(
            [str(MEDFL), *map(str, words)], env=self.env | (env or {}), capture_output=True, text=True, timeout=LIMIT,
            cwd=self.folder,
        )  # fmt: skip
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout

    def make(self) -> None:
        """Everything up to the approvals: what people do once."""
        port, link, *own = free_ports(2 + len(SITES))
        words = [word for word in SMALL if not word.startswith("run.")]
        self.medfl(
            "study", "init", self.lead, "--name", "Lungs", "--address", "127.0.0.1", "--port", str(port), "--link-port",
            str(link), "--sites", str(len(SITES)), *words, "data.root=null", "run.tensorboard=false", *self.overrides,
        )  # fmt: skip
        self.medfl("study", "invite", self.lead)
        invitation = next(self.lead.glob("*.invitation.json"))
        held = images(self.folder / "images")
        for name, site_port in zip(SITES, own, strict=True):
            place, data = self.places[name], self.folder / "images" / name
            self._give(data, held[name])
            self.medfl(
                "site", "init", place, "--yes", "--name", name, "--data", data, "--list", "list.csv", "--device", "cpu"
            )
            tree = yaml.safe_load((place / "site.yaml").read_text())
            tree |= {"port": site_port, "policy": {"least_images": 8, "least_steps": 1, "least_batch": 2}}
            (place / "site.yaml").write_text(yaml.safe_dump(tree))
            self.medfl("study", "approve", self.lead, place / f"{name}.request.json", "--yes")
            self.medfl("site", "approve", invitation, "--by", "Test", "--site", place)
        datalist(self.folder / "images" / "all.csv", [row for rows in held.values() for row in rows])

    def _give(self, data: Path, rows: Sequence[dict[str, str]]) -> None:
        data.mkdir()
        for row in rows:
            (data / row["file"]).symlink_to(self.folder / "images" / row["file"])
        datalist(data / "list.csv", rows)

    def start(self, *, sites: Sequence[str] = SITES) -> None:
        self.medfl("study", "up", self.lead, "--background")
        for name in sites:
            self.medfl("site", "join", "--site", self.places[name], "--background")

    def stop(self) -> None:
        for place in self.places.values():
            if (place / "site.yaml").exists():
                subprocess.run([str(MEDFL), "site", "stop", "--site", str(place)], env=self.env, capture_output=True)
        subprocess.run([str(MEDFL), "study", "stop", str(self.lead)], env=self.env, capture_output=True)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.medfl("study", "status", self.lead, "--json"))
        return found

    def events(self) -> list[dict[str, Any]]:
        file = self.lead / "run" / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def simulated(self, folder: Path) -> Path:
        """The same study as a simulation, with all images in one list."""
        given = [f"data.root={self.folder / 'images'}", "data.datalist=all.csv", "data.site=site", f"run.dir={folder}"]
        words = [word for word in SMALL if not word.startswith("run.")]
        study = config.compose([*words, *self.overrides, *given, "run.tensorboard=false"])
        overrides = [*words, *self.overrides, *given, "run.tensorboard=false"]
        self.medfl("simulate", *overrides)
        return Path(study.run_dir)

    def logs(self) -> str:
        files = [*self.folder.rglob("logs/*.log")]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


def wait_until(true: Callable[[], bool], limit: float, what: str) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < limit, f"not within {limit:.0f} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - began
