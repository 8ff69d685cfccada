"""The programs of the study lead's host: proxy, link, apps and keeper, the same under `up`, systemd and containers.

proxy    nginx, the only public port
link     Flower's SuperLink: TLS, node authentication, a database file, ServerApps in processes of their own
apps     Flower's SuperExec, which runs the ServerApp
keeper   registers approved sites, submits and resumes the run, writes status.json
"""

import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from medfl.deployment import nginx
from medfl.deployment.processes import Process
from medfl.deployment.programs import environment, program
from medfl.errors import ConfigError, CredentialError, ResourceError, one_of
from medfl.provision import authority
from medfl.provision.keys import private
from medfl.provision.study_file import StudyFile

PARTS = ("proxy", "link", "apps", "keeper")
SECRETS_OF = {
    "proxy": ("authority/server.key",),
    "link": ("authority/server.key", "keys/superexec.secret"),
    "apps": ("keys/superexec.secret", "keys/study"),
    "keeper": (),
}
CONNECTION = "study"  # name of the SuperLink in Flower's own configuration
NGINX_PLACES = "/usr/sbin:/usr/local/sbin:/sbin"  # where Debian puts it, beyond the PATH of an ordinary account
WARN_DAYS = 30.0


def process(folder: Path, part: str) -> Process:
    """The words and environment of one part; `folder` is made absolute.

    Raises:
        ConfigError: no such part, or no coordinator's folder.
        CredentialError: a key is missing or readable by others, or the certificate has expired.
        ResourceError: a program is not installed.
    """
    one_of("part", part, PARTS)
    folder = absolute(folder)
    study = StudyFile.read(folder)
    check_keys(folder, part)
    home = folder / "state" / "home"
    if part != "proxy":
        configure(home, folder, study)
    words = {"proxy": _proxy, "link": _link, "apps": _apps, "keeper": _keeper}[part](folder, study)
    public = nginx.listen() if nginx.listen() != "0.0.0.0" else "127.0.0.1"  # noqa: S104
    health = {"link": f"https://{study.link}/health", "proxy": f"https://{public}:{study.port}/health"}
    env = environment(home, near=(study.link_host,))
    return Process(part, words, env, folder / "state" / "logs" / f"{part}.log", health.get(part))


def absolute(folder: Path) -> Path:
    """
    Raises:
        ConfigError: a path that nginx could not read from its configuration.
    """
    path = folder.expanduser().resolve()
    if set(str(path)) & set(" \t\n;{}\"'\\$#"):
        raise ConfigError(f"got the folder {str(path)!r}, need one without spaces, quotes or any of ;{{}}$#\\.")
    return path


def check_keys(folder: Path, part: str) -> None:
    """
    Raises:
        CredentialError: a key that this part needs is missing or readable by others, or the certificate has expired.
    """
    for name in SECRETS_OF[part]:
        private(folder / name)
    if authority.days_left(folder / "authority" / "server.crt") <= 0:
        raise CredentialError(f"the coordinator's certificate has expired. Run: medfl study renew {folder}")


def check_ports(study: StudyFile) -> None:
    """
    Raises:
        ResourceError: another program has one of the study's ports.
    """
    for key, host, port in (("port", nginx.listen(), study.port), ("link_port", study.link_host, study.link_port)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ResourceError(
                    f"{key}: cannot listen on {host}:{port} ({error.strerror}). End the program that does, "
                    "or change study.yaml."
                ) from None


def configure(home: Path, folder: Path, study: StudyFile) -> None:
    """Flower's own configuration, with which `flwr` reaches this SuperLink alone."""
    home.mkdir(parents=True, exist_ok=True)
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{study.link}"\n'
        f'root-certificates = "{folder}/authority/ca.crt"\n'
    )
    path = home / "config.toml"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def flower(folder: Path) -> Mapping[str, str]:
    """The environment in which `flwr` reaches this coordinator's SuperLink."""
    folder = absolute(folder)
    return environment(folder / "state" / "home", near=(StudyFile.read(folder).link_host,))


def _proxy(folder: Path, study: StudyFile) -> list[str]:
    found = shutil.which("nginx") or shutil.which("nginx", path=NGINX_PLACES)
    if not found:
        raise ResourceError(
            "nginx is not installed, and without it the SuperLink must not be reached from outside. "
            "Run: sudo apt-get install nginx-light   (or your system's nginx 1.20 or later)"
        )
    path = nginx.prepare(folder, study)
    return [found, "-c", str(path), "-p", str(folder / "state" / "nginx"), "-e", "stderr"]


def _link(folder: Path, study: StudyFile) -> list[str]:
    place = folder / "authority"
    return [
        program("flower-superlink"),
        *("--host", study.link_host, "--port", str(study.link_port)),
        *("--ssl-ca-certfile", str(place / "ca.crt")),
        *("--ssl-certfile", str(place / "server.crt")),
        *("--ssl-keyfile", str(place / "server.key")),
        "--enable-supernode-auth",
        *("--database", str(folder / "state" / "superlink.db")),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(folder / "keys" / "superexec.secret")),
        "--disable-runtime-dependency-installation",
    ]


def _apps(folder: Path, study: StudyFile) -> list[str]:
    return [
        program("flower-superexec"),
        *("--runtime-api-address", study.link),
        *("--root-certificates", str(folder / "authority" / "ca.crt")),
        *("--superexec-auth-secret-file", str(folder / "keys" / "superexec.secret")),
    ]


def _keeper(folder: Path, study: StudyFile) -> list[str]:
    del study
    return [sys.executable, "-m", "medfl.cli.main", "study", "serve", "keeper", str(folder)]
