"""The app bundle: the installed release's own Python and YAML files, byte for byte, in Flower's format.

A bundle holds nothing of a study, so a site can compare it with what it installed itself.
"""

import hashlib
import io
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import medfl
from medfl.errors import ConfigError

ROOT = Path(medfl.__file__).resolve().parents[1]
PACKAGES = ("server", "client", "medfl", "configs")
PROJECT = "pyproject.toml"
CONTENT = ".info/CONTENT"
LIMIT = 10 * 1024 * 1024  # Flower's, for a bundle
DAY = (2024, 10, 1, 0, 0, 0)  # Flower's, for every file in a bundle

# Written as Flower's own builder writes it: the bundle is the same whoever builds it.
TEMPLATE = """\
[project]
name = "medfl"
version = "{version}"
description = "Federated self-supervised pretraining for medical images"

[project.license]
text = "Apache-2.0"

[tool.flwr.app]
publisher = "medfl"
fab-include = [
    "server/**/*.py",
    "client/**/*.py",
    "medfl/**/*.py",
    "configs/**/*.yaml",
    "configs/__init__.py",
]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
study = ""
stages = ""
sites = 0
root = ""
"""


def release() -> dict[str, bytes]:
    """The files of a bundle of this installation, by their paths in it.

    Raises:
        ConfigError: a package of the release is not beside medfl.
    """
    found = {
        file.relative_to(ROOT).as_posix(): file.read_bytes()
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*"))
        if file.suffix == ".py" or (package == "configs" and file.suffix == ".yaml")
    }
    if missing := [package for package in PACKAGES if f"{package}/__init__.py" not in found]:
        raise ConfigError(f"{ROOT} has no package {missing[0]}. Install medfl again, as one wheel.")
    return {PROJECT: TEMPLATE.format(version=medfl.__version__).encode(), **found}


def write_app(folder: Path) -> None:
    """Write the bundle's files for `flwr run`.

    Raises:
        ConfigError: the folder exists.
    """
    from medfl.files import write_bytes  # brings torch along, which readers do without

    if folder.exists():
        raise ConfigError(f"{folder} exists. Remove it to write the app again.")
    for name, content in release().items():
        write_bytes(folder / name, content)


def build_fab(folder: Path) -> bytes:
    """The bundle of a folder that `write_app` wrote: the same bytes as Flower's `flwr build`.

    Raises:
        ConfigError: no app is there, or the bundle is larger than Flower allows.
    """
    if not (folder / PROJECT).is_file():
        raise ConfigError(f"{folder} holds no app: it has no {PROJECT}. Give the folder that medfl wrote.")
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    kept = {name: file.read_bytes() for name, file in files.items() if "__pycache__" not in PurePosixPath(name).parts}
    return bundle(kept)


def bundle(files: Mapping[str, bytes]) -> bytes:
    """Files in Flower's format: stored, sorted, undated, with a list of their digests."""
    names = [PROJECT, *sorted(files.keys() - {PROJECT})]
    lines = [f"{name},{hashlib.sha256(files[name]).hexdigest()},{len(files[name]) * 8}" for name in names]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(_entry(name), files[name])
        archive.writestr(_entry(CONTENT), "\n".join(lines))
    if buffer.tell() > LIMIT:
        raise ConfigError(f"the app bundle has {buffer.tell()} bytes, Flower takes {LIMIT}. Remove files from medfl/.")
    return buffer.getvalue()


def app_digest() -> str:
    """SHA-256 of the bundle of this installation."""
    return hashlib.sha256(bundle(release())).hexdigest()


def differences(fab: bytes) -> list[str]:
    """Files of a bundle that are changed, missing or added against this installation; none: it is the same release.

    Raises:
        ConfigError: no bundle, or one that would unpack to more than Flower allows.
    """
    mine, got = release(), contents(fab)
    return sorted(name for name in mine.keys() | got.keys() if mine.get(name) != got.get(name))


def contents(fab: bytes) -> dict[str, bytes]:
    """The files of a bundle by name, each checked against the bundle's own list; raises as `differences` does."""
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > LIMIT or len(fab) > LIMIT:
                raise ConfigError(f"the bundle unpacks to more than {LIMIT} bytes. Ask the study lead for another.")
            files = {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConfigError(f"no app bundle ({error}). Ask the study lead for the invitation again.") from None
    if len(files) < len(entries) or not all(map(_plain, files)):
        raise ConfigError("the app bundle has a name twice, or one that leaves its folder. Do not use it.")
    listed = [line.split(",") for line in files.pop(CONTENT, b"").decode(errors="replace").split("\n")]
    if sorted(listed) != sorted([name, hashlib.sha256(c).hexdigest(), str(len(c) * 8)] for name, c in files.items()):
        raise ConfigError("the app bundle's files are not those of its own list. Ask for the invitation again.")
    return files


def version_of(fab: bytes) -> str:
    """The release that a bundle says it is; raises as `differences` does."""
    try:
        return str(tomllib.loads(contents(fab)[PROJECT].decode())["project"]["version"])
    except (KeyError, ValueError):
        raise ConfigError("the app bundle names no version. Ask the study lead for the invitation again.") from None


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, DAY)
    entry.create_system = 3
    return entry


def _plain(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and not name.endswith("/")
