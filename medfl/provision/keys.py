"""Key files and signatures: EC P-384 for Flower's node authentication, Ed25519 for documents and updates."""

import base64
import binascii
import hashlib
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from medfl.errors import CredentialError

SECRET_BYTES = 32
FINGERPRINT_GROUPS = 8
AGAIN = "Restore it from a backup, or make a new one."


def new_node_key(path: Path) -> None:
    """An EC P-384 key in OpenSSH's format, 0600, as Flower's SuperNode wants it; `path`.pub beside it.

    Raises:
        CredentialError: `path` exists: a key is never overwritten.
    """
    key = generate_private_key(SECP384R1())
    _write_pair(
        path,
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        _openssh(key),
    )


def new_signing_key(path: Path) -> None:
    """An Ed25519 key, PKCS8 PEM, 0600; `path`.pub holds the 32 public bytes in base64.

    Raises:
        CredentialError: `path` exists: a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    _write_pair(
        path,
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        public_of(key).encode(),
    )


def new_secret(path: Path) -> None:
    """Random bytes that the processes of one host share, in hexadecimal, 0600.

    Raises:
        CredentialError: `path` exists.
    """
    write_private(path, os.urandom(SECRET_BYTES).hex().encode())


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """
    Raises:
        CredentialError: missing, readable by others, or no Ed25519 key.
    """
    key = _loaded(path, load_pem_private_key)
    if not isinstance(key, Ed25519PrivateKey):
        raise CredentialError(f"{path}: got no Ed25519 key in PEM. {AGAIN}")
    return key


def public_of_node(path: Path) -> str:
    """The public key of a node's private key file, in OpenSSH's format.

    Raises:
        CredentialError: missing, readable by others, or no EC key.
    """
    key = _loaded(path, load_ssh_private_key)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise CredentialError(f"{path}: got no EC key in OpenSSH's format. {AGAIN}")
    return _openssh(key).decode()


def _loaded(path: Path, load: Callable[[bytes, None], object]) -> object:
    """The private key in a file without a password; None where there is none."""
    try:
        return load(private(path).read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None


def public_of(key: Ed25519PrivateKey) -> str:
    """The 32 public bytes in base64."""
    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def sign(key: Ed25519PrivateKey, content: bytes) -> str:
    """The signature in base64."""
    return base64.b64encode(key.sign(content)).decode()


def verify(public: str, content: bytes, signature: str) -> bool:
    """Whether `signature` is that of `content` under the public key, both in base64; False for what is neither."""
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public, validate=True))
        key.verify(base64.b64decode(signature, validate=True), content)
    except (InvalidSignature, binascii.Error, ValueError, TypeError, UnsupportedAlgorithm):
        return False
    return True


def fingerprint(content: bytes) -> str:
    """Eight groups of four hexadecimal digits (128 bits of SHA-256), short enough to compare by phone."""
    digest = hashlib.sha256(content).hexdigest()
    return " ".join(digest[4 * place : 4 * place + 4] for place in range(FINGERPRINT_GROUPS))


def private(path: Path) -> Path:
    """`path`, if only its owner may read it.

    Raises:
        CredentialError: missing, or group or others may read it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CredentialError(f"{path} is missing. Make it with init, or restore it from a backup.") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise CredentialError(f"{path}: got mode {stat.S_IMODE(mode):04o}, need 0600. Run: chmod 600 {path}")
    return path


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that no one else could read at any instant; whole or not at all.

    Raises:
        CredentialError: `path` exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    number = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike a rename, refuses to replace what is there
    except FileExistsError:
        raise CredentialError(f"{path} exists, and a key is never overwritten. Move it away first.") from None
    finally:
        draft.unlink(missing_ok=True)


def write_public(path: Path, public: str) -> None:
    """Write the public key beside the private key `path`."""
    path.with_name(f"{path.name}.pub").write_text(public + "\n")


def _write_pair(path: Path, secret: bytes, public: bytes) -> None:
    write_private(path, secret)
    write_public(path, public.decode())


def _openssh(key: EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
