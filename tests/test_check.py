import http.server
import json
import shutil
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from PIL import Image
from pydicom.uid import JPEGLosslessSV1

from medfl import PROTOCOL, __version__, config
from medfl.check import command, network, page, run, share
from medfl.check.finding import Finding
from medfl.check.run import Result
from medfl.check.scope import Scope, scope
from medfl.errors import ConfigError, DataError
from medfl.provision import authority
from medfl.provision.documents import Invitation
from medfl.provision.keys import load_signing_key, new_signing_key, public_of
from tests import check_data
from tests.check_data import cell, column, content, cut, image, listed, renamed, same, series, volume
from tests.test_dicom import localiser, save

SMALL = ["training.batch_size=8", "training.steps=20", "rounds.refresh_volumes=16"]
UNKNOWN = {("clock", "skew"), ("network", "coordinator"), ("keys", "invitation"), ("policy", "approval"),
           ("host", "rights"), ("host", "memory")}  # fmt: skip
Found = dict[tuple[str, str], Finding]


def quiet(what: str, done: int, count: int) -> None:
    pass


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scope]:
    """A clean data set of each kind as it was made; the same place each time, with nothing left of the last test."""
    made: dict[str, tuple[Scope, Path]] = {}

    def fresh(kind: str) -> Scope:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            found = scope(check_data.make(kind, folder), study=None, data=None, offline=True)
            made[kind] = replace(found, study=config.changed(found.study.source, SMALL)), folder
            shutil.copytree(folder, f"{folder}-clean")
        shutil.rmtree(made[kind][1])
        shutil.copytree(f"{made[kind][1]}-clean", made[kind][1])
        return made[kind][0]

    return fresh


def root_of(one: Scope) -> Path:
    return Path(one.study.data["root"])


def found(one: Scope) -> Found:
    return {(f.group, f.name): f for f in run.run(one, quiet).findings}


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_fit", lambda *_: (None, []))


# clean


@pytest.mark.parametrize("kind", ["png", "nifti", "dicom"])
def test_a_clean_set_has_no_problem(sites: Any, kind: str) -> None:
    result = run.run(sites(kind), quiet)
    assert [f for f in result.findings if f.state == "fail"] == []
    assert {(f.group, f.name) for f in result.findings if f.state == "warn"} <= UNKNOWN
    assert result.fit is not None
    assert result.fit.step > 0
    assert 0 < result.fit.down <= result.fit.up
    text = page.render(result)
    assert text.count("data:image/png;base64,") == 16
    assert "http://" not in text
    assert "https://" not in text


# planted defects

rng = partial(np.random.default_rng, 5)


def changed(path: Path, change: Callable[[Any], Any], sides: tuple[float, ...] = (1.0, 1.2, 1.5, 1.0)) -> None:
    volume(path, np.asarray(change(np.asarray(nib.load(path).dataobj, dtype=np.float32))), sides)


def with_nan(root: Path) -> None:
    changed(root / "images/003.nii.gz", lambda values: np.where(values > 60, np.nan, values))


def all_nan(root: Path) -> None:
    changed(root / "images/003.nii.gz", lambda values: values * np.nan)


def wrong_unit(root: Path) -> None:
    changed(root / "images/003.nii.gz", lambda values: values, (1e-3, 1.2e-3, 1.5e-3, 1))
    (root / "images/003_mask.nii.gz").unlink()
    with listed(root) as rows:
        rows[3]["mask"] = ""


def impossible(root: Path) -> None:
    changed(root / "images/003.nii.gz", lambda values: values, (1e-6, 1.2, 1.5, 1))
    with listed(root) as rows:
        rows[3]["mask"] = ""


def nowhere(root: Path) -> None:
    one = nib.Nifti1Image(np.asarray(nib.load(root / "images/003.nii.gz").dataobj), None)
    one.header.set_sform(None, code=0)
    one.header.set_qform(None, code=0)
    one.header["pixdim"][1:4] = (1, 1.2, 1.5)
    nib.save(one, root / "images/003.nii.gz")
    with listed(root) as rows:
        rows[3]["mask"] = ""


