"""Install medfl from an offline bundle: only the standard library, since nothing else is there yet."""

import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medfl.deployment import sealed
from medfl.deployment.manifest import DEPLOY, WHEELS, Manifest, verify
from medfl.deployment.pip import dotted, pip, run
from medfl.errors import ConfigError, VersionError

VENV = "Install Python's venv (Debian, Ubuntu: apt install python3-venv)."


def install(bundle: Path, into: Path) -> tuple[str, Manifest]:
    """Verify `bundle`, make a virtual environment in `into` and install medfl there, without a network.

    Returns:
        The bundle's fingerprint and manifest.

    Raises:
        ConfigError: the bundle is not as it was made, or `into` is there already and not empty.
        VersionError: it was made for another Python or another kind of machine.
        NetworkError: pip failed, for example since the bundle lacks a wheel for this host; `into` is removed.
    """
    if into.exists() and not (into.is_dir() and not any(into.iterdir())):
        raise ConfigError(f"got {into}, which is there already. Name a new folder, or remove it.")
    with _as_folder(bundle, into.absolute().parent) as folder:
        fingerprint, manifest = verify(folder)
        _require_fit(bundle, manifest)
        try:
            run([sys.executable, "-m", "venv", str(into)], VENV)
            _install_wheels(into, folder / WHEELS, manifest)
            shutil.copytree(folder / DEPLOY, into / DEPLOY)
        except BaseException:
            shutil.rmtree(into, ignore_errors=True)
            raise
    return fingerprint, manifest


def _install_wheels(into: Path, wheels: Path, manifest: Manifest) -> None:
    extras = f"[{','.join(manifest.extras)}]" if manifest.extras else ""
    offline = ["--no-index", "--find-links", str(wheels), "--only-binary=:all:", "--no-cache-dir"]
    python = into / "bin" / "python"
    pip("install", "--quiet", *offline, f"medfl{extras}=={manifest.medfl}", python=python, clean=True)
    pip("check", python=python, clean=True)


@contextmanager
def _as_folder(bundle: Path, place: Path) -> Iterator[Path]:
    """The bundle as a folder; of a tar file a temporary one, on the disk of `place`."""
    if not bundle.is_file():
        yield bundle
        return
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=place) as name:
        sealed.unpack(bundle, Path(name))
        yield Path(name)


def _require_fit(bundle: Path, manifest: Manifest) -> None:
    machine = platform.machine()
    if manifest.python != dotted():
        raise VersionError(
            f"{bundle} is for Python {manifest.python}, this is {dotted()}: run it with python{manifest.python}, "
            f"or have a bundle made with --python {dotted()}."
        )
    if not any(tag.endswith(machine) for tag in manifest.platforms):
        raise VersionError(
            f"{bundle} is for {', '.join(manifest.platforms)}, this is {machine}: have a bundle made with "
            f"--platform manylinux_2_28_{machine}."
        )
