"""The commands of the offline bundle. They need nothing but Python, so that a bundle can install itself."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from medfl.deployment.manifest import Manifest, verify
from medfl.errors import ConfigError, MedflError

USAGE = "medfl bundle build TARGET | verify BUNDLE | install BUNDLE"


def bundle(words: Sequence[str]) -> None:
    """Bring medfl to a host without internet: medfl bundle build | verify | install.

    medfl bundle build TARGET          a folder, or one file where TARGET ends with .tar; run it in a checkout
          --extra NAME                 with an extra of medfl, such as export; can be given again
          --platform TAG               for other machines, such as manylinux_2_28_x86_64; can be given again
          --python 3.12                for another Python than this one
          --source FOLDER              the checkout, where it is not the current folder
          -- WORDS                     for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu
    medfl bundle verify BUNDLE         refuse a changed byte, a missing or additional file, or a path out of it
    medfl bundle install BUNDLE        verify, and install into a new virtual environment without a network
          --into FOLDER                the new folder (default: medfl)

    Where medfl is not installed yet, a bundle does it by itself: python3.11 BUNDLE/install.py FOLDER
    """
    verbs: dict[str, Callable[[Sequence[str]], None]] = {"build": _build, "verify": _verify, "install": _install}
    if {"-h", "--help"} & set(words):
        print((bundle.__doc__ or "").replace("\n    ", "\n"))
        return
    if not words or words[0] not in verbs:
        raise ConfigError(f"got {' '.join(words[:1]) or 'nothing'!r}. Usage: {USAGE}")
    verbs[words[0]](words[1:])


def main(words: Sequence[str]) -> int:
    """What a bundle's own install.py runs; returns the exit code."""
    try:
        bundle(words)
    except MedflError as error:
        print(f"medfl bundle: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _build(words: Sequence[str]) -> None:
    from medfl.deployment.offline import Hosts, build

    place = list(words).index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="medfl bundle build")
    parser.add_argument("target", type=Path)
    parser.add_argument("--source", type=Path, default=Path())
    for name in ("extra", "platform"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--python", default="")
    asked = parser.parse_args(words[:place])
    hosts = Hosts(tuple(asked.platform), asked.python, tuple(asked.extra), tuple(words[place + 1 :]))
    fingerprint, manifest = build(asked.target, asked.source.resolve(), hosts)
    print(f"wrote {asked.target}: {_sentence(manifest)}\n{_spoken(fingerprint)}")


def _verify(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="medfl bundle verify")
    parser.add_argument("bundle", type=Path)
    asked = parser.parse_args(words)
    fingerprint, manifest = verify(asked.bundle)
    print(f"{asked.bundle} is as it was made: {_sentence(manifest)}\n{_spoken(fingerprint)}")


def _install(words: Sequence[str]) -> None:
    from medfl.deployment.installing import install

    parser = argparse.ArgumentParser(prog="medfl bundle install")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--into", type=Path, default=Path("medfl"))
    asked = parser.parse_args(words)
    fingerprint, manifest = install(asked.bundle, asked.into)
    print(f"installed {_sentence(manifest)}\n{_spoken(fingerprint)}\nnext: {asked.into}/bin/medfl --help")


def _sentence(manifest: Manifest) -> str:
    hosts = f"Python {manifest.python} on {', '.join(manifest.platforms)}"
    return f"medfl {manifest.medfl} of {manifest.made}, {len(manifest.wheels)} wheels for {hosts}"


def _spoken(fingerprint: str) -> str:
    return f"fingerprint, to compare by phone: {fingerprint}"
