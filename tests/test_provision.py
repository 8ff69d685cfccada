"""Keys, certificates, documents and the app bundle: what a stranger or an accident changes is refused."""

import contextlib
import hashlib
import json
import ssl
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medfl
from medfl.errors import ConfigError, CredentialError, MedflError, VersionError
from medfl.provision import app, authority, documents, keys
from medfl.provision.documents import Invitation, JoinRequest, registry, today

PASSPHRASE = "a long passphrase"
END = today() + timedelta(days=30)


def request_of(folder: Path, site: str) -> JoinRequest:
    """A site's keys in `folder`, and its request beside them."""
    keys.new_node_key(folder / "node")
    keys.new_signing_key(folder / "signing")
    key = keys.load_signing_key(folder / "signing")
    node = (folder / "node.pub").read_text().strip()
    request = JoinRequest(site, "it@example.org", node, keys.public_of(key), documents.now(), "0.1.0", medfl.PROTOCOL)
    request.write(folder / "request.json", key)
    return request


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    keys.new_signing_key(folder / "study")
    authority.create(folder, name="a study", names=["127.0.0.1", "lead.example"], until=END, passphrase=PASSPHRASE)
    return folder


def invitation(place: Path, **changed: object) -> Invitation:
    facts = {
        "study_id": "chest-0a1b2c3d",
        "name": "Chest",
        "address": "lead.example",
        "port": 8443,
        "until": END.isoformat(),
        "created": documents.now(),
        "medfl": medfl.__version__,
        "protocol": medfl.PROTOCOL,
        "config": "seed: 0\n",
        "authority": (place / "ca.crt").read_text(),
        "app": b"bundle",
        "study_key": keys.public_of(keys.load_signing_key(place / "study")),
    }
    return Invitation(**facts | changed)


def test_a_private_key_is_for_its_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    for make in (keys.new_node_key, keys.new_signing_key, keys.new_secret):
        path = tmp_path / make.__name__
        make(path)
        before = path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(CredentialError, match="never overwritten"):
            make(path)
        assert path.read_bytes() == before
        assert sorted(tmp_path.glob(".*")) == []
    (tmp_path / "new_signing_key").chmod(0o640)
    with pytest.raises(CredentialError, match="chmod 600"):
        keys.load_signing_key(tmp_path / "new_signing_key")


@settings(max_examples=200)
@given(st.text() | st.binary().map(repr), st.binary(), st.text())
def test_verify_refuses_whatever_is_no_signature(public: str, content: bytes, signature: str) -> None:
    assert not keys.verify(public, content, signature)


@pytest.mark.parametrize("name", ["127.0.0.1", "lead.example", "localhost"])
def test_the_certificate_is_good_for_the_coordinators_names_alone(place: Path, name: str) -> None:
    assert handshake(place, name)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)mismatch|not valid for"):
        handshake(place, "other.example")


