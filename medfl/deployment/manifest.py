"""What a bundle says of itself, and whether it is still what it was."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from medfl.deployment import sealed
from medfl.errors import ConfigError

MANIFEST, CONSTRAINTS, WHEELS, DEPLOY, BOOTSTRAP = "manifest.json", "constraints.txt", "wheels", "deploy", "install.py"
AGAIN = "Do not use it; get the bundle again."


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and where it runs."""

    medfl: str
    protocol: int
    python: str  # major.minor
    platforms: tuple[str, ...]  # wheel tags, such as linux_x86_64
    extras: tuple[str, ...]
    wheels: tuple[str, ...]  # file names
    made: str  # ISO 8601, UTC

    @classmethod
    def read(cls, bundle: Path, text: str) -> "Manifest":
        """Parse manifest.json.

        Raises:
            ConfigError: other keys or types than a manifest has.
        """
        kinds = {"protocol": int, "platforms": tuple, "extras": tuple, "wheels": tuple}
        try:
            node: dict[str, Any] = json.loads(text)
            values: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in node.items()
            }
            manifest = cls(**values)
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"{bundle}: {MANIFEST} is not a manifest of this release. {AGAIN}") from None
        if not all(isinstance(values[field.name], kinds.get(field.name, str)) for field in fields(cls)):
            raise ConfigError(f"{bundle}: {MANIFEST} has a value of the wrong type. {AGAIN}")
        return manifest


def verify(bundle: Path) -> tuple[str, Manifest]:
    """Fingerprint and manifest of a bundle, a folder or a tar file, in which every byte is as it was made.

    Raises:
        ConfigError: what is not is named.
    """
    fingerprint, listed = sealed.verify(bundle)
    text = sealed.text_of(bundle, MANIFEST)
    if text is None:
        raise ConfigError(f"{bundle} has no {MANIFEST}: it is no bundle of medfl.")
    manifest = Manifest.read(bundle, text)
    wheels = {name.removeprefix(f"{WHEELS}/") for name in listed if name.startswith(f"{WHEELS}/")}
    if odd := wheels ^ set(manifest.wheels):
        raise ConfigError(f"{bundle}: {MANIFEST} and {WHEELS}/ differ in {', '.join(sorted(odd)[:5])}. {AGAIN}")
    return fingerprint, manifest
