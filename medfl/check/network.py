"""The way to the coordinator: name, port, TLS against the study's own authority, speed, and the two clocks."""

import base64
import http.client
import os
import socket
import ssl
import time
import urllib.parse
import urllib.request
from contextlib import closing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from medfl.check.finding import Finding, State
from medfl.provision.documents import Invitation
from medfl.provision.keys import fingerprint

TIMEOUT = 10.0  # s
HEALTH = "/health"  # what the proxy answers by itself
SKEW_WARN, SKEW_FAIL = 2.0, 4.0  # s; the coordinator refuses a node whose clock is 5 s ahead
EXPIRES_SOON, EXPIRES_NOW = 30, 7  # days
BODY = 4_000_000  # bytes sent to measure the speed; the coordinator throws them away
PATIENCE = 20.0  # s for that
SLOW = 125_000  # bytes per second: 1 Mbit/s

Found = tuple[list[Finding], float | None]


def findings(invitation: Invitation | None, *, offline: bool) -> Found:
    """Also the bytes per second on the way up, None where they were not measured."""
    if offline or invitation is None:
        why = "--offline was given" if offline else "there is no invitation to a study yet"
        fix = "medfl site check, with network and an invitation"
        both = (("clock", "skew"), ("network", "coordinator"))
        return [Finding(g, n, "warn", f"Not checked: {why}.", "", fix, {"checked": 0}) for g, n in both], None
    unknown = Finding("clock", "skew", "warn", "Not checked: no connection.", "", "See the network.", {"checked": 0})
    found = [_proxy(invitation)]
    if not _proxy_of(invitation):
        found.append(_name(invitation))
        if found[-1].state == "fail":
            return [*found, unknown], None
    try:
        connection = _connection(invitation)
        connection.connect()
    except (OSError, http.client.HTTPException) as error:
        return [*found, _refused(invitation, error), unknown], None
    with closing(connection):
        found += _certificates(connection.sock, invitation)
        found.append(_clock(connection))
        speed = _speed(invitation)
        return [*found, _throughput(speed)], speed


def _context(invitation: Invitation) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=invitation.authority)
    return context


def _proxy_of(invitation: Invitation) -> str:
    """The proxy that a node's connection would take, as it takes them from the environment."""
    if urllib.request.proxy_bypass(invitation.address):
        return ""
    proxies = urllib.request.getproxies()
    return proxies.get("https", "") or proxies.get("all", "")


def _connection(invitation: Invitation) -> http.client.HTTPSConnection:
    context, proxy = _context(invitation), _proxy_of(invitation)
    if not proxy:
        return http.client.HTTPSConnection(invitation.address, invitation.port, context=context, timeout=TIMEOUT)
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    through = http.client.HTTPSConnection(parts.hostname or "", parts.port or 3128, context=context, timeout=TIMEOUT)
    login = f"{urllib.parse.unquote(parts.username or '')}:{urllib.parse.unquote(parts.password or '')}"
    headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if parts.username else {}
    through.set_tunnel(invitation.address, invitation.port, headers)
    return through


def _proxy(invitation: Invitation) -> Finding:
    named = sorted({name.upper() for name in os.environ if name.lower() in ("https_proxy", "all_proxy", "http_proxy")})
    counts = {"variables": len(named)}
    if not named:
        return Finding("network", "proxy", "pass", "No proxy is set: the node connects directly.", counts=counts)
    if not _proxy_of(invitation):
        return Finding("network", "proxy", "pass", "A proxy is set, and not for the coordinator.", counts=counts)
    why = "The proxy must let the connection through unopened: one that inspects TLS breaks it."
    fix = f"If it fails, add {invitation.address} to NO_PROXY, or ask for an exception."
    return Finding("network", "proxy", "warn", f"Connects through a proxy ({', '.join(named)}).", why, fix, counts)


def _name(invitation: Invitation) -> Finding:
    try:
        addresses = {str(row[4][0]) for row in socket.getaddrinfo(invitation.address, invitation.port)}
    except OSError:
        what = f"The name {invitation.address} is not known here."
        fix = "Ask the network's administrators to resolve it, or the study lead for the right one."
        return Finding("network", "name", "fail", what, "Without its address nothing can connect.", fix)
    what = f"{invitation.address} is {', '.join(sorted(addresses))}"
    return Finding("network", "name", "pass", what, counts={"addresses": len(addresses)})