def named_header(root: Path) -> None:
    one = nib.load(root / "images/003.nii.gz")
    header: Any = one.header
    header["db_name"] = b"Doe Jane"
    nib.save(one, root / "images/003.nii.gz")


def empty_masks(root: Path) -> None:
    for number in range(check_data.COUNT):
        changed(root / f"images/{number:03}_mask.nii.gz", lambda values: (values * 0).astype(np.uint8))


def shifted_mask(root: Path) -> None:
    changed(root / "images/003_mask.nii.gz", lambda values: values.astype(np.uint8)[:, :, :-1])


def strange_mask(root: Path) -> None:
    changed(root / "images/003_mask.nii.gz", lambda values: np.where(values == 4, 9, values).astype(np.uint8))


def exif(root: Path) -> None:
    picture = Image.open(root / "images/003.png")
    tags = picture.getexif()
    tags[0x010E] = "Doe Jane"
    picture.save(root / "images/003.png", exif=tags)


def one_patient_less(root: Path) -> None:
    with listed(root) as rows:
        for row in rows:
            row["split"] = row["split"].replace("test", "val")


def few(root: Path) -> None:
    with listed(root) as rows:
        rows[:18] = []


def rare(root: Path) -> None:
    with listed(root) as rows:
        for number, row in enumerate(rows):
            row["label"] = "b" if number in (0, 1, 24, 28) else "a"


def tagged(name: str, value: Any) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        files = series(rng())
        for one in files:
            if name == "private":
                one.add_new(0x00090010, "LO", "MAKER")
                one.add_new(0x00091001, "LO", value)
            else:
                setattr(one, name, value)
        save(root / "images/003", files)

    return plant


def compressed(root: Path) -> None:
    files = series(rng())
    for one in files:
        one.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        one.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\x00\xe0\x04\x00\x00\x001234\xfe\xff\xdd\xe0\0\0\0\0"
        one["PixelData"].is_undefined_length = True
    save(root / "images/003", files)


def mixed(root: Path) -> None:
    save(root / "images/003", [localiser(), localiser()], ["x.dcm", "y.dcm"])


def grey(*sides: int) -> Any:
    return (check_data.blob(rng(), sides) * 255).astype(np.uint8)


