"""deploy/: what the containers and units start is what `medfl study up` and `medfl site join` start."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from medfl.cli.main import main
from medfl.deployment import coordinator, lead, site_init, site_processes
from medfl.onsite import approvals
from medfl.onsite.site_file import SiteFile
from tests.test_deploy_files import STUDY_ID, SWITCHED_OFF, UNITS, compose, unit


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator's folder as the commands make it."""
    folder = tmp_path_factory.mktemp("lead") / "study"
    plan = lead.Plan("lungs", "fl.example.org", port=8443, link_port=8000, sites=1, until="2999-12-31")
    lead.create(folder, plan, "a long passphrase")
    lead.invite(folder)
    return folder


@pytest.fixture(scope="module")
def site(study: Path, tmp_path_factory: pytest.TempPathFactory) -> SiteFile:
    """A site's folder, with the study approved."""
    folder = tmp_path_factory.mktemp("hospital") / "site"
    data = folder.parent / "images"
    data.mkdir()
    (data / "list.csv").write_text("image,label\n")
    made, _ = site_init.create(
        folder, site_init.Answers("hospital-a", data, Path("list.csv"), "auto", "it@example.org")
    )
    approvals.approve(made, next(study.glob("*.invitation.json")), by="Dr X")
    return made


class Replaced(Exception):
    """A command became another program."""


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], dict[str, str]]]:
    """What `serve` would execute."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def execute(file: str, words: list[str], env: dict[str, str]) -> None:
        found.append((words, env))
        raise Replaced

    monkeypatch.setattr(os, "execvpe", execute)
    if not shutil.which("nginx", path=f"{os.environ['PATH']}:{coordinator.NGINX_PLACES}"):
        (tmp_path / "nginx").symlink_to("/bin/true")
        monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tmp_path}")
    return found


def inside(service: dict[str, Any], root: str, real: Path, study_id: str, into: Path) -> Path:
    """A copy of the files that a container has below `root`, as its mounts say."""
    place = into / "inside"
    for mount in sorted(service["volumes"], key=lambda mount: mount["target"].count("/")):
        if mount["target"].startswith(root):
            name = mount["target"].removeprefix(root).replace(STUDY_ID, study_id).strip("/")
            if name == "" or (real / name).is_dir():
                shutil.copytree(real / name, place / name, dirs_exist_ok=True)
            else:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(real / name, place / name)
        for entry in service["tmpfs"]:
            covered = place / entry.split(":")[0].removeprefix(root).strip("/")
            if mount["target"] == root and entry.startswith(root):
                shutil.rmtree(covered)
    for entry in service["tmpfs"]:
        if entry.startswith(root):
            (place / entry.split(":")[0].removeprefix(root).strip("/")).mkdir(parents=True, exist_ok=True)
    return place


@pytest.mark.parametrize("part", coordinator.PARTS)
def test_a_coordinator_s_container_starts_the_program_of_study_up(
    part: str, study: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = compose("server")["services"][part]
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, value or "")
    kept: list[Path] = []
    monkeypatch.setattr("medfl.deployment.keeper.keep", lambda folder, say: kept.append(folder))
    place = inside(service, "/study", study, "", tmp_path)
    words = [word.replace("/study", str(place)) if word.startswith("/") else word for word in service["command"]]
    if part == "keeper":
        assert main(words) == 0
        assert kept == [place]
        return
    with pytest.raises(Replaced):
        main(words)
    got, env = executed[0]
    expected = coordinator.process(study, part)
    assert [word.replace(str(place), str(study)) for word in got] == expected.words
    assert SWITCHED_OFF.items() <= env.items()
    if part == "link":
        assert got[got.index("--host") + 1] == "link"


@pytest.mark.parametrize("part", ["node", "apps"])
def test_a_site_s_container_starts_the_program_of_site_join(
    part: str, site: SiteFile, executed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service, study_id = compose("site")["services"][part], approvals.the_one(site, None)
    for name, value in service["environment"].items():
        monkeypatch.setenv(name, value or "")
    place = inside(service, "/site", site.folder, study_id, tmp_path)
    changed = {"/site": str(place), STUDY_ID: study_id}
    with pytest.raises(Replaced):
        main([changed.get(word, word) for word in service["command"]])
    got, env = executed[0]
    expected, _ = getattr(site_processes, part)(site, study_id)
    assert [word.replace(str(place), str(site.folder)) for word in got] == expected
    assert SWITCHED_OFF.items() <= env.items()
    assert any("runtime" in word for word in got)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_every_unit_starts_a_command_of_medfl(
    path: Path, study: Path, site: SiteFile, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *words = unit(path)["ExecStart"][0].split()
    assert program == "/opt/medfl/bin/medfl"
    changed = {"/srv/medfl/study": str(study), "/srv/medfl/site": str(site.folder), "%i": approvals.the_one(site, None)}
    started: list[str] = []
    monkeypatch.setattr("medfl.cli.study_run.supervise", lambda parts, *_: started.extend(part.name for part in parts))
    monkeypatch.setattr(coordinator, "check_ports", lambda study: None)
    words = [changed.get(word, word) for word in words]
    if path.name == "medfl-coordinator.service":
        assert main(words) == 0
        assert tuple(started) == coordinator.PARTS
        return
    assert "%i" in unit(path)["ExecStart"][0].split(), "a site may have approved several studies"
    with pytest.raises(Replaced):
        main(words)
    assert {"node": "flower-supernode", "apps": "flower-superexec"}[words[2]] in [Path(w).name for w in executed[0][0]]
