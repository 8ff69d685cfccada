"""What a bad site, a bad coordinator, and what a site sends without wanting to, with real processes."""

import base64
import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
from attack_replies import PATCH, kinds
from fault_rig import Rig, patched, processes
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medfl import config
from medfl.deployment.control import Control
from medfl.deployment.wishes import invitation_of
from medfl.onsite.site_file import SiteFile
from medfl.provision.study_file import StudyFile
from tests.deployment.real import MEDFL, SITES, wait_until
from tests.federation.real import datalist
from tests.test_dicom import bare

Count = tuple[int, int]  # tried, accepted
RECORD = """
import sys
if "flower-supernode" in " ".join(sys.orig_argv) and "tended" not in " ".join(sys.orig_argv):
    import httpx
    plain = httpx.Client.send
    def send(self, request, **given):
        with open({file!r}, "ab") as out:
            out.write(str(request.url).encode() + repr(request.headers.raw).encode())
            with __import__("contextlib").suppress(Exception):
                out.write(request.read())
        return plain(self, request, **given)
    httpx.Client.send = send
"""


def replies(rig: Rig) -> tuple[int, int, str]:
    """A site that sends another malformed answer in each round; needs a rig with a round for each kind."""
    largest: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            for pid in processes(rig.lead, "flwr-serverapp"):
                with contextlib.suppress(OSError, StopIteration):
                    text = Path(f"/proc/{pid}/status").read_text()
                    size = 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")))
                    largest[rig.rounds()] = max(size, largest.get(rig.rounds(), 0))

    with patched(rig, "beta", PATCH):
        threading.Thread(target=watch, daemon=True).start()
        rig.begin()
        state = rig.end(3600)
        ended.set()
    lost = rig.lost()
    taken = [number for number in range(1, rig.last) if ("beta", number) not in lost]
    assert state == "finished", rig.attempt()
    assert not {site for site, number in lost if site != "beta"}, f"an honest site lost a round: {sorted(lost)}"
    assert rig.encoder() == rig.expected(lost), "another model than without the malformed answers"
    names = list(kinds())
    grown = (max(largest.values()) - largest[0]) / 1e6
    accepted = ", ".join(names[number - 1] for number in taken)
    return rig.last - 1, len(taken), f"{grown:.0f} MB more memory of the ServerApp. {accepted}".strip()


def bundles(rig: Rig) -> Count:
    """A coordinator that submits another program, or another study, past the keeper: nothing of it runs at any site."""
    invitation, study = invitation_of(rig.lead), StudyFile.read(rig.lead)
    rig.up()
    (keeper,) = processes(rig.lead, "serve keeper")
    os.kill(keeper, signal.SIGSTOP)
    mark = rig.study.folder / "executed"
    control = Control(rig.lead, study)
    attempts: list[tuple[bytes, str]] = [
        (_rebuilt(invitation.app, "client/app.py", f"open({str(mark)!r}, 'w').close()\n"), invitation.config),
        (_rebuilt(invitation.app, "medfl/extra.py", "x = 1\n"), invitation.config),
        (_rebuilt(invitation.app, "medfl/site.py", "# one comment more\n"), invitation.config),
        *((invitation.app, config.changed(invitation.config, [word]).source)
          for word in ("rounds.count=9", "training.steps=40", "data.size=12", "seed=4", "method.temperature=0.9")),
    ]  # fmt: skip
    worked = 0
    for number, (app, text) in enumerate(attempts):
        before = _answers(rig)
        asked: dict[str, str | int] = {"study": text, "stages": "pretrain", "sites": 3, "root": str(rig.lead)}
        shutil.rmtree(rig.run, ignore_errors=True)
        run = control.start(app, asked)
        told = lambda n=number: sum(_refusals(rig).values()) >= 3 * (n + 1)  # noqa: E731
        wait_until(told, 180, f"refusals of attempt {number}")
        worked += _answers(rig) != before
        with contextlib.suppress(Exception):
            control.stop(run)
        time.sleep(3)
    os.kill(keeper, signal.SIGCONT)
    rig.down()
    return len(attempts), worked + mark.exists()


def _answers(rig: Rig) -> int:
    return sum(text.count('"what":"answer"') for text in _records(rig).values())


def _refusals(rig: Rig) -> dict[str, int]:
    return {name: len(re.findall(r'"what":"(?:bundle refused|refused)"', text)) for name, text in _records(rig).items()}


def _records(rig: Rig) -> dict[str, str]:
    files = {name: rig.places[name] / "audit.jsonl" for name in SITES}
    return {name: file.read_text() if file.exists() else "" for name, file in files.items()}


