"""The two signed documents of a study: the invitation that every site gets, and a site's request to join."""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from cryptography.x509 import load_pem_x509_certificate

from medfl import PROTOCOL, __version__
from medfl.errors import ConfigError, CredentialError, MedflError, VersionError
from medfl.names import ARMS
from medfl.provision.keys import public_of, sign, verify

SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
STUDY_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}-[0-9a-f]{8}")
PORTS = range(1, 65536)
LINE = 200  # characters of a name or a contact: they are printed


@dataclass(frozen=True)
class Document:
    """A JSON file signed by a key that it names itself; whose key that is, people compare by fingerprint."""

    kind: ClassVar[str]
    limit: ClassVar[int]  # bytes
    signer: ClassVar[str]  # the field with the signer's public key

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON without the signature."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """What is signed: sorted keys, no spaces, UTF-8."""
        return _canonical(self._plain())

    def write(self, path: Path, key: Ed25519PrivateKey) -> None:
        """
        Raises:
            CredentialError: `key` is not the one that the document names.
            ResourceError: the disk is full.
        """
        from medfl.files import write_bytes  # brings torch along, which readers do without

        if public_of(key) != getattr(self, self.signer):
            raise CredentialError(f"the {self.kind} names another {self.signer} than the key that signs it.")
        signed = self._plain() | {"signature": sign(key, self.canonical())}
        write_bytes(path, json.dumps(signed, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            ConfigError: missing, too large, damaged, or with unknown, missing or mistyped keys.
            CredentialError: expired.
            VersionError: of a release that speaks another protocol.
        """
        if not path.is_file():
            raise ConfigError(f"{path} is no file. Give the {cls.kind} that you were sent.")
        if path.stat().st_size > cls.limit:
            raise ConfigError(f"{path}: got {path.stat().st_size} bytes, need at most {cls.limit}: no {cls.kind}.")
        try:
            return cls.parse(path.read_bytes())
        except MedflError as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """The document in a file's bytes; raises as `read` does."""
        try:
            tree = json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"no valid JSON ({error}). Ask for the {cls.kind} again.") from None
        if not isinstance(tree, dict) or tree.get("document") != cls.kind:
            raise ConfigError(f"this is no {cls.kind}. Ask for the file again.")
        cls._check_protocol(tree)
        signature = tree.pop("signature", None)
        document = cls(**cls._typed({name: value for name, value in tree.items() if name != "document"}))
        signed = isinstance(signature, str) and verify(getattr(document, cls.signer), _canonical(tree), signature)
        if not signed or _canonical(tree) != document.canonical():
            raise ConfigError(f"the signature does not fit: the {cls.kind} was damaged or changed. Ask for it again.")
        document.check()
        return document

    def check(self) -> None:
        """What types do not say; raises as `read` does."""

    @classmethod
    def _check_protocol(cls, tree: Mapping[str, Any]) -> None:
        """Before the keys, since another release may have others."""
        if type(tree.get("protocol")) is int and tree["protocol"] != PROTOCOL:
            made = re.sub(r"[^\w.+-]", "?", str(tree.get("medfl")))[:LINE]
            raise VersionError(
                f"the {cls.kind} was made by medfl {made} (protocol {tree['protocol']}), this is medfl {__version__} "
                f"(protocol {PROTOCOL}). Install the same release on both sides."
            )

    @classmethod
    def _typed(cls, tree: Mapping[str, Any]) -> dict[str, Any]:
        wanted = {field.name: field.type for field in fields(cls)}
        if odd := sorted(wanted.keys() ^ tree.keys()):
            state = "no" if odd[0] in wanted else "an unknown"
            raise ConfigError(f"the {cls.kind} has {state} key {odd[0][:LINE]!r}. Ask for it again.")
        return {name: _value(tree[name], wanted[name], f"{cls.kind}: {name}") for name in wanted}

    def _plain(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        coded = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in values.items()}
        return {"document": self.kind} | coded


