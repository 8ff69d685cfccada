"""The two processes of a site: the node, which reaches the coordinator and sees no data, and the apps, the opposite."""

import os
import socket
import sys
from pathlib import Path

from medfl.deployment import handover
from medfl.deployment.handover import SOCKET
from medfl.deployment.processes import Process
from medfl.deployment.programs import environment, program
from medfl.errors import ConfigError, ResourceError
from medfl.onsite.approvals import approval_of
from medfl.onsite.site_file import SiteFile, StudyFolder
from medfl.provision.keys import private

NODE_HOST = "MEDFL_NODE_HOST"  # where the apps find the node: another container's name, or this machine
# what the launcher is told
PYTHON, HANDOVER, SITE_FILE, STUDY = "MEDFL_PYTHON", "MEDFL_HANDOVER", "MEDFL_SITE_FILE", "MEDFL_STUDY"
PROXIES = ("all_proxy", "http_proxy", "https_proxy")
LOCAL = "127.0.0.1"
LAUNCHER = """#!/bin/sh
# Flower's SuperExec starts its programs by name. At this site all of them are this one, which lets a ClientApp run if
# its bundle is the approved one, and nothing else.
exec "$MEDFL_PYTHON" -I -S "$MEDFL_HANDOVER" {command} "$@"
"""


def node(site: SiteFile, study_id: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the SuperNode.

    Raises:
        PolicyError: the study is not approved, or its approval ended.
        CredentialError: a key is missing, or others may read it.
        ResourceError: Flower is not installed beside medfl.
    """
    _, invitation = approval_of(site, study_id)
    words = [
        *(sys.executable, "-P", "-m", "medfl.deployment.tended"),
        *(sys.executable, "-P", "-m", "medfl.deployment.node", program("flower-supernode")),
        *("--root-certificates", str(site.study(study_id).authority)),
        *("--superlink", at(invitation.address, invitation.port)),
        *("--auth-supernode-private-key", str(private(site.node_key))),
        *("--isolation", "process", "--superexec-auth-secret-file", str(private(site.secret))),
        *("--host", node_host(), "--port", str(site.port)),
        *("--node-config", f"site-file={quoted(site.path)}"),
    ]
    return words, environment(site.state / "node", [node_host()])


def apps(site: SiteFile, study_id: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the SuperExec that runs the ClientApp; writes the launchers that it starts.

    Raises:
        PolicyError: the study is not approved, or its approval ended.
        CredentialError: a key is missing, or others may read it.
    """
    approval_of(site, study_id)
    folder = site.study(study_id)
    _write_launchers(folder)
    words = [
        *(sys.executable, "-P", "-m", "medfl.deployment.warm"),
        program("flower-superexec"),
        *("--insecure", "--runtime-api-address", at(node_host(), site.port)),
        *("--superexec-auth-secret-file", str(private(site.secret))),
    ]
    around = environment(folder.home, [node_host()])
    kept = {name: value for name, value in around.items() if name.lower() not in PROXIES}
    told = {PYTHON: sys.executable, HANDOVER: handover.__file__, SITE_FILE: str(site.path), STUDY: study_id}
    told[SOCKET] = str(site.state / "warm.socket")
    path = os.pathsep.join([str(folder.bin), kept["PATH"]])
    # the app's folder must hold the reviewed files alone, so what is compiled goes elsewhere
    compiled = {"PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(site.state / "compiled")}
    return words, kept | told | compiled | {"PATH": path}


def processes(site: SiteFile, study_id: str) -> list[Process]:
    """Both, as `medfl site join` keeps them running; raises as they do."""
    logs = site.study(study_id).logs
    return [
        Process("node", *node(site, study_id), logs / "node.log", health(site)),
        Process("apps", *apps(site, study_id), logs / "apps.log"),
    ]


def check_port(site: SiteFile) -> None:
    """
    Raises:
        ResourceError: another program has the port.
    """
    with socket.socket(socket.AF_INET6 if ":" in node_host() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((node_host(), site.port))
        except OSError as error:
            raise ResourceError(
                f"port {site.port} of {node_host()} cannot be used ({error.strerror}). End the program that has it, or "
                f"choose another in {site.path}."
            ) from None


def health(site: SiteFile) -> str:
    """An address that answers while the node works."""
    return f"http://{at(node_host(), site.port)}/health"


def at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def node_host() -> str:
    return os.environ.get(NODE_HOST, LOCAL)


def quoted(path: Path) -> str:
    """A path as a value of Flower's --node-config.

    Raises:
        ConfigError: it holds both kinds of quotes, or line ends.
    """
    text = str(path)
    if "'" not in text and text.isprintable():
        return f"'{text}'"
    if '"' not in text and "\\" not in text and text.isprintable():
        return f'"{text}"'
    raise ConfigError(f"{text!r}: this folder's name has quotes of both kinds. Move the site to another folder.")


def _write_launchers(folder: StudyFolder) -> None:
    from medfl.flower_compat import task_commands

    folder.bin.mkdir(parents=True, exist_ok=True, mode=0o700)
    for command in task_commands():
        draft = folder.bin / f".{command}"
        draft.write_text(LAUNCHER.format(command=command))
        draft.chmod(0o700)
        draft.replace(folder.bin / command)
