"""site.yaml: what a hospital decides, typed, and where everything of its folder lies."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml

from medfl.errors import ConfigError, one_of
from medfl.provision.documents import check_site
from medfl.study import STAGES, Node

T = TypeVar("T")
STUDY_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")
NEEDS_NO_SITE = "report"  # the stage that runs at the study lead alone


@dataclass(frozen=True)
class SitePolicy:
    """What a study may ask of this site. It is merged last: nothing that arrives can change it."""

    methods: tuple[str, ...] | None = None  # null: any method of this medfl release
    stages: tuple[str, ...] = ("pretrain", "finetune", "evaluate", "transfer", "synthesize")
    least_images: int = 64  # training images; fewer could be recognised in an update
    least_steps: int = 20  # optimizer steps of a round
    least_batch: int = 16  # images of a step
    most_bytes: int = 2_000_000_000  # of one reply
    peers: Node | None = None  # secure aggregation: site -> its signing key; a sum has no others. null: unchecked
    privacy: Node | None = None  # {max_epsilon: 8.0, delta: 1.0e-5}: differential privacy is asked for; null: it is not

    def __post_init__(self) -> None:
        for stage in self.stages:
            one_of("policy.stages", stage, [name for name in STAGES if name != NEEDS_NO_SITE])
        for name in ("least_images", "least_steps", "least_batch", "most_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy.{name}: got {getattr(self, name)}, need at least 1.")
        if self.privacy is not None:
            _check_privacy(self.privacy)


def _check_privacy(node: Node) -> None:
    """A promise that cannot be kept must stop everything."""
    if not {"max_epsilon"} <= node.keys() <= {"max_epsilon", "delta"}:
        raise ConfigError(
            f"policy.privacy: got {node!r}, need max_epsilon and perhaps delta, such as {{max_epsilon: 8.0}}, or null."
        )
    for name, most in {"max_epsilon": 1000.0, "delta": 0.1}.items():
        value = node.get(name, most)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise ConfigError(f"policy.privacy.{name}: got {value!r}, need a number above 0, at most {most:g}.")


@dataclass(frozen=True)
class Limits:
    """When this site helps itself."""

    hours: float = 12.0  # of work on one request; then the node is restarted

    def __post_init__(self) -> None:
        if not 0 < self.hours <= 24 * 365:
            raise ConfigError(f"limits.hours: got {self.hours:g}, need a time above 0 hours, at most a year.")


@dataclass(frozen=True)
class SiteFile:
    """The settings of one site, and the places in its folder."""

    path: Path  # site.yaml, absolute
    site: str
    contact: str = ""
    device: str = "auto"  # auto | cpu | cuda
    threads: int | None = None  # CPU threads; null: as the study says
    port: int = 9094  # between this site's two processes, never open to others
    data: Mapping[str, Node] = field(default_factory=dict)
    policy: SitePolicy = SitePolicy()
    limits: Limits = Limits()

    @classmethod
    def read(cls, path: Path) -> "SiteFile":
        """
        Args:
            path: site.yaml, or the folder that holds it.

        Raises:
            ConfigError: no such file, not YAML, an unknown key (with its nearest match) or a value of the wrong type.
        """
        place = (path / "site.yaml" if path.is_dir() else path).absolute()
        try:
            tree = yaml.safe_load(place.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{place} does not exist. Make it with: medfl site init {place.parent}") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{place} cannot be read: {error}. Repair it or start from a new one.") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{place}: got {type(tree).__name__}, need keys such as site, data and policy.")
        sections: dict[str, Any] = {"policy": SitePolicy, "limits": Limits}
        values = {key: value for key, value in tree.items() if key not in sections or value is not None}
        for name, kind in sections.items():
            if name in values:
                values[name] = _read(kind, values[name], f"{name}.", place)
        site = _read(cls, values, "", place, path=place)
        return replace(site, data={name: _placed(node, site.folder) for name, node in site.data.items()})

    def __post_init__(self) -> None:
        check_site(self.site)
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads: got {self.threads}, need at least 1, or null.")
        if not 1024 <= self.port <= 65535:
            raise ConfigError(f"port: got {self.port}, need a free port from 1024 to 65535.")
        for name, node in self.data.items():
            if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
                raise ConfigError(f"data.{name}: got {node!r}, need keys such as root and datalist.")

    def data_set(self, name: str) -> Node:
        """The keys of a named data set, to be merged last into a study's `data`; its `root` is absolute.

        Raises:
            ConfigError: no data set of that name.
        """
        if name not in self.data:
            raise ConfigError(f"data: got {name!r}, need one of {', '.join(self.data) or 'none'} in {self.path}.")
        return self.data[name]

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def node_key(self) -> Path:
        return self.keys / "node"

    @property
    def signing_key(self) -> Path:
        return self.keys / "signing"

    @property
    def secret(self) -> Path:
        """Shared by the node and the process that runs the apps."""
        return self.keys / "superexec.secret"

    @property
    def request(self) -> Path:
        return self.folder / f"{self.site}.request.json"

    @property
    def state(self) -> Path:
        """What stays at the site between rounds."""
        return self.folder / "state"

    @property
    def busy(self) -> Path:
        """The request being worked on; absent between requests."""
        return self.state / "busy.json"

    @property
    def audit(self) -> Path:
        return self.folder / "audit.jsonl"

    @property
    def check(self) -> Path:
        return self.folder / "check"

    @property
    def studies(self) -> Path:
        return self.folder / "studies"

    def study(self, study_id: str) -> "StudyFolder":
        """
        Raises:
            ConfigError: no possible id of a study.
        """
        if not STUDY_ID.fullmatch(study_id):
            raise ConfigError(f"got {study_id!r}, need the id of a study, such as lungs-1a2b3c4d.")
        return StudyFolder(self.studies / study_id)


@dataclass(frozen=True)
class StudyFolder:
    """The places of one study at a site."""

    path: Path

    @property
    def invitation(self) -> Path:
        return self.path / "invitation.json"

    @property
    def approval(self) -> Path:
        return self.path / "approval.json"

    @property
    def home(self) -> Path:
        """Flower's home for the process that runs the apps."""
        return self.path / "home"

    @property
    def authority(self) -> Path:
        """The study's root certificate."""
        return self.path / "authority.crt"

    @property
    def apps(self) -> Path:
        """Read-only; holds the reviewed bundle and nothing else."""
        return self.home / "apps"

    @property
    def bin(self) -> Path:
        return self.path / "bin"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def pid(self) -> Path:
        return self.path / "join.pid"


