"""The SuperLink's Control interface, asked from the coordinator's own host: who is registered, which runs there are.

Flower's command line starts a process of seconds for each question, shows no node's key, and builds the bundle itself;
here a run is submitted with the very bytes of the bundle that the sites reviewed. The only user of these private
names; tests/test_deployment.py fails when one moves.
"""

import hashlib
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from medfl.deployment.programs import SWITCHES
from medfl.errors import InternalError, NetworkError
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
        from flwr.proto import control_pb2
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

        context = ssl.create_default_context(cafile=str(folder / "authority" / "ca.crt"))
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        self.address = study.link
        self.client: Any = ControlHttpClient(f"https://{study.link}", interceptors=[version], verify=context)
        self.messages: Any = control_pb2

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
        from flwr.common.serde import user_config_to_proto
        from flwr.proto.fab_pb2 import Fab

        request = self.messages.StartRunRequest(
            fab=Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle),
            override_config=user_config_to_proto(dict(run_config)),
        )
        with self._asking("start the run"):
            answer = self.client.StartRun(request)
        if not answer.run_id:
            raise InternalError("the SuperLink started no run and said no reason. Its log is state/logs/link.log.")
        return int(answer.run_id)

    def stop(self, run: int) -> None:
        with self._asking("stop the run"):
            self.client.StopRun(self.messages.StopRunRequest(run_id=run))

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        import httpx

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
