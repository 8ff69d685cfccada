"""Every error a user can cause: one sentence saying what was got, what is needed and what to do, and an exit code."""

from collections.abc import Iterable
from typing import ClassVar


class MedflError(Exception):
    """Base of all errors shown without a traceback; `exit_code` is what the command returns."""

    exit_code: ClassVar[int] = 70


class ConfigError(MedflError):
    """A study, site or override that cannot be used as written."""

    exit_code = 3


class DataError(MedflError):
    """Images, labels or folders that cannot be used."""

    exit_code = 10


class PolicyError(MedflError):
    """Something that the site or the study does not allow."""

    exit_code = 11


class NetworkError(MedflError):
    """Too few sites answered, or a server could not be reached."""

    exit_code = 20


class CredentialError(MedflError):
    """A key or certificate that is missing, expired or unknown."""

    exit_code = 21


class ResourceError(MedflError):
    """Not enough memory, disk or device."""

    exit_code = 30


class VersionError(MedflError):
    """Two releases that do not understand each other. Its text names nothing but releases, so it may leave a site."""

    exit_code = 40


class DivergedError(MedflError):
    """Training produced non-finite values or a collapsed representation."""

    exit_code = 50


class PrivacyError(MedflError):
    """The privacy budget of a site's patients is spent, or nothing can be said of it."""

    exit_code = 60


class InternalError(MedflError):
    """A state that should not occur: a bug, with what is needed to report it."""

    exit_code = 70


def one_of(name: str, got: object, allowed: Iterable[object]) -> None:
    """Raise ConfigError unless the value of the configuration key `name` is one of `allowed`."""
    choices = list(allowed)
    if got not in choices:
        raise ConfigError(f"{name}: got {got!r}, need one of {', '.join(map(str, choices))}.")