def odd_split(number: int) -> str:
    return "holdout" if number in (2, 3) else check_data.SPLITS[number // 2]


def flat(root: Path) -> None:
    changed(root / "images/003.nii.gz", lambda values: values[:, :, 0])


def gone(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def emptied(root: Path) -> None:
    for file in (root / "images/003").iterdir():
        file.unlink()


def unstated(root: Path) -> None:
    files = series(rng())
    for one in files:
        one.Modality, one.BurnedInAnnotation = "US", ""
    save(root / "images/003", files)


PLANTED: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "a file is gone": ("png", gone("images/003.png"), "data/missing", "fail"),
    "capitals": ("png", cell(3, "image", "images/003.PNG"), "data/missing", "fail"),
    "cut short": ("png", cut("images/003.png"), "data/readable", "fail"),
    "no image": ("png", content("images/003.png", b"hello"), "data/readable", "fail"),
    "unknown format": ("png", lambda root: renamed(root, 3, "003.xyz"), "data/readable", "fail"),
    "constant": ("png", image(3, np.full((40, 32), 9, np.uint8)), "data/constant", "fail"),
    "colour": ("png", image(3, rng().integers(0, 255, (40, 32, 3), np.uint8)), "data/channels", "fail"),
    "twice, one patient": ("png", same(2, 3), "data/duplicates", "warn"),
    "twice, two patients": ("png", same(2, 4), "data/duplicates", "warn"),
    "twice, two splits": ("png", same(2, 30), "data/duplicates", "fail"),
    "patient in two splits": ("png", cell(3, "split", "test"), "data/patient overlap", "fail"),
    "unknown split": ("png", column("split", odd_split), "data/split words", "fail"),
    "no test images": ("png", one_patient_less, "data/splits", "fail"),
    "too few images": ("png", few, "data/number", "fail"),
    "one class": ("png", column("label", lambda n: "a"), "data/labels", "fail"),
    "no classes": ("png", column("label", lambda n: f"finding {n}"), "data/labels", "fail"),
    "rare class": ("png", rare, "data/classes", "warn"),
    "no patient": ("png", cell(3, "patient", ""), "data/patients", "warn"),
    "empty cell": ("png", cell(3, "image", ""), "data/list", "fail"),
    "no such column": ("png", content("datalist.csv", b"picture,label,patient,split\na,b,c,\n"), "data/list", "fail"),
    "no data list": ("png", gone("datalist.csv"), "data/list", "fail"),
    "no text": ("png", content("datalist.csv", b"image,label,patient,split\n\xff\xfe\xfa,a,b,\n"), "data/list", "fail"),
    "no rows": ("png", content("datalist.csv", b"image,label,patient,split\n"), "data/list", "fail"),
    "on its side": ("png", image(3, grey(32, 40)), "data/orientation", "warn"),
    "thumbnail": ("png", image(3, grey(7, 6)), "data/size", "warn"),
    "16 bits": ("png", image(3, grey(40, 32).astype(np.uint16) * 200), "data/intensity", "warn"),
    "almost empty": ("png", image(3, np.pad(grey(2, 2), ((19, 19), (15, 15)))), "data/flat", "warn"),
    "a person's file": ("png", lambda root: renamed(root, 3, "Doe_Jane.png"), "privacy/file names", "warn"),
    "a day's file": ("png", lambda root: renamed(root, 3, "x_19710203_1.png"), "privacy/file names", "warn"),
    "birth column": ("png", column("birth_date", lambda n: "x"), "privacy/columns", "warn"),
    "days in cells": ("png", column("extra", lambda n: f"1971-02-{n % 28 + 1:02}"), "privacy/cells", "warn"),
    "people in cells": ("png", column("extra", lambda n: f"DOE^JANE{n}"), "privacy/cells", "warn"),
    "EXIF": ("png", exif, "privacy/header texts", "warn"),
    "NaN": ("nifti", with_nan, "data/values", "fail"),
    "all NaN": ("nifti", all_nan, "data/values", "fail"),
    "a plane": ("nifti", flat, "data/dimensions", "fail"),
    "metres": ("nifti", wrong_unit, "data/spacing", "warn"),
    "no size": ("nifti", impossible, "data/voxels", "fail"),
    "no transform": ("nifti", nowhere, "data/orientation", "warn"),
    "mask off its grid": ("nifti", shifted_mask, "data/masks", "fail"),
    "mask with another label": ("nifti", strange_mask, "data/masks", "fail"),
    "mask is gone": ("nifti", gone("images/003_mask.nii.gz"), "data/masks", "fail"),
    "empty masks": ("nifti", empty_masks, "data/drawn", "fail"),
    "name in NIfTI": ("nifti", named_header, "privacy/header texts", "warn"),
    "slice missing": ("dicom", gone("images/003/002.dcm"), "data/series", "fail"),
    "two orientations": ("dicom", mixed, "data/series", "fail"),
    "compressed": ("dicom", compressed, "data/readable", "fail"),
    "empty folder": ("dicom", emptied, "data/readable", "fail"),
    "name in DICOM": ("dicom", tagged("PatientName", "DOE^JANE"), "privacy/DICOM tags", "warn"),
    "birthday in DICOM": ("dicom", tagged("PatientBirthDate", "19710203"), "privacy/DICOM tags", "warn"),
    "not de-identified": ("dicom", tagged("PatientIdentityRemoved", "NO"), "privacy/DICOM tags", "warn"),
    "private tags": ("dicom", tagged("private", "MRN-7788123"), "privacy/private tags", "warn"),
    "burned in": ("dicom", tagged("BurnedInAnnotation", "YES"), "privacy/burned-in text", "fail"),
    "ultrasound": ("dicom", unstated, "privacy/likely text", "warn"),
}  # fmt: skip


@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_found_where_it_belongs(sites: Any, no_step: None, defect: str) -> None:
    kind, plant, where, state = PLANTED[defect]
    one = sites(kind)
    plant(root_of(one))
    told = found(one)
    group, name = where.split("/")
    assert told[group, name].state == state
    assert told[group, name].what
    assert told[group, name].fix
    others = [f for key, f in told.items() if f.state == "fail" and key != (group, name)]
    assert others == [], "a defect is told once"


@pytest.mark.parametrize(
    ("settings", "where", "state"),
    [
        ({"window": [500.0, 600.0]}, ("data", "window"), "fail"),
        ({"classes": ["a", "c"]}, ("data", "labels"), "fail"),
        ({"patient": None, "split": None}, ("data", "patients"), "warn"),
        ({"root": "/nowhere"}, ("data", "list"), "fail"),
        ({"size": 3}, ("data", "list"), "fail"),
        ({"spatial_dims": 3}, ("data", "dimensions"), "fail"),
        ({"unreadable": "skip", "max_unreadable": 0.1}, ("data", "constant"), "warn"),
    ],
)
def test_settings_that_do_not_fit_the_data(
    sites: Any, no_step: None, settings: Any, where: tuple[str, str], state: str
) -> None:
    one = sites("png")
    if "unreadable" in settings:
        PLANTED["constant"][1](root_of(one))
    told = found(replace(one, study=replace(one.study, data={**one.study.data, **settings})))
    assert told[where].state == state


def test_localisers_are_counted(sites: Any, no_step: None) -> None:
    one = sites("dicom")
    save(root_of(one) / "images/003", [localiser(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])], ["scout.dcm"])
    told = found(one)["data", "localisers"]
    assert (told.state, told.counts["localisers"]) == ("pass", 1)