def _read(kind: type[T], tree: Any, at: str, place: Path, **given: Any) -> T:
    if not isinstance(tree, dict):
        raise ConfigError(f"{place}: {at.rstrip('.')}: got {tree!r}, need a mapping of keys.")
    wanted = {entry.name: entry.type for entry in fields(kind) if entry.name not in given}  # type: ignore[arg-type]
    for key in tree:
        if key not in wanted:
            near = difflib.get_close_matches(str(key), wanted, n=1)
            hint = f" Did you mean '{at}{near[0]}'?" if near else ""
            raise ConfigError(f"{place}: unknown key '{at}{key}'.{hint} Known: {', '.join(wanted)}.")
    if "site" in wanted and "site" not in tree:
        raise ConfigError(f"{place}: 'site' is missing. Add the name of this site, such as site: hospital-a.")
    return kind(**{key: _typed(value, wanted[key], f"{place}: {at}{key}") for key, value in tree.items()}, **given)


def _placed(node: Node, folder: Path) -> Node:
    """Processes have working folders of their own, so a relative `root` is one beside site.yaml."""
    return node | {"root": str(folder / Path(node["root"]).expanduser())} if isinstance(node.get("root"), str) else node


def _typed(value: Any, kind: Any, at: str) -> Any:
    """`value` as `kind`; a whole number passes for float."""
    if get_origin(kind) is UnionType:  # X | None
        return None if value is None else _typed(value, get_args(kind)[0], at)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{at}: got {value!r}, need a list such as [a, b].")
        return tuple(_typed(item, get_args(kind)[0], at) for item in value)
    base = get_origin(kind) or kind
    if isinstance(value, bool) or not isinstance(value, base):
        shown = {"str": "text", "int": "a whole number", "float": "a number"}.get(base.__name__, "a mapping of keys")
        raise ConfigError(f"{at}: got {value!r}, need {shown}.")
    return value
