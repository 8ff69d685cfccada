"""A study's own certificate authority: its key is encrypted, and it signs nothing but the coordinator's certificate."""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medfl.errors import ConfigError, CredentialError
from medfl.provision.keys import private, write_private

LEAST_PASSPHRASE = 8
LOOPBACK = ("localhost", "127.0.0.1")
SKEW = timedelta(minutes=5)  # of the sites' clocks
AFTER_END = timedelta(days=90)  # the authority outlives the study by as much, for a report that is late
SERVER_DAYS = timedelta(days=397)  # the longest that public authorities give


def create(folder: Path, *, name: str, names: Sequence[str], until: date, passphrase: str) -> None:
    """Write ca.crt, ca.key (encrypted), server.crt and server.key into `folder`.

    Args:
        names: DNS names and IP addresses of the coordinator; those of loopback are added.
        until: the study's last day.

    Raises:
        ConfigError: the passphrase is too short.
        CredentialError: the folder holds a key already.
    """
    if len(passphrase) < LEAST_PASSPHRASE:
        raise ConfigError(f"passphrase: got {len(passphrase)} characters, need at least {LEAST_PASSPHRASE}.")
    key = generate_private_key(SECP384R1())
    certificate = _root(key, name, until)
    secret = BestAvailableEncryption(passphrase.encode())
    write_private(folder / "ca.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
    _write(folder / "ca.crt", certificate)
    server = generate_private_key(SECP384R1())
    write_private(folder / "server.key", server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    renew(folder, names=names, passphrase=passphrase)


def renew(folder: Path, *, names: Sequence[str], passphrase: str) -> None:
    """Replace server.crt; the authority, the server's key and all other files stay as they are.

    Raises:
        CredentialError: a key is missing or readable by others, the passphrase is wrong, or the authority has expired.
    """
    root = certificate(folder / "ca.crt")
    key = _load(folder / "ca.key", passphrase)
    now = datetime.now(UTC)
    if now >= root.not_valid_after_utc:
        raise CredentialError(f"the study's authority expired on {root.not_valid_after_utc:%F}. Start a new study.")
    public = _load(folder / "server.key", None).public_key()
    wanted = list(dict.fromkeys([*names, *LOOPBACK]))
    builder = (
        _builder(names[0], root.subject, now, min(now + SERVER_DAYS, root.not_valid_after_utc))
        .public_key(public)
        .add_extension(x509.SubjectAlternativeName([_general(item) for item in wanted]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    _write(folder / "server.crt", builder.sign(key, SHA384()))


def certificate(path: Path) -> x509.Certificate:
    """
    Raises:
        CredentialError: missing or no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise CredentialError(f"{path}: got no certificate in PEM. Restore it from a backup.") from None


def days_left(path: Path) -> float:
    """Days until a certificate expires; negative once it has. Raises as `certificate` does."""
    return (certificate(path).not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86400


def names_in(path: Path) -> list[str]:
    """The DNS names and IP addresses that a certificate is for; raises as `certificate` does."""
    names = certificate(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(item.value) for item in names]


def _root(key: EllipticCurvePrivateKey, name: str, until: date) -> x509.Certificate:
    subject = _subject(f"medfl study {name}")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    end = datetime.combine(until, time(), UTC) + AFTER_END
    return (
        _builder(f"medfl study {name}", subject, datetime.now(UTC), end)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA384())
    )


def _builder(common: str, issuer: x509.Name, now: datetime, end: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(common))
        .issuer_name(issuer)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(end)
    )


def _subject(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _load(path: Path, passphrase: str | None) -> EllipticCurvePrivateKey:
    content = private(path).read_bytes()
    try:
        key = load_pem_private_key(content, None if passphrase is None else passphrase.encode())
    except (ValueError, TypeError):
        what = "the key is damaged" if passphrase is None else "the passphrase is wrong, or the key is damaged"
        raise CredentialError(f"{path}: {what}. Try again, or restore it from a backup.") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise CredentialError(f"{path}: got another kind of key than medfl makes. Restore it from a backup.")
    return key


def _write(path: Path, content: x509.Certificate) -> None:
    from medfl.files import write_bytes  # brings torch along, which readers do without

    write_bytes(path, content.public_bytes(Encoding.PEM))