def test_keys_that_others_can_read(sites: Any, no_step: None) -> None:
    one = sites("png")
    one.site.node_key.chmod(0o640)
    one.site.signing_key.write_text("no key")
    one.site.secret.unlink()
    one.site.keys.chmod(0o777)
    told = found(one)
    assert {name for (group, name), f in told.items() if group == "keys" and f.state == "fail"} == {
        "node key", "signing key", "secret of the two processes", "folder"}  # fmt: skip


def test_a_gpu_that_is_not_there(sites: Any, no_step: None) -> None:
    one = sites("png")
    study = config.changed(one.study.source, ["training.device=cuda"])
    assert found(replace(one, study=study))["gpu", "device"].state == "fail"


# the study


@pytest.fixture(scope="module")
def invitation(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes an invitation to a study whose coordinator is on this machine."""
    folder = tmp_path_factory.mktemp("lead")
    until = date.today() + timedelta(days=60)
    authority.create(folder, name="lungs", names=["127.0.0.1"], until=until, passphrase="a passphrase")
    new_signing_key(folder / "study")
    key = load_signing_key(folder / "study")
    source = config.compose(["data=folder", "data.root=x", "data.size=16", *SMALL, "training.batch_size=16"]).source

    def make(port: int, *, address: str = "127.0.0.1", ends: date = until) -> Path:
        document = Invitation(
            "lungs-1a2b3c4d", "Lungs", address, port, ends.isoformat(), "2026-01-01", __version__, PROTOCOL, source,
            (folder / "ca.crt").read_text(), b"app", public_of(key),
        )  # fmt: skip
        document.write(folder / "lungs.invitation.json", key)
        return folder / "lungs.invitation.json"

    return make


def invited(one: Scope, path: Path, *, offline: bool = True) -> Scope:
    return scope(one.site.folder, study=str(path), data=None, offline=offline)


def test_an_invitation_is_checked_before_it_is_approved(sites: Any, no_step: None, invitation: Any) -> None:
    one = sites("png")
    told = found(invited(one, invitation(8443)))
    assert told["policy", "approval"].state == "warn"
    assert told["policy", "allowed"].state == told["policy", "settings"].state == "pass"
    assert told["keys", "invitation"].state == "pass"
    assert told["data", "usable"].counts["usable"] == check_data.COUNT
    soon = invited(one, invitation(8443, ends=date.today() + timedelta(days=2)))
    assert found(soon)["keys", "invitation"].state == "warn"
    settings = yaml.safe_load(one.site.path.read_text())
    settings["policy"] |= {"methods": ["simclr"], "least_steps": 100}
    settings["data"]["main"]["size"] = 24
    one.site.path.write_text(yaml.safe_dump(settings))
    told = found(invited(one, invitation(8443)))
    assert (told["policy", "allowed"].state, told["policy", "allowed"].counts["refusals"]) == ("fail", 2)
    assert told["policy", "settings"].items == ["size: 24 here, 16 in the study"]


def test_several_data_sets_need_a_choice(sites: Any) -> None:
    one = sites("png")
    settings = yaml.safe_load(one.site.path.read_text())
    settings["data"]["other"] = settings["data"]["main"]
    one.site.path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match="2 data sets: main, other"):
        scope(one.site.folder, study=None, data=None, offline=True)
    assert scope(one.site.folder, study=None, data="other", offline=True).data == "other"


# the network


class Coordinator(http.server.BaseHTTPRequestHandler):
    """Refuses everything, as the real one does but for the fleet's path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def coordinator(invitation: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = invitation(1).parent
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Coordinator)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