def handshake(place: Path, name: str) -> bool:
    """TLS 1.2 or later in memory, as a site does it: the study's authority alone is trusted."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(place / "server.crt", place / "server.key")
    client = ssl.create_default_context(cafile=str(place / "ca.crt"))
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)]
    done = set()
    while len(done) < 2:
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
    return True


def test_renewing_changes_the_servers_certificate_and_nothing_else(place: Path) -> None:
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    authority.renew(place, names=["127.0.0.1", "lead.example"], passphrase=PASSPHRASE)
    assert {n for n, content in before.items() if (place / n).read_bytes() != content} == {"server.crt"}
    assert handshake(place, "lead.example")
    assert 0 < authority.days_left(place / "server.crt") < 397
    with pytest.raises(CredentialError, match="passphrase"):
        authority.renew(place, names=["127.0.0.1"], passphrase="another one")
    assert b"ENCRYPTED" in (place / "ca.key").read_bytes()


def test_documents_come_back_as_they_were_written(place: Path, tmp_path: Path) -> None:
    sent = invitation(place, app=bytes(range(256)), name="Brüche")
    sent.write(tmp_path / "i.json", keys.load_signing_key(place / "study"))
    assert Invitation.read(tmp_path / "i.json") == sent
    request = request_of(tmp_path / "a", "hospital-a")
    assert JoinRequest.read(tmp_path / "a" / "request.json") == request


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_changed_document_is_refused(place: Path, data: st.DataObject) -> None:
    sent = invitation(place)
    path = place / "whole.json"
    if not path.exists():
        sent.write(path, keys.load_signing_key(place / "study"))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MedflError):
        assert Invitation.parse(bytes(content)) == Invitation.parse(path.read_bytes())  # white space


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"until": (today() - timedelta(days=1)).isoformat()}, CredentialError, "ended on"),
        ({"protocol": medfl.PROTOCOL + 1}, VersionError, "same release"),
        ({"study_id": "../../etc"}, ConfigError, "study_id"),
        ({"address": "host; include /etc/passwd"}, ConfigError, "address"),
        ({"port": 0}, ConfigError, "port"),
        ({"authority": "none"}, ConfigError, "certificate"),
        ({"name": "a\x1b[2J"}, ConfigError, "printable"),
    ],
)
def test_a_signature_does_not_make_a_document_usable(
    place: Path, tmp_path: Path, change: dict[str, object], error: type[MedflError], words: str
) -> None:
    invitation(place, **change).write(tmp_path / "i.json", keys.load_signing_key(place / "study"))
    with pytest.raises(error, match=words):
        Invitation.read(tmp_path / "i.json")


def test_a_document_of_other_keys_types_or_sizes_is_refused(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "i.json"
    invitation(place).write(path, keys.load_signing_key(place / "study"))
    tree = json.loads(path.read_text())
    texts = [json.dumps(tree | extra) for extra in ({"more": 1}, {"port": True}, {"port": "8443"}, {"app": "%"})]
    texts += [path.read_text().replace('"port": 8443', '"port": 1, "port": 8443'), "[" * 100_000, "\ud800", "[]"]
    texts += [json.dumps({k: v for k, v in tree.items() if k != "signature"}), json.dumps(tree | {"name": "\ud800"})]
    for text in texts:
        with pytest.raises(ConfigError):
            Invitation.parse(text.encode(errors="surrogatepass"))
    with pytest.raises(CredentialError, match="another study_key"):
        invitation(place, study_key="AAAA").write(path, keys.load_signing_key(place / "study"))
    path.write_bytes(b" " * (JoinRequest.limit + 1))
    with pytest.raises(ConfigError, match="at most 64000"):
        JoinRequest.read(path)


def test_the_registry_holds_who_is_approved_and_not_revoked(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        request = request_of(tmp_path / "sites" / name, name)
        if name != "c":
            record = {"site": name, "request": request.digest, "at": documents.now()}
            (tmp_path / "sites" / name / "approved.json").write_text(json.dumps(record))
    assert set(registry(tmp_path)) == {"a", "b"}
    (tmp_path / "sites" / "b" / "revoked.json").write_text("{}")
    assert set(registry(tmp_path)) == {"a"}
    (tmp_path / "sites" / "a" / "request.json").write_bytes((tmp_path / "sites" / "c" / "request.json").read_bytes())
    with pytest.raises(ConfigError, match="not the request that was approved"):
        registry(tmp_path)


def test_the_bundle_is_flowers_own_and_the_same_as_the_installation(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    app.write_app(tmp_path / "app")
    fab = app.build_fab(tmp_path / "app")
    assert fab == build_fab_from_disk(tmp_path / "app")
    assert hashlib.sha256(fab).hexdigest() == app.app_digest()
    assert app.differences(fab) == []
    assert app.version_of(fab) == medfl.__version__
    with pytest.raises(ConfigError, match="exists"):
        app.write_app(tmp_path / "app")


def test_every_difference_from_the_installation_is_named() -> None:
    mine = app.release()
    changed = {name: content for name, content in mine.items() if name != "client/app.py"}
    changed |= {"server/app.py": mine["server/app.py"] + b" ", "medfl/more.py": b""}
    assert app.differences(app.bundle(changed)) == ["client/app.py", "medfl/more.py", "server/app.py"]
    with pytest.raises(ConfigError, match="leaves its folder"):
        app.contents(app.bundle(mine | {"../outside.py": b""}))
    with pytest.raises(ConfigError, match="no app bundle"):
        app.contents(b"PK not really")
    with pytest.raises(ConfigError, match="no app bundle"):
        app.contents(app.bundle(mine).replace(b"Federated self-supervised", b"Federated self-Supervised"))
