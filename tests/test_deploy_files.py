"""deploy/: the files run medfl's own commands, with no more rights, files and networks than these need."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medfl.cli.main import main
from medfl.deployment.programs import SWITCHES

SOURCE = Path(__file__).parents[1]
DEPLOY = SOURCE / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
SWITCHED_OFF = {name: value for name, value in SWITCHES.items() if not name.startswith("PYTHON")}
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
STUDY_ID = "lungs-1a2b3c4d"


def settings(name: str) -> dict[str, str]:
    """The variables of an .env.example file."""
    lines = (DEPLOY / f"{name}.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def compose(name: str, file: str = "") -> dict[str, Any]:
    """A compose file with the values of its example."""
    values = settings(name)
    text = (DEPLOY / f"compose.{file or name}.yaml").read_text()
    return yaml.safe_load(VARIABLE.sub(lambda match: values.get(match[1], ""), text))


SERVICES = [(file, name) for file in ("server", "site") for name in compose(file)["services"]]


@pytest.mark.parametrize(("file", "name"), SERVICES)
def test_every_service_is_confined(file: str, name: str) -> None:
    service, text = compose(file)["services"][name], (DEPLOY / f"compose.{file}.yaml").read_text()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == f"{settings(file)['MEDFL_UID']}:{settings(file)['MEDFL_GID']}"
    assert int(settings(file)["MEDFL_UID"]) > 0
    assert {"mem_limit", "pids_limit", "stop_grace_period", "tmpfs"} <= service.keys()
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode", "env_file", "secrets"} & service.keys()
    assert "docker.sock" not in text
    assert service.get("network_mode") in (None, "none")
    if "commands" not in service.get("profiles", []):
        assert service["restart"] == "always"
        assert "MEDFL_HEALTH" in service["environment"] or service["healthcheck"]["test"]
    for mount in service["volumes"]:
        assert mount["type"] == "bind"
        assert mount["bind"] == {"create_host_path": False}, "a wrong path must be an error"
        assert mount["source"].startswith("/srv/")


def test_only_the_proxy_is_public_and_only_the_node_gets_out() -> None:
    server, site = compose("server"), compose("site")
    published = {
        name: service["ports"]
        for file in (server, site)
        for name, service in file["services"].items()
        if "ports" in service
    }
    assert published == {"proxy": ["8443:8443"]}
    internal = {
        name for file in (server, site) for name, network in file["networks"].items() if network.get("internal")
    }
    assert internal == {"back", "inner"}
    outside = {
        name
        for file in (server, site)
        for name, service in file["services"].items()
        if set(service.get("networks", {})) - internal
    }
    assert outside == {"proxy", "node", "check"}
    assert site["services"]["site"]["network_mode"] == "none"
    assert "commands" in site["services"]["check"]["profiles"], "started by a person alone"
    bridges = {
        network.get("driver_opts", {}).get("com.docker.network.bridge.name") for network in site["networks"].values()
    }
    rules = (DEPLOY / "medfl-site.nft").read_text()
    assert set(re.findall(r'fname "([\w-]+)"', rules)) == bridges


def test_the_connection_is_checked_where_names_can_be_resolved() -> None:
    services, guide = compose("site")["services"], (DEPLOY / "README.md").read_text()
    check, plain = services["check"], services["site"]
    assert check["networks"] == ["outer"]
    assert "network_mode" not in check
    assert check["environment"]["HTTPS_PROXY"] == services["node"]["environment"]["HTTPS_PROXY"]
    assert check["entrypoint"] == [*plain["entrypoint"], "check", "."], "no other command has this network"
    ways = {"networks", "network_mode", "entrypoint", "command", "environment"}
    assert {key: value for key, value in check.items() if key not in ways} == {
        key: value for key, value in plain.items() if key not in ways
    }
    assert set(re.findall(r"run --rm (\w+)", guide)) == {"site", "check"}
    gpu = yaml.safe_load((DEPLOY / "compose.site.gpu.yaml").read_text())["services"]
    assert gpu.keys() == {"apps", "site", "check"}


def test_each_container_sees_what_it_needs_and_no_more() -> None:
    server, site = compose("server")["services"], compose("site")["services"]

    def seen(service: dict[str, Any]) -> dict[str, bool]:
        return {mount["target"]: mount.get("read_only", False) for mount in service["volumes"]}

    proxy = {
        f"/study/{name}" for name in ("study.yaml", "authority/ca.crt", "authority/server.crt", "authority/server.key")
    }
    assert seen(server["proxy"]) == dict.fromkeys(proxy, True)
    link = {"keys/superexec.secret", *(name.removeprefix("/study/") for name in proxy), "state"}
    assert seen(server["link"]).keys() == {f"/study/{name}" for name in link}
    for name in ("apps", "keeper"):
        covered = [entry.split(":")[0] for entry in server[name]["tmpfs"]]
        assert "/study/authority" in covered, "ca.key is in it"
        assert ("/study/keys" in covered) == (name == "keeper")
        assert {target for target, fixed in seen(server[name]).items() if not fixed} == {"/study/state", "/study/run"}
    data, folder = settings("site")["MEDFL_DATA"], f"/site/studies/{STUDY_ID}"
    assert not any(target.startswith(data) or "signing" in target for target in seen(site["node"]))
    assert all(seen(site["node"]).values())
    apps = seen(site["apps"])
    assert apps[data] is True
    assert apps[f"{folder}/home/apps"] is apps["/site/site.yaml"] is apps[folder] is True
    assert "/site/keys/node" not in apps
    writable = {target for target, fixed in apps.items() if not fixed}
    assert writable == {f"{folder}/home", f"{folder}/bin", "/site/state", "/site/audit.jsonl"}


def test_nothing_that_looks_like_a_secret_is_in_a_setting() -> None:
    named = re.compile(r"secret|passw|passphrase|token|credential|private", re.IGNORECASE)
    for file, name in SERVICES:
        assert not [key for key in compose(file)["services"][name].get("environment", {}) if named.search(key)]
    for file in ("server", "site"):
        assert not [key for key in settings(file) if named.search(key)]
        used = VARIABLE.findall("".join(path.read_text() for path in DEPLOY.glob(f"compose.{file}*.yaml")))
        assert {key for key, _, _ in used} == settings(file).keys()
        required = {key for key, kind, _ in used if kind == "?"}
        assert required >= {"MEDFL_FOLDER", "MEDFL_UID", "MEDFL_GID"}
        for key, kind, default in used:
            assert kind != "-" or default == settings(file)[key], key
    words = re.findall(r"^(?:ARG|ENV|LABEL) .*", DOCKERFILE, re.MULTILINE)
    assert words
    assert not [line for line in words if named.search(line)]


def test_the_images_are_small_fixed_and_not_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    built = {stage.split()[2]: stage for stage in (" ".join(s.splitlines()[0].split()) + "\n" + s for s in stages)}
    assert set(built) == {"base", "build", "common", "server", "client"}
    for name in ("server", "client"):
        assert re.findall(r"^USER (\d+):(\d+)$", built[name], re.MULTILINE)[-1][0] != "0"
        assert "COPY" not in built[name]
    assert "nginx" not in built["common"] + built["client"]
    assert 'ENTRYPOINT ["medfl"]' in built["common"]
    assert "ADD " not in DOCKERFILE
    assert "SHELL" not in DOCKERFILE
    for switch, value in SWITCHED_OFF.items():
        assert f"{switch}={value}" in built["common"]
    allowed = {line[1:] for line in (SOURCE / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for word in line.split()
    }
    assert copied == allowed
    assert all((SOURCE / name).exists() for name in copied)
    assert (SOURCE / ".dockerignore").read_text().splitlines()[1] == "*"


def test_the_image_s_health_check_asks_the_named_address() -> None:
    code = re.search(r'CMD \["/opt/medfl/bin/python", "-c", "(.*)"\]', DOCKERFILE)
    assert code
    for told, expected in (({}, 0), ({"MEDFL_HEALTH": "http://127.0.0.1:9/health"}, 1)):
        got = subprocess.run([sys.executable, "-c", code[1]], env=os.environ | told, cwd=SOURCE, check=False)
        assert got.returncode == expected


def unit(path: Path) -> dict[str, list[str]]:
    """Key → values of a unit file."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_every_unit_is_confined(path: Path) -> None:
    keys = unit(path)
    for name in (
        "NoNewPrivileges",
        "PrivateTmp",
        "ProtectHome",
        "ProtectKernelTunables",
        "ProtectControlGroups",
        "RestrictNamespaces",
    ):
        assert keys[name] == ["yes"]
    assert keys["ProtectSystem"] == ["strict"]
    assert keys["CapabilityBoundingSet"] == [""]
    assert keys["User"] == ["medfl"]
    assert keys["Restart"] == ["always"]
    told = dict(pair.split("=", 1) for line in keys["Environment"] for pair in line.split())
    assert SWITCHED_OFF.items() <= told.items()
    assert all(word.startswith("/srv/medfl/") for line in keys.get("ReadWritePaths", []) for word in line.split())


