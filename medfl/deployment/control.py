"""The SuperLink's Control interface, asked from the coordinator's own host: who is registered, which runs there are.

Flower's command line starts a process of seconds for each question, shows no node's key, and builds the bundle itself;
here a run is submitted with the very bytes of the bundle that the sites reviewed.
"""

import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from medfl.deployment.programs import SWITCHES
from medfl.errors import InternalError, NetworkError
from medfl.flower_compat import control_client, start_request
from medfl.provision.study_file import StudyFile

FINISHED = "finished"
ONLINE, OFFLINE, UNREGISTERED = "online", "offline", "unregistered"


@dataclass(frozen=True)
class Node:
    """One registered key."""

    id: int
    key: bytes  # PEM
    name: str
    status: str  # registered | online | offline | unregistered
    online_at: str
    offline_at: str


@dataclass(frozen=True)
class FlowerRun:
    """One attempt at the study, as Flower counts runs."""

    id: int
    status: str  # pending | starting | running | finished
    ended: str  # completed | failed | stopped, once finished
    details: str
    bundle: str  # SHA-256

    @property
    def lives(self) -> bool:
        return self.status != FINISHED


class Control:
    """A connection to the SuperLink; every method raises NetworkError where it does not answer or refuses."""

    def __init__(self, folder: Path, study: StudyFile) -> None:
        direct = [os.environ.get("NO_PROXY", ""), study.link_host]
        os.environ.update(SWITCHES | {"NO_PROXY": ",".join(host for host in direct if host)})
        trusted = ssl.create_default_context(cafile=str(folder / "authority" / "ca.crt"))
        self.address = study.link
        self.client, self.messages = control_client(f"https://{study.link}", trusted)

    def nodes(self) -> list[Node]:
        with self._asking("list the sites"):
            found = self.client.ListNodes(self.messages.ListNodesRequest()).nodes_info
        return [
            Node(n.node_id, n.public_key, n.name, n.status, n.last_activated_at, n.last_deactivated_at) for n in found
        ]

    def register(self, name: str, key: bytes) -> int:
        """Let the SuperNode with this public key (PEM) in; a key that was unregistered once is refused."""
        with self._asking(f"register {name}"):
            return int(self.client.RegisterNode(self.messages.RegisterNodeRequest(public_key=key, name=name)).node_id)

    def unregister(self, node: int) -> None:
        """Refuse every further request of a node."""
        with self._asking(f"unregister node {node}"):
            self.client.UnregisterNode(self.messages.UnregisterNodeRequest(node_id=node))

    def runs(self) -> list[FlowerRun]:
        """The newest first."""
        with self._asking("list the runs"):
            found = self.client.ListRuns(self.messages.ListRunsRequest(limit=20)).run_dict
        newest = sorted(found.values(), key=lambda run: str(run.pending_at), reverse=True)
        return [FlowerRun(r.run_id, r.status.status, r.status.sub_status, r.status.details, r.fab_hash) for r in newest]

    def start(self, bundle: bytes, run_config: Mapping[str, str | int]) -> int:
        """Submit a run of exactly this bundle; returns its id."""
        with self._asking("start the run"):
            answer = self.client.StartRun(start_request(bundle, run_config))
        if not answer.run_id:
            raise InternalError("the SuperLink started no run and said no reason. Its log is state/logs/link.log.")
        return int(answer.run_id)

    def stop(self, run: int) -> None:
        with self._asking("stop the run"):
            self.client.StopRun(self.messages.StopRunRequest(run_id=run))

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            text = error.response.text[:300]
            raise NetworkError(f"the SuperLink at {self.address} refused to {what}: {text}") from None
        except (httpx.HTTPError, ValueError, OSError) as error:
            raise NetworkError(f"cannot {what}: the SuperLink at {self.address} does not answer ({error}).") from None


def pem_of(openssh: str) -> bytes:
    """A node's public key as the SuperLink keeps it."""
    return load_ssh_public_key(openssh.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
