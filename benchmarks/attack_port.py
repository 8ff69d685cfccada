"""What somebody outside can try at a coordinator's public port, and at a site's connection, with real processes."""

import contextlib
import gzip
import ipaddress
import os
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fault_rig import Rig, processes

from medfl.deployment import programs, status
from medfl.provision.keys import new_node_key
from tests.deployment.real import SITES, free_ports, wait_until

ONLINE = "SuperNode ID"  # what Flower's node says once the coordinator lets it in
PUBLIC = "127.0.0.2"  # the proxy itself; sites reach it through the rig
TRICKS = (  # disguises of a path that is refused
    "/v1/fleet/../control/{}", "/v1/fleet/%2e%2e/control/{}", "//v1/control/{}", "/v1//control/{}", "/V1/CONTROL/{}",
    "/v1/fleet/..;/control/{}", "/v1/control/{}?x=/v1/fleet/pull", "/v1/control/{}#/v1/fleet/", "/v1/./control/{}",
    "/v1/fleet%2f..%2fcontrol/{}", "/v1/fleet/x/../../control/{}", "/v1/fleet/%252e%252e/control/{}",
    "/v1/fleet\\..\\control/{}",
)  # fmt: skip
HEADERS: tuple[dict[str, str], ...] = (
    {}, {"X-Original-URL": "/v1/control/list-runs"}, {"X-Forwarded-Host": "localhost"}, {"Host": "localhost:8000"},
    {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings"},
)  # fmt: skip
Count = tuple[int, int]  # tried, accepted


def interfaces(rig: Rig) -> Count:
    """Every path that the SuperLink has, and disguises, through the public port with the CA certificate alone."""
    ca = str(rig.lead / "authority" / "ca.crt")
    link = f"https://127.0.0.1:{rig.link_port}"
    inside = httpx.get(f"{link}/openapi.json", verify=ssl.create_default_context(cafile=ca)).json()
    paths = sorted(inside["paths"])
    control = [path.rpartition("/")[2] for path in paths if "/control/" in path]
    assert len(control) > 5, paths
    asked = [*paths, "/docs", "/redoc", "/openapi.json", "/", "/metrics", "/.git/config"]
    asked += [trick.format(name) for trick in TRICKS for name in control]
    tried = accepted = 0
    with httpx.Client(verify=_loose(ca), base_url=f"https://{PUBLIC}:{rig.port}") as client:
        for path in asked:
            for method in ("GET", "POST"):
                for extra in HEADERS if path in paths else HEADERS[:1]:
                    tried += 1
                    answer = client.request(method, path, headers=extra, content=b"" if method == "POST" else None)
                    accepted += answer.status_code < 400 and path != "/health"
    return tried, accepted


def _loose(ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.check_hostname = False  # the certificate is for the sites' address
    return context


def downgrades(rig: Rig) -> Count:
    """Older protocols, weak ciphers, and none at all."""
    versions = (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1)
    ciphers = ("AES128-SHA", "ECDHE-ECDSA-AES128-SHA256", "ECDHE-RSA-AES256-GCM-SHA384", "NULL", "DHE")
    contexts = [_only(version, "ALL") for version in versions]
    contexts += [_only(ssl.TLSVersion.TLSv1_2, name) for name in ciphers]
    plain = (b"GET /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    spoken = sum(_handshake(rig, context) for context in contexts)
    assert _handshake(rig, _only(ssl.TLSVersion.TLSv1_3, "ALL")), "not even TLS 1.3 is spoken"
    for start in (*plain, b"\x16\x03\x00" + bytes(50)):
        with socket.create_connection((PUBLIC, rig.port), 5) as line, contextlib.suppress(OSError):
            line.settimeout(15)
            line.sendall(start)
            spoken += line.recv(200).startswith(b"HTTP/1.1 2")
    return len(contexts) + len(plain) + 1, spoken


def _only(version: ssl.TLSVersion, ciphers: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with warnings.catch_warnings(action="ignore"):  # old versions are deprecated
        context.minimum_version = context.maximum_version = version
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    return context


def _handshake(rig: Rig, context: ssl.SSLContext) -> bool:
    try:
        with socket.create_connection((PUBLIC, rig.port), 5) as plain, context.wrap_socket(plain) as line:
            return line.version() is not None
    except OSError:
        return False


def strangers(rig: Rig) -> Count:
    """Nodes that were never approved, or were revoked: none comes online; one that is approved does."""
    rig.up()
    wait_until(lambda: len(status.read(rig.lead)["here"]) == len(SITES), 120, "all sites online")
    lines = []
    for name, key in (("unregistered", None), ("revoked", rig.places["gamma"] / "keys" / "node")):
        if name == "revoked":
            rig.leave("gamma")
            rig.study.medfl("study", "revoke", rig.lead, "gamma", "--why", "a test")
            time.sleep(8)  # the keeper's next look
        lines.append(_node_says(rig, key))
    accepted = sum(ONLINE in text for text in lines)
    assert all(text for text in lines)
    said = _node_says(rig, _stopped(rig, "beta"))
    assert ONLINE in said, f"not even an approved node comes online: {said}"
    rig.join("beta")
    return len(lines), accepted


def _stopped(rig: Rig, name: str) -> Path:
    rig.leave(name)
    wait_until(lambda: name not in status.read(rig.lead)["here"], 150, f"{name} offline")
    return rig.places[name] / "keys" / "node"


def _node_says(rig: Rig, key: Path | None, *, ca: Path | None = None, port: int = 0, seconds: float = 90.0) -> str:
    """The log of Flower's SuperNode with this key, or a new one."""
    with tempfile.TemporaryDirectory() as place:
        if key is None:
            key = Path(place) / "node"
            new_node_key(key)
        (own,) = free_ports(1)
        words = [
            programs.program("flower-supernode"), "--root-certificates", str(ca or rig.lead / "authority" / "ca.crt"),
            "--superlink", f"127.0.0.1:{port or rig.port}", "--auth-supernode-private-key", str(key),
            "--isolation", "process", "--host", "127.0.0.1", "--port", str(own),
        ]  # fmt: skip
        log = Path(place) / "log"
        with log.open("wb") as out:
            popen = subprocess.Popen(words, stdout=out, stderr=out, env=os.environ | programs.environment(Path(place)))
            end = time.monotonic() + seconds
            while popen.poll() is None and ONLINE not in log.read_text(errors="replace") and time.monotonic() < end:
                time.sleep(0.5)
            popen.kill()
            popen.wait()
        return log.read_text(errors="replace")


def impostors(rig: Rig) -> Count:
    """Coordinators that are not the study's: of another authority, with another name, expired. No node sends a byte."""
    tried = accepted = 0
    for kind in ("another authority", "another name", "expired", "self-signed"):
        with tempfile.TemporaryDirectory() as place, _server(Path(place), kind) as (port, ca, got):
            said = _node_says(rig, None, ca=ca, port=port, seconds=15)
            tried += 1
            accepted += bool(got)
            assert "certificate" in said.lower() or "ssl" in said.lower() or "tls" in said.lower(), said[-400:]
    with tempfile.TemporaryDirectory() as place, _server(Path(place), "right") as (port, ca, got):
        _node_says(rig, None, ca=ca, port=port, seconds=15)
        assert got, "not even the right coordinator is spoken to"
    return tried, accepted


@contextlib.contextmanager
def _server(place: Path, kind: str) -> Iterator[tuple[int, Path, list[bytes]]]:
    """A TLS server with a certificate of its own: port, the authority that sites trust, and what it was sent."""
    trusted, ca_key = _authority("study")
    other, other_key = _authority("study")
    signer, key = (other, other_key) if kind == "another authority" else (trusted, ca_key)
    own = ec.generate_private_key(ec.SECP256R1())
    name = "elsewhere.example" if kind == "another name" else "127.0.0.1"
    until = datetime.now(UTC) + timedelta(days=-1 if kind == "expired" else 30)
    made = _certificate("server", own, signer.subject, key, until, name)
    if kind == "self-signed":
        made = _certificate("server", own, made.subject, own, until, name)
    (place / "ca.crt").write_bytes(trusted.public_bytes(serialization.Encoding.PEM))
    (place / "server.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (place / "server.key").write_bytes(
        own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "server.crt", place / "server.key")
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as door:

        def serve() -> None:
            while True:
                try:
                    plain, _ = door.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as line:
                    if part := line.recv(1000):
                        got.append(part)

        threading.Thread(target=serve, daemon=True).start()
        yield door.getsockname()[1], place / "ca.crt", got


def _authority(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    until = datetime.now(UTC) + timedelta(days=30)
    return _certificate(name, key, subject, key, until, None), key


def _certificate(
    name: str, own: ec.EllipticCurvePrivateKey, issuer: x509.Name, signer: ec.EllipticCurvePrivateKey, until: datetime,
    host: str | None,
) -> x509.Certificate:  # fmt: skip
    start = datetime.now(UTC) - timedelta(days=60)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(issuer, subject, own.public_key(), x509.random_serial_number(), start, until)
    made = made.add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
    if host:
        named = x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
        made = made.add_extension(x509.SubjectAlternativeName([named]), critical=False)
    return made.sign(signer, hashes.SHA256())


def bodies(rig: Rig) -> Count:
    """Requests that are too large, lie about their size, or unpack to much: none is taken, and memory stays."""
    ca = str(rig.lead / "authority" / "ca.crt")
    zipped = gzip.compress(bytes(200_000_000))
    attempts = [
        {"content": bytes(70_000_000)},
        {"content": zipped, "headers": {"Content-Encoding": "gzip"}},
        {"content": b"x" * 100, "headers": {"X-Large": "y" * 100_000}},
        {"content": b"\xff" * 1_000_000},
        {"content": b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 1000},
    ]
    tried = accepted = 0
    before = _memory(rig)
    with httpx.Client(verify=_loose(ca), base_url=f"https://{PUBLIC}:{rig.port}", timeout=30) as client:
        for path in ("/v1/fleet/activate-node", "/v1/fleet/push-object", "/v1/fleet/push-messages"):
            for given in attempts:
                tried += 1
                with contextlib.suppress(httpx.HTTPError):
                    accepted += client.post(path, **given).status_code < 400
    for lie in (b"Content-Length: 10000000000000", b"Content-Length: -1", b"Content-Length: 5\r\nContent-Length: 50",
                b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked, x"):  # fmt: skip
        tried += 1
        with (
            socket.create_connection((PUBLIC, rig.port), 5) as plain,
            contextlib.suppress(OSError),
            _loose(ca).wrap_socket(plain) as line,
        ):
            line.settimeout(30)
            line.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\n" + lie + b"\r\n\r\n7fffffffffffffff\r\n")
            accepted += line.recv(200).startswith(b"HTTP/1.1 2")
    grown = _memory(rig) - before
    assert grown < 64e6, f"{grown / 1e6:.0f} MB more"
    return tried, accepted


def _memory(rig: Rig) -> int:
    """Largest resident memory of the SuperLink so far, bytes."""
    (pid, *_) = processes(rig.lead, "flower-superlink")
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmHWM")))


def half_open(rig: Rig) -> Count:
    """500 connections from another address that never finish: a run beside them ends as always, and all are closed."""
    lines = []
    for _ in range(500):
        line = socket.socket()
        line.bind(("127.0.0.3", 0))
        with contextlib.suppress(OSError):
            line.connect((PUBLIC, rig.port))
            line.sendall(b"\x16\x03\x01")
        lines.append(line)
    rig.begin()
    assert rig.end() == "finished"
    assert not rig.lost()
    assert rig.encoder() == rig.expected(rig.lost())
    still = 0
    for line in lines:
        line.settimeout(0.05)
        try:
            still += line.recv(1) != b""
        except TimeoutError:
            still += 1
        except OSError:
            pass
        line.close()
    return len(lines), still