def test_the_units_of_a_site_part_data_and_network() -> None:
    node, apps = (unit(DEPLOY / "systemd" / f"medfl-site-{part}@.service") for part in ("node", "apps"))
    for keys in (node, apps):
        assert keys["IPAddressDeny"] == ["any"]
        assert keys["IPAddressAllow"] == ["localhost"]
    assert "-/srv/images" in node["InaccessiblePaths"][0]
    assert "keys/signing" in node["InaccessiblePaths"][0]
    assert "ReadWritePaths" not in node
    assert apps["InaccessiblePaths"] == ["/srv/medfl/site/keys/node"]
    assert apps["ReadOnlyPaths"] == ["/srv/medfl/site/studies/%i/home/apps"]
    target = unit(DEPLOY / "systemd" / "medfl-site@.target")
    assert target["Wants"] == ["medfl-site-node@%i.service medfl-site-apps@%i.service"]
    assert node["PartOf"] == apps["PartOf"] == ["medfl-site@%i.target"]


def test_the_guide_names_commands_and_files_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DEPLOY / "README.md").read_text()
    named = set(re.findall(r"medfl (study|site|bundle) ([a-z]+)", text))
    assert {("site", "join"), ("study", "up"), ("bundle", "build")} <= named
    for command, verb in sorted(named):
        try:
            code = main([command, verb, "--help"])
        except SystemExit as ended:
            code = ended.code
        assert code == 0, f"medfl {command} {verb}: {capsys.readouterr().err}"
    for name in re.findall(r"sudo cp (\S+)", text):
        assert not name.startswith("/"), "pip installs no deploy/"
        assert list(DEPLOY.glob(name)), name
    for name in re.findall(r"(?:compose\.[\w.]+\.yaml|\w+\.env\.example|medfl-[\w@-]+\.(?:service|nft))", text):
        assert list(DEPLOY.rglob(name)), name


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    place, program = tmp_path / "etc/systemd/system", tmp_path / "opt/medfl/bin/medfl"
    shutil.copytree(DEPLOY / "systemd", place)
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for name in ("network-online", "multi-user", "sysinit", "basic", "shutdown"):
        (place / f"{name}.target").write_text("[Unit]\n")
    for path in sorted((DEPLOY / "systemd").iterdir()):
        name = path.name.replace("@.", f"@{STUDY_ID}.")
        words = ["systemd-analyze", "verify", f"--root={tmp_path}", "--man=no", f"/etc/systemd/system/{name}"]
        got = subprocess.run(words, capture_output=True, check=False, text=True)
        assert (got.returncode, got.stdout + got.stderr) == (0, ""), name


HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not installed")
def test_the_linter_accepts_the_dockerfile() -> None:
    got = subprocess.run([HADOLINT, DEPLOY / "Dockerfile"], capture_output=True, check=False, text=True)
    assert (got.returncode, got.stdout) == (0, "")


def compose_words() -> list[str]:
    """Compose 2, as a plugin or by itself; [] where there is none."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]):
            asked = subprocess.run([*words, "version", "--short"], capture_output=True, check=False, text=True)
            if asked.stdout.removeprefix("v").partition(".")[0] not in ("", "1"):
                return words
    return []


COMPOSE = compose_words()


@pytest.mark.skipif(not COMPOSE, reason="docker compose 2 is not installed")
@pytest.mark.parametrize("files", [["server"], ["site"], ["site", "site.gpu"]], ids="+".join)
def test_compose_accepts_the_files(files: list[str]) -> None:
    chosen = [word for file in files for word in ("-f", f"compose.{file}.yaml")]
    words = [*COMPOSE, "--env-file", f"{files[0]}.env.example", *chosen, "--profile", "*", "config", "--quiet"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEDFL_", "HTTPS_PROXY"))}
    got = subprocess.run(words, capture_output=True, check=False, text=True, cwd=DEPLOY, env=kept)
    assert (got.returncode, got.stdout + got.stderr) == (0, "")