def _rebuilt(app: bytes, name: str, text: str) -> bytes:
    """A bundle that is whole by its own list, with text added to a file."""
    with zipfile.ZipFile(io.BytesIO(app)) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    listing = next(entry for entry in files if entry.endswith("CONTENT"))
    files[name] = files.get(name, b"") + text.encode()
    lines = [f"{entry},{hashlib.sha256(content).hexdigest()},{len(content) * 8}"
             for entry, content in files.items() if entry != listing]  # fmt: skip
    files[listing] = "\n".join(lines).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in files.items():
            archive.writestr(entry, content)
    return buffer.getvalue()


def identifiers(rig: Rig) -> tuple[int, int, str]:
    """Names of patients in tags, files, folders, tables and a broken file: none is in what the server has or got."""
    draw = random.Random(5)
    planted = [f"CANARY{draw.getrandbits(48):012x}" for _ in range(50)]
    place, left = rig.study.folder / "images" / "gamma", iter(planted)
    old = [line.split(",") for line in (place / "list.csv").read_text().splitlines()[1:]]
    ward = place / next(left)
    ward.mkdir()
    rows = []
    for number, (file, label, _, split, site) in enumerate(old):
        pixels = np.asarray(Image.open(place / file))
        name = f"{next(left, 'x')}-{number}"
        if number % 2:
            tags = PngInfo()
            tags.add_text("Patient", next(left, "x"))
            Image.fromarray(pixels).save(ward / f"{name}.png", pnginfo=tags)
        else:
            _dicom(ward / f"{name}.dcm", pixels, next(left, "x"))
        kind = "png" if number % 2 else "dcm"
        known = {"label": label, "split": split, "site": site, planted[-1]: planted[-2]}
        rows.append({"file": f"{ward.name}/{name}.{kind}", "patient": f"{planted[number % 50]}-{number}"} | known)
    datalist(place / "list.csv", rows)
    sent = rig.study.folder / "sent.bin"
    with patched(rig, "gamma", RECORD.format(file=str(sent))):
        rig.begin()
        assert rig.end() == "finished"
        assert not {number for site, number in rig.lost() if site == "gamma"}, "gamma took no part"
        broken = place / rows[0]["file"]
        broken.write_bytes(broken.read_bytes()[:200] + planted[3].encode())
        rig.begin()
        rig.end()
        assert "gamma" in {site for site, number in rig.lost() if number == 0}, "the broken file was not refused"
        rig.down()
    files = [path for path in rig.lead.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {name for path in (*files, sent) for name in planted if _holds(path.read_bytes(), name)}
    size = sum(path.stat().st_size for path in files) / 1e6
    assert sent.stat().st_size > 100_000, "what the node sent was not recorded"
    own = (rig.places["gamma"] / "audit.jsonl").read_text()
    assert any(name in own for name in planted), "the site's own record does not even name the broken file"
    told = (
        f"searched: {len(files)} files of {size:.0f} MB at the server, {sent.stat().st_size / 1e6:.1f} MB of requests"
    )
    return len(planted), len(found), told


def _holds(content: bytes, name: str) -> bool:
    """Plain, in capitals or small, as UTF-16, hex or base64."""
    forms = [
        name.encode(),
        name.lower().encode(),
        name.upper().encode(),
        name.encode("utf-16-le"),
        name.encode().hex().encode(),
    ]
    forms += [base64.b64encode(b"x" * shift + name.encode())[4:-4] for shift in range(3)]
    return any(form in content for form in forms)


def _dicom(path: Path, pixels: np.ndarray, name: str) -> None:
    one = bare(*pixels.shape)
    one.PatientName, one.PatientID, one.AccessionNumber, one.InstitutionName = name, name, name, name
    one.StudyDescription, one.SeriesDescription = name, name
    one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    one.PixelSpacing, one.PixelData = [1, 1], pixels.astype("<i2").tobytes()
    one.save_as(path, enforce_file_format=True)


def hosts(rig: Rig) -> tuple[int, int, str]:
    """Every address that any process of a site asks for while it joins, works and leaves: coordinator and itself."""
    if not shutil.which("strace"):
        return 0, 0, "strace is not installed: not tried"
    rig.up()
    rig.leave("alpha")
    log = rig.study.folder / "strace.txt"
    words = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-s", "200", "-o", str(log)]
    words += [str(MEDFL), "site", "join", "--site", str(rig.places["alpha"])]
    with subprocess.Popen(words, env=rig.study.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as popen:
        rig.begin()
        state = rig.end()
        rig.leave("alpha")
        popen.wait(60)
    assert state == "finished"
    assert not {number for site, number in rig.lost() if site == "alpha"}, "alpha took no part"
    rig.join("alpha")
    text = log.read_text(errors="replace")
    asked = re.findall(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)")', text)
    addresses = {(four or six, int(port)) for port, four, six in asked}
    allowed = {("127.0.0.1", rig.port), ("127.0.0.1", SiteFile.read(rig.places["alpha"]).port)}
    odd = sorted(addresses - allowed)
    assert allowed <= addresses, addresses
    return len(addresses), len(odd), f"{len(asked)} calls; {odd or 'none else'}"