def _refused(invitation: Invitation, error: Exception) -> Finding:
    place = f"{invitation.address} port {invitation.port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        why = "The server that answered cannot prove that it belongs to this study: perhaps a proxy stands between."
        fix = "Compare the fingerprints with the study lead by phone. Exempt the address from TLS inspection."
        what = f"{place}: the certificate is not the study's ({error.verify_message})."
        return Finding("network", "TLS", "fail", what, why, fix)
    if isinstance(error, ssl.SSLError):
        fix = "Ask the study lead for address and port, and the administrators about filters."
        return Finding("network", "TLS", "fail", f"{place} does not speak TLS.", "Only TLS is used.", fix)
    reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", "") or str(error)
    fix = f"Ask the administrators to allow outgoing TCP to {place}. Is the coordinator up?"
    return Finding("network", "port", "fail", f"{place}: {reason}.", "This is the only connection needed.", fix)


def _certificates(sock: ssl.SSLSocket, invitation: Invitation) -> list[Finding]:
    peer, server = sock.getpeercert() or {}, sock.getpeercert(binary_form=True) or b""
    root = ssl.PEM_cert_to_DER_cert(invitation.authority)
    what = f"{sock.version()}; authority {fingerprint(root)}; server {fingerprint(server)}"
    chain = Finding("network", "TLS", "pass", what, "Compare the authority's fingerprint by phone, once.")
    days = (ssl.cert_time_to_seconds(str(peer["notAfter"])) - time.time()) / 86400
    state: State = "pass" if days > EXPIRES_SOON else "warn" if days > EXPIRES_NOW else "fail"
    fix = "" if state == "pass" else "Ask the study lead to renew it (medfl study renew). Nothing changes here."
    why = "" if state == "pass" else "With an expired certificate no site can connect."
    what = f"The coordinator's certificate is good for {days:.0f} more days."
    return [chain, Finding("network", "certificate", state, what, why, fix, {"days": int(days)})]


def skew(before: float, after: float, date: str) -> float:
    """Seconds by which this clock is ahead of the server's, whose header `date` has whole seconds cut off."""
    return (before + after) / 2 - (parsedate_to_datetime(date).timestamp() + 0.5)


def _clock(connection: http.client.HTTPSConnection) -> Finding:
    date = None
    with suppress(OSError, http.client.HTTPException, ValueError):
        before = time.time()
        connection.request("GET", HEALTH)
        answer = connection.getresponse()
        after = time.time()
        answer.read()
        date = answer.getheader("Date")
    if date is None:
        return Finding("clock", "skew", "warn", "Not checked: the coordinator sent no time.", counts={"checked": 0})
    return judged_clock(skew(before, after, date))


def judged_clock(seconds: float) -> Finding:
    state: State = "fail" if abs(seconds) > SKEW_FAIL else "warn" if abs(seconds) > SKEW_WARN else "pass"
    way = "ahead of" if seconds > 0 else "behind"
    what = f"This clock is {abs(seconds):.1f} s {way} the coordinator's ({datetime.now(UTC):%H:%M:%S} UTC here)."
    counts = {"seconds": round(seconds, 1), "checked": 1}
    if state == "pass":
        return Finding("clock", "skew", state, what, counts=counts)
    why = "Signed messages carry the time: a node whose clock is off is refused."
    return Finding("clock", "skew", state, what, why, "Switch on NTP: timedatectl set-ntp true", counts)


def _speed(invitation: Invitation) -> float | None:
    """Bytes per second up. The answer to a second request says that the body of the first has arrived."""
    connection = _connection(invitation)
    with suppress(OSError, http.client.HTTPException), closing(connection):
        connection.connect()
        connection.sock.settimeout(PATIENCE)
        host = f"Host: {invitation.address}\r\n"
        head = (
            f"POST {HEALTH} HTTP/1.1\r\n{host}Content-Length: {BODY}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        began = time.perf_counter()
        connection.sock.sendall(head.encode() + os.urandom(BODY))
        connection.sock.sendall(f"GET {HEALTH} HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode())
        answers = b""
        while part := connection.sock.recv(65536):
            answers += part
        if answers.count(b"HTTP/1.1 ") >= 2 and b"HTTP/1.1 413" not in answers:
            return BODY / (time.perf_counter() - began)
    return None


def _throughput(speed: float | None) -> Finding:
    if speed is None:
        return Finding("network", "speed", "warn", "The speed could not be measured.", counts={"checked": 0})
    what, counts = f"{speed / 1e6:.2f} MB/s up", {"mb_per_s": round(speed / 1e6, 2), "checked": 1}
    if speed >= SLOW:
        return Finding("network", "speed", "pass", what, counts=counts)
    why, fix = "Each round sends the model both ways.", "Ask for more bandwidth, or a study with a smaller encoder."
    return Finding("network", "speed", "warn", what, why, fix, counts)