@dataclass(frozen=True)
class Invitation(Document):
    """What a study is and where its coordinator is: everything that a site approves. No secrets."""

    kind = "invitation"
    limit = 32_000_000
    signer = "study_key"

    study_id: str
    name: str
    address: str
    port: int
    until: str  # the last day, ISO
    created: str
    medfl: str
    protocol: int
    config: str  # the resolved study, YAML
    authority: str  # the study's root certificate, PEM
    app: bytes  # the bundle that sites run
    study_key: str  # Ed25519, base64: signs this and every order

    @property
    def app_digest(self) -> str:
        return hashlib.sha256(self.app).hexdigest()

    @property
    def config_digest(self) -> str:
        return hashlib.sha256(self.config.encode()).hexdigest()

    def check(self) -> None:
        if not STUDY_ID.fullmatch(self.study_id):
            raise ConfigError(f"study_id: got {self.study_id[:LINE]!r}, need such as chest-0a1b2c3d.")
        for label in ("name", "created", "medfl"):
            check_line(label, getattr(self, label))
        try:
            load_pem_x509_certificate(self.authority.encode())
        except ValueError:
            raise ConfigError("authority: got no certificate in PEM. Ask for the invitation again.") from None
        if self.port not in PORTS:
            raise ConfigError(f"port: got {self.port}, need 1 to {PORTS[-1]}.")
        check_address(self.address)
        if today() > last_day(self.until):
            raise CredentialError(
                f"the study {self.name} ended on {self.until}. Ask the study lead for a new invitation."
            )


@dataclass(frozen=True)
class JoinRequest(Document):
    """A site's public keys; signed with its signing key, which proves that the site holds it."""

    kind = "request"
    limit = 64_000
    signer = "signing_key"

    site: str
    contact: str
    node_key: str  # EC P-384, OpenSSH
    signing_key: str  # Ed25519, base64
    created: str
    medfl: str
    protocol: int

    def check(self) -> None:
        check_site(self.site)
        for label in ("contact", "created", "medfl"):
            check_line(label, getattr(self, label))
        try:
            node = load_ssh_public_key(self.node_key.encode())
        except (ValueError, UnsupportedAlgorithm):
            node = None
        if not isinstance(node, EllipticCurvePublicKey) or not isinstance(node.curve, SECP384R1):
            raise ConfigError("node_key: got no EC P-384 public key in OpenSSH's format. Make it with medfl site init.")


def check_site(name: str) -> None:
    """
    Raises:
        ConfigError: no site name.
    """
    if not SITE_NAME.fullmatch(name) or name in ARMS:
        need = f"need 1 to 40 small letters, digits or hyphens, such as hospital-a, and no arm's ({', '.join(ARMS)})"
        raise ConfigError(f"site: got {name[:LINE]!r}, {need}.")


def check_line(key: str, text: str) -> None:
    """
    Raises:
        ConfigError: more than one short printable line.
    """
    if len(text) > LINE or not text.isprintable():
        raise ConfigError(f"{key}: got {len(text)} characters, need one printable line of at most {LINE}.")


def check_address(address: str) -> None:
    """
    Raises:
        ConfigError: no DNS name and no IP address.
    """
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9a-fA-F:]*:[0-9a-fA-F:.]+", address):
        raise ConfigError(f"address: got {address[:LINE]!r}, need a DNS name or an IP address without a port.")


def last_day(text: str) -> date:
    """
    Raises:
        ConfigError: no ISO date.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"until: got {text[:LINE]!r}, need a date such as 2027-12-31.") from None


def today() -> date:
    """The date in UTC, so that a study ends for all sites at once."""
    return datetime.now(UTC).date()


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def registry(folder: Path) -> dict[str, JoinRequest]:
    """The sites of a coordinator's folder that are approved and not revoked, by name; raises as `standing` does."""
    places = sorted((folder / "sites").glob("*"))
    return {place.name: request for place in places if (request := standing(place))}


def standing(place: Path) -> JoinRequest | None:
    """What is approved of the site with this folder at the coordinator; None where nothing is, or it is revoked.

    Raises:
        ConfigError: a request is damaged, or is not the one that was approved.
    """
    if (place / "revoked.json").exists() or not (place / "approved.json").is_file():
        return None
    return approved(place)


def approved(place: Path) -> JoinRequest:
    """The approved request of one site's folder at the coordinator; raises as `standing` does."""
    request = JoinRequest.read(place / "request.json")
    try:
        digest = json.loads((place / "approved.json").read_bytes())["request"]
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        raise ConfigError(f"{place}/approved.json is damaged. Restore it from a backup.") from None
    if request.site != place.name or digest != request.digest:
        raise ConfigError(
            f"{place}/request.json is not the request that was approved. Approve the site's request again."
        )
    return request


def _canonical(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _value(value: object, kind: object, at: str) -> str | int | bytes:
    if kind is int and type(value) is int:
        return value
    if kind is str and isinstance(value, str) and value.encode(errors="ignore").decode() == value:
        return value  # JSON can write half characters, which UTF-8 cannot
    if kind is bytes and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise ConfigError(f"{at}: got no base64. Ask for the file again.") from None
    raise ConfigError(f"{at}: got a {type(value).__name__}, need a {getattr(kind, '__name__', kind)}.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may choose differently between two values of one key."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key is there twice")
    return tree


def _refuse(name: str) -> None:
    raise ValueError(f"got {name}")
