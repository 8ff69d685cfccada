"""study.yaml: what the study lead decided when the study was made, and where its coordinator is."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from medfl import PROTOCOL, __version__
from medfl.errors import ConfigError, VersionError
from medfl.provision.documents import PORTS, STUDY_ID, check_address, check_line, last_day

FILE = "study.yaml"
LINK_CONTAINER = "link"  # the SuperLink's name among the containers of deploy/
LINK_HOST = "MEDFL_LINK_HOST"  # in place of link_host, where the SuperLink has a container of its own
HINTS = {
    "name": "shown to people",
    "id": "never changes",
    "address": "where sites reach this coordinator: DNS name or IP address",
    "port": "the only public port",
    "link_port": "of the SuperLink: never open it to a network",
    "link_host": "this host; in containers the name of the link's",
    "sites": "how many a run waits for before it starts",
    "until": "last day of the study; nothing runs after it",
}


@dataclass(frozen=True)
class StudyFile:
    """The typed study.yaml of a coordinator's folder."""

    name: str
    id: str
    address: str
    port: int
    link_port: int
    link_host: str
    sites: int
    until: str
    created: str
    medfl: str
    protocol: int

    @classmethod
    def read(cls, folder: Path) -> "StudyFile":
        """
        Raises:
            ConfigError: no coordinator's folder, or a key that is unknown, missing or cannot be used.
            VersionError: made by a release with another protocol.
        """
        path = folder / FILE
        if not path.is_file():
            raise ConfigError(f"{folder} has no {FILE}. Give the folder that medfl study init made.")
        try:
            tree = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        study = cls(**_typed(tree if isinstance(tree, dict) else {}, path))
        study.check()
        host = os.environ.get(LINK_HOST) or study.link_host
        return cls(**asdict(study) | {"link_host": host})

    def check(self) -> None:
        """Raises as `read` does."""
        if self.protocol != PROTOCOL:
            raise VersionError(
                f"{FILE} was made by medfl {self.medfl} (protocol {self.protocol}), this is medfl {__version__} "
                f"(protocol {PROTOCOL}). Install that release, or start a new study."
            )
        if not STUDY_ID.fullmatch(self.id):
            raise ConfigError(f"id: got {self.id!r}, need such as chest-0a1b2c3d.")
        for key, port in (("port", self.port), ("link_port", self.link_port)):
            if port not in PORTS:
                raise ConfigError(f"{key}: got {port}, need 1 to {PORTS[-1]}.")
        if self.port == self.link_port:
            raise ConfigError(f"port and link_port: got {self.port} for both, need two different ones.")
        check_address(self.address)
        check_address(self.link_host)
        check_line("name", self.name)
        last_day(self.until)
        if self.sites < 1:
            raise ConfigError(f"sites: got {self.sites}, need at least 1.")

    def write(self, folder: Path) -> None:
        """
        Raises:
            ResourceError: the disk is full.
        """
        from medfl.files import write_bytes  # brings torch along, which readers do without

        lines = [yaml.safe_dump({k: v}, allow_unicode=True, width=1000).strip() for k, v in asdict(self).items()]
        told = [f"{line:<44}  # {HINTS[key]}" if (key := line.partition(":")[0]) in HINTS else line for line in lines]
        write_bytes(folder / FILE, "\n".join([*told, ""]).encode())

    @property
    def link(self) -> str:
        """Where the SuperLink answers, host:port; never to be reached from outside."""
        return f"{self.link_host}:{self.link_port}"

    @property
    def names(self) -> list[str]:
        """What the coordinator's certificate has to be good for."""
        return list(dict.fromkeys([self.address, self.link_host, LINK_CONTAINER]))


def _typed(tree: Mapping[str, Any], path: Path) -> dict[str, Any]:
    wanted: dict[str, Any] = {field.name: field.type for field in fields(StudyFile)}
    if odd := sorted(str(key) for key in tree.keys() - wanted.keys()):
        near = difflib.get_close_matches(odd[0], wanted, n=1)
        raise ConfigError(f"{path}: got unknown key {odd[0]!r}.{f' Did you mean {near[0]}?' if near else ''}")
    if missing := [key for key in wanted if key not in tree]:
        raise ConfigError(f"{path}: {missing[0]} is missing. Add it, or restore the file from a backup.")
    values = {key: str(value) if key in ("until", "created") else value for key, value in tree.items()}
    for key, kind in wanted.items():
        if type(values[key]) is not kind:
            raise ConfigError(f"{path}: {key}: got {values[key]!r}, need {kind.__name__}.")
    return values
