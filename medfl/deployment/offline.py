"""The offline bundle: medfl and all that it needs, for a host without internet.

In it: manifest.json, SHA256SUMS, install.py, constraints.txt, wheels/, deploy/.
"""

import json
import re
import shutil
import sysconfig
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from medfl import PROTOCOL
from medfl.deployment import sealed
from medfl.deployment.manifest import BOOTSTRAP, CONSTRAINTS, DEPLOY, MANIFEST, WHEELS, Manifest
from medfl.deployment.pip import dotted, pip
from medfl.errors import ConfigError

PACKAGES = ("client", "configs", "medfl", "server")
NEEDED = ("client/app.py", "server/app.py", "medfl/cli/main.py")  # and every config
ONLY_AS_SOURCE = ("antlr4-python3-runtime",)  # pure Python without a wheel on PyPI: built here, it fits every platform
OLDEST_GLIBC = 5  # minor version of the oldest manylinux
SETUPTOOLS = 77  # the oldest that reads pyproject.toml
INSTALL = '''"""Check this bundle and install medfl from it, without a network: python3 install.py FOLDER"""

import sys
from pathlib import Path

if "%d.%d" % sys.version_info[:2] != "{python}":
    sys.exit("install.py: got Python %d.%d, need {python}: python{python} install.py FOLDER" % sys.version_info[:2])
sys.dont_write_bytecode = True
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here / "{wheel}"))
from medfl.cli.bundle import main  # noqa: E402

sys.exit(main(["install", str(here), "--into", *(sys.argv[1:2] or ["medfl"])]))
'''


@dataclass(frozen=True)
class Hosts:
    """The machines that a bundle is for, and what pip needs to know beyond its own settings."""

    platforms: tuple[str, ...] = ()  # wheel tags, such as manylinux_2_28_x86_64; none: machines like this one
    python: str = ""  # such as "3.11"; "": the one that runs this
    extras: tuple[str, ...] = ()  # of medfl, such as "export"
    options: tuple[str, ...] = ()  # words for pip, such as --extra-index-url URL

    @property
    def release(self) -> str:
        return self.python or dotted()

    @property
    def alike(self) -> bool:
        """Whether wheels that are built here run there."""
        return not self.platforms and self.release == dotted()