def around(path: Path) -> tuple[dict[str, Finding], float | None]:
    findings, speed = network.findings(Invitation.read(path), offline=False)
    return {f.name: f for f in findings}, speed


def test_the_way_to_the_coordinator(coordinator: int, invitation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told, speed = around(invitation(coordinator))
    assert {name: f.state for name, f in told.items()} == dict.fromkeys(told, "pass")
    assert told.keys() == {"proxy", "name", "TLS", "certificate", "skew", "speed"}
    assert speed is not None
    assert speed > 0
    assert 30 < told["certificate"].counts["days"] <= 150
    assert abs(told["skew"].counts["seconds"]) < 2
    monkeypatch.setattr(network, "time", SimpleNamespace(time=lambda: 1.7e9, perf_counter=time.perf_counter))
    assert around(invitation(coordinator))[0]["skew"].state == "fail"


def test_ways_that_fail(coordinator: int, invitation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    until = date.today() + timedelta(days=9)
    authority.create(tmp_path, name="other", names=["127.0.0.1"], until=until, passphrase="a passphrase")
    mine = Invitation.read(invitation(coordinator))
    foreign = replace(mine, authority=(tmp_path / "ca.crt").read_text())
    told = {f.name: f for f in network.findings(foreign, offline=False)[0]}
    assert told["TLS"].state == "fail"
    assert "not the study's" in told["TLS"].what
    assert around(invitation(1))[0]["port"].state == "fail"
    assert around(invitation(1, address="no-such-host.invalid"))[0]["name"].state == "fail"
    for name in ("NO_PROXY", "no_proxy"):  # of whoever runs the tests
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:1")
    told, _ = around(invitation(coordinator))
    assert told["proxy"].state == "warn"
    assert told["port"].state == "fail"
    assert "secret" not in str(told)


@pytest.mark.parametrize(
    ("seconds", "state"), [(0.5, "pass"), (-1.9, "pass"), (3.0, "warn"), (-5.0, "fail"), (600, "fail")]
)
def test_clocks(seconds: float, state: str) -> None:
    assert network.judged_clock(seconds).state == state
    sent = "Sun, 06 Nov 1994 08:49:37 GMT"  # 784111777
    assert network.skew(784111777.5 + seconds, 784111777.5 + seconds, sent) == pytest.approx(seconds)


# what is written

CANARIES = ("Doe", "Jane", "MRN-7788123", "19710203", "1971-02-03", "case-", "hospital-a", "images/", "/tmp", "holdout",
            "Canary General", "biopsy", "lungs-1a2b3c4d", "Lungs", "127.0.0.1", "main")  # fmt: skip

WHOLE = ("no such column", "no data list", "no text", "no rows", "capitals", "empty cell")  # leave nothing to look at


@pytest.mark.parametrize("kind", ["png", "nifti", "dicom"])
def test_what_is_shared_names_nothing(sites: Any, no_step: None, invitation: Any, kind: str) -> None:
    one = sites(kind)
    root = root_of(one)
    for defect, (belongs, plant, _, _) in PLANTED.items():
        if belongs == kind and defect not in WHOLE:
            try:
                plant(root)
            except (FileNotFoundError, nib.filebasedimages.ImageFileError):
                continue  # an earlier defect took the file away
    with listed(root) as rows:
        for number, row in enumerate(rows):
            row["Doe, Jane"], row["label"] = "MRN-7788123", "biopsy Doe" if number % 2 else "Jane"
            row["patient"] = f"case-Jane {number // 2}"
    for chosen in (one, invited(one, invitation(8443))):
        result = run.run(chosen, quiet)
        text = share.text(result)
        assert [canary for canary in CANARIES if canary in text] == []
        assert "2026" not in text.replace(str(chosen.invitation and chosen.invitation.config_digest), "")
        assert [canary for canary in ("MRN", "Doe", "hospital-a") if canary in page.render(result)]
        assert json.loads(text)["problems"] + json.loads(text)["warnings"] > 4


def test_what_is_shared_is_of_fixed_names_and_numbers(sites: Any, no_step: None) -> None:
    one = sites("png")
    clean = share.document(run.run(one, quiet))
    for defect in ("a file is gone", "rare class", "days in cells"):
        PLANTED[defect][1](root_of(one))
    spoilt = share.document(run.run(one, quiet))
    assert [(f["group"], f["name"]) for f in clean["findings"]] == [(f["group"], f["name"]) for f in spoilt["findings"]]
    assert all(isinstance(v, int | float) for f in spoilt["findings"] for v in f["counts"].values())
    classes = next(f["counts"] for f in spoilt["findings"] if f["name"] == "classes")
    assert classes["class_1_train"] == 0, "fewer than three people are told as none"


def test_the_command(sites: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sites("png").site.folder
    command([str(folder), "--offline", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["problems"] == 0
    assert shown == json.loads((folder / "check/share.json").read_text())
    private = folder / "check/private.html"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert "16 training images after reading" in private.read_text()
    monkeypatch.setattr(run, "_fit", lambda *_: (None, []))
    PLANTED["patient in two splits"][1](folder.parent / "data")
    with pytest.raises(DataError, match=r"^1 of \d+ checks failed\. Repair them"):
        command([str(folder), "--offline"])
    shown = capsys.readouterr().out
    assert "FAIL  patient overlap" in shown
    assert "1 problem and" in shown
    with pytest.raises(ConfigError, match=r"does not exist\. Make it with: medfl site init"):
        command([str(folder / "nowhere")])


def test_a_result_without_files(sites: Any) -> None:
    """Data that are not files of the site, such as the phantom."""
    one = sites("png")
    settings = yaml.safe_load(one.site.path.read_text())
    settings["data"] = {"drawn": {"_target_": "medfl.data.phantom.Phantom", "count": 60, "size": 16}}
    one.site.path.write_text(yaml.safe_dump(settings))
    chosen = scope(one.site.folder, study=None, data=None, offline=True)
    result: Result = run.run(replace(chosen, study=config.changed(chosen.study.source, SMALL)), quiet)
    assert [f for f in result.findings if f.state == "fail"] == []
    assert result.fit is not None
