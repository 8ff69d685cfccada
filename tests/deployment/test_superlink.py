"""The same two apps as real processes on loopback (SuperLink, SuperNodes, `flwr run`) equal the simulation."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from medfl import config
from medfl.study import Study
from tests.federation.small import digest, run, small_study

pytestmark = pytest.mark.deployment
BIN = Path(sys.executable).parent
LIMIT = 240  # s for the whole study


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(words: list[str], env: dict[str, str], log: Path) -> Iterator[None]:
    """A server process, ended with everything that it started."""
    with log.open("wb") as file:
        process = subprocess.Popen(words, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2),
        ):
            return
        assert time.monotonic() < deadline, f"nothing answers on port {port}"
        time.sleep(0.3)


def submit(study: Study, home: Path, port: int, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    home.mkdir(parents=True, exist_ok=True)
    connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection)
    (home / "run.toml").write_text(f"study = '''\n{study.source}'''\nstages = \"pretrain,evaluate\"\nsites = 2\n")
    words = [
        str(BIN / "flwr"),
        "run",
        str(config.CONFIGS.parent),
        "here",
        "-c",
        str(home / "run.toml"),
        "--stream",
    ]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=LIMIT)


def test_flwr_run_on_a_superlink_gives_the_simulations_encoder(tmp_path: Path) -> None:
    simulated = run(small_study(tmp_path / "sim", "arms=[federated]"), stages="pretrain,evaluate", nodes=2)
    study = small_study(tmp_path / "deployed", "arms=[federated]")
    home = tmp_path / "home"
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    env |= {
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
    }
    link, ports = free_port(), [free_port(), free_port()]
    with contextlib.ExitStack() as stack:
        superlink = [str(BIN / "flower-superlink"), "--insecure", "--port", str(link)]
        stack.enter_context(started([*superlink, "--database", str(tmp_path / "state.db")], env, tmp_path / "link.log"))
        wait_for(link)
        for index, port in enumerate(ports):
            node = [
                str(BIN / "flower-supernode"),
                "--insecure",
                "--superlink",
                f"127.0.0.1:{link}",
                "--port",
                str(port),
            ]
            node += ["--node-config", f"partition-id={index} num-partitions=2"]
            stack.enter_context(started(node, env, tmp_path / f"node-{index}.log"))
        outcome = submit(study, home, link, env)
    done = Path(study.run_dir)
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in tmp_path.glob("*.log"))
    assert (done / "encoder.safetensors").exists(), outcome.stdout[-3000:] + outcome.stderr[-3000:] + logs
    assert digest(done / "encoder.safetensors") == digest(simulated.path / "encoder.safetensors")
    assert digest(done / "evaluation.csv") == digest(simulated.path / "evaluation.csv")
    shutil.rmtree(home)