def build(target: Path, source: Path, hosts: Hosts) -> tuple[str, Manifest]:
    """Make a bundle from a checkout; returns its fingerprint and manifest.

    Args:
        target: a folder that does not exist, or a file named *.tar.
        source: the checkout.

    Raises:
        ConfigError: `target` is there, `source` is no checkout of medfl, or medfl's own wheel lacks a part.
        NetworkError: pip could not get or build a package.
    """
    _require_checkout(source)
    if target.exists():
        raise ConfigError(f"got {target}, which is there already. Name a new folder or file, or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=target.parent) as place:
        draft = Path(place) / "bundle"
        wheels = draft / WHEELS
        wheels.mkdir(parents=True)
        own = own_wheel(source, wheels, hosts.options)
        collect(own, source / CONSTRAINTS, hosts)
        manifest = fill(draft, source, own, hosts)
        fingerprint = sealed.seal(draft)
        if target.suffix == ".tar":
            packed = Path(place) / "packed"
            sealed.pack(draft, packed)
            packed.rename(target)
        else:
            draft.rename(target)
    return fingerprint, manifest


def own_wheel(source: Path, wheels: Path, options: Sequence[str] = ()) -> Path:
    """Build medfl's wheel from a copy of the sources, so that nothing of an earlier build gets in.

    Raises:
        NetworkError: pip failed.
        ConfigError: the wheel lacks a part of medfl; it is named.
    """
    with tempfile.TemporaryDirectory() as place:
        clean = Path(place) / "medfl"
        for name in PACKAGES:
            shutil.copytree(source / name, clean / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(source / name, clean / name)
        alone = ["--no-build-isolation"] if _has_setuptools() else []
        pip("wheel", "--quiet", "--no-deps", *alone, "--wheel-dir", str(wheels), *options, str(clean))
    own = next(wheels.glob("medfl-*.whl"))
    require_whole(own, source)
    return own


def require_whole(wheel: Path, source: Path) -> None:
    """Refuse a wheel of medfl without its apps, or with fewer configs than the checkout.

    Raises:
        ConfigError: a part is missing; it is named.
    """
    configs = (path.relative_to(source).as_posix() for path in (source / "configs").rglob("*.yaml"))
    with zipfile.ZipFile(wheel) as archive:
        missing = sorted({*NEEDED, *configs} - set(archive.namelist()))
    if missing:
        lacks = ", ".join(missing[:5])
        raise ConfigError(f"{wheel.name} lacks {lacks}: add it to packages or package-data in pyproject.toml.")


def collect(own: Path, constraints: Path, hosts: Hosts) -> None:
    """Put the wheels of everything that `own` needs beside it, in the versions of the constraints.

    Raises:
        NetworkError: pip failed.
    """
    wheels = own.parent
    asked = f"{own}[{','.join(hosts.extras)}]" if hosts.extras else str(own)
    common = ["--constraint", str(constraints), "--find-links", str(wheels), *hosts.options]
    if hosts.alike:
        pip("wheel", "--wheel-dir", str(wheels), *common, asked)
        return
    pip("wheel", "--no-deps", "--wheel-dir", str(wheels), *common, *ONLY_AS_SOURCE)
    tags = [word for tag in older(hosts.platforms) for word in ("--platform", tag)]
    wanted = ["--python-version", hosts.release, "--implementation", "cp", "--only-binary=:all:"]
    pip("download", "--dest", str(wheels), *tags, *wanted, *common, asked)


def older(platforms: Sequence[str]) -> list[str]:
    """These wheel tags, and those of older systems whose wheels run there too: pip compares tags by letter."""
    found = list(platforms)
    for tag in platforms:
        if match := re.fullmatch(r"manylinux_2_(\d+)_(\w+)", tag):
            newest, machine = int(match[1]), match[2]
            found += [f"manylinux_2_{minor}_{machine}" for minor in range(newest - 1, OLDEST_GLIBC - 1, -1)]
            found.append(f"manylinux2014_{machine}")  # also stands for the two before it
    return list(dict.fromkeys(found))


def fill(draft: Path, source: Path, own: Path, hosts: Hosts) -> Manifest:
    """Write everything of a bundle beside its wheels, except for the checksums."""
    shutil.copyfile(source / CONSTRAINTS, draft / CONSTRAINTS)
    shutil.copytree(source / DEPLOY, draft / DEPLOY, ignore=shutil.ignore_patterns("__pycache__", ".*", "*.env"))
    bootstrap = INSTALL.format(python=hosts.release, wheel=own.relative_to(draft).as_posix())
    (draft / BOOTSTRAP).write_text(bootstrap)
    manifest = Manifest(
        medfl=own.name.split("-")[1],
        protocol=PROTOCOL,
        python=hosts.release,
        platforms=hosts.platforms or (sysconfig.get_platform().replace("-", "_").replace(".", "_"),),
        extras=hosts.extras,
        wheels=tuple(sorted(path.name for path in own.parent.iterdir())),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    (draft / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest


def _require_checkout(source: Path) -> None:
    try:
        name = tomllib.loads((source / "pyproject.toml").read_text())["project"]["name"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        name = None
    if name != "medfl" or not (source / CONSTRAINTS).is_file() or not (source / DEPLOY).is_dir():
        raise ConfigError(
            f"got {source}, need a checkout of medfl with pyproject.toml, {CONSTRAINTS} and {DEPLOY}/. "
            "Run this in one, or name one: --source FOLDER."
        )


def _has_setuptools() -> bool:
    """Whether the installed setuptools can build medfl, so that pip need not fetch one."""
    try:
        return int(version("setuptools").split(".")[0]) >= SETUPTOOLS
    except PackageNotFoundError:
        return False
