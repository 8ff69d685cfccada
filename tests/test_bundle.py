"""The offline bundle: complete, whole to the last byte, and installable by itself without a network."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from medfl import __version__
from medfl.cli.bundle import main
from medfl.deployment import sealed
from medfl.deployment.manifest import Manifest, verify
from medfl.deployment.offline import Hosts, build, fill, older, own_wheel, require_whole
from medfl.errors import ConfigError, VersionError

SOURCE = Path(__file__).parents[1]
LONG = (
    f"thing-1.0-py3-none-{'manylinux_2_17_x86_64.' * 6}manylinux2014_x86_64.whl"  # longer than a plain tar header has
)


def wheel(folder: Path, name: str, *, needs: str = "", code: str = "") -> Path:
    """A wheel of one module, made by hand."""
    facts = f"{name}-{__version__}.dist-info"
    files = {
        f"{name}.py": code,
        f"{facts}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {__version__}\n{needs}",
        f"{facts}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{facts}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    files[f"{facts}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{facts}/RECORD"))
    path = folder / f"{name}-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of two small wheels and one with a long name."""
    draft = tmp_path / "bundle"
    (draft / "wheels").mkdir(parents=True)
    wheel(draft / "wheels", "friend")
    own = wheel(draft / "wheels", "medfl", needs="Requires-Dist: friend\n", code="def main(): print('it runs')")
    manifest = fill(draft, SOURCE, own, Hosts())
    assert manifest.wheels == (f"friend-{__version__}-py3-none-any.whl", own.name)
    sealed.seal(draft)
    return draft


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def packed(folder: Path) -> Path:
    target = folder.with_name(f"{folder.name}.tar")
    target.unlink(missing_ok=True)
    sealed.pack(folder, target)
    return target


def test_a_flipped_byte_in_any_file_is_refused_and_named(bundle: Path) -> None:
    refused = 0
    for path in files(bundle):
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
            with pytest.raises(ConfigError) as error:
                verify(bundle)
            with pytest.raises(ConfigError):
                verify(packed(bundle))
            assert path.relative_to(bundle).as_posix() in str(error.value) or path.name == sealed.SUMS
        path.write_bytes(whole)
        refused += 1
    assert refused == len(files(bundle)) >= 15
    assert verify(bundle) == verify(packed(bundle))


def test_every_part_of_the_one_file_form_is_covered(bundle: Path) -> None:
    file = packed(bundle)
    whole = file.read_bytes()
    starts = range(0, len(whole), sealed.BLOCK)
    for place in [start + step for start in starts for step in (0, 105, 156, 340, 511)]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ConfigError, match=r"bundle\.tar"):
            verify(file)
    for cut in (*starts[1::7], len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"bundle\.tar"):
            verify(file)
    file.write_bytes(whole + bytes(sealed.BLOCK))
    with pytest.raises(ConfigError, match="last file"):
        verify(file)
    file.write_bytes(whole)
    verify(file)
    assert subprocess.run(["tar", "-tf", file], capture_output=True, check=True).stdout.decode().split() == [
        path.relative_to(bundle).as_posix() for path in sorted(files(bundle), key=lambda path: str(path))
    ]


def test_missing_additional_and_linked_files_are_refused(bundle: Path, tmp_path: Path) -> None:
    for path in files(bundle):
        moved = path.rename(tmp_path / "away")
        with pytest.raises(ConfigError, match=path.name.replace("+", r"\+")):
            verify(bundle)
        moved.rename(path)
    for name in ("wheels/other-1.0-py3-none-any.whl", "wheels/.hidden", "run.sh"):
        (bundle / name).write_text("")
        with pytest.raises(ConfigError, match=name):
            verify(bundle)
        (bundle / name).unlink()
    for target in ("/etc/hostname", "README.md", "/etc"):
        (bundle / "deploy" / "link").symlink_to(target)
        with pytest.raises(ConfigError, match="deploy/link"):
            verify(bundle)
        (bundle / "deploy" / "link").unlink()
    verify(bundle)


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "..", "a//out", "./out", "a\\out", "a\nb"])
def test_paths_out_of_the_bundle_are_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    sums = bundle / sealed.SUMS
    listed = sums.read_text()
    sums.write_text("".join(sorted([*listed.splitlines(True), f"{'0' * 64}  {name}\n"], key=lambda line: line[66:])))
    with pytest.raises(ConfigError, match="bundle"):
        verify(bundle)
    sums.write_text(listed)
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ConfigError, match="path out of it, or an odd name"):
        sealed.unpack(bad, tmp_path / "inside")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_tar_file_holds_plain_files_only(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("deploy")
    member.type, member.linkname = kind, "/etc"
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(ConfigError, match="no plain file"):
        sealed.unpack(tmp_path / "bad.tar", tmp_path / "inside")
    assert not (tmp_path / "inside").exists()


def test_one_file_and_back_is_the_same_folder(bundle: Path, tmp_path: Path) -> None:
    (bundle / "wheels" / LONG).write_bytes(b"")
    sealed.seal(bundle)
    sealed.unpack(packed(bundle), tmp_path / "back")
    assert sealed.verify(tmp_path / "back") == sealed.verify(bundle) == sealed.verify(packed(bundle))
    with pytest.raises(ConfigError, match=r"differ in thing-1\.0"):
        verify(bundle)


def test_a_bundle_installs_itself_without_a_network(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # must not matter
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PIP_REQUIRE_VIRTUALENV", "broken")
    into = tmp_path / "opt" / "medfl"
    assert main(["install", str(packed(bundle)), "--into", str(into)]) == 0
    said = subprocess.run([into / "bin" / "medfl"], capture_output=True, check=True, text=True, env={})
    assert said.stdout == "it runs\n"
    assert (into / "deploy" / "README.md").is_file()
    assert [path.name for path in into.parent.iterdir()] == ["medfl"], "nothing temporary may stay"
    assert main(["install", str(bundle), "--into", str(into)]) == ConfigError.exit_code, "not over what is there"


def test_a_spoilt_or_foreign_bundle_installs_nothing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    into, path = tmp_path / "medfl", bundle / "manifest.json"
    whole, manifest = path.read_text(), Manifest.read(bundle, path.read_text())
    for old, new in ((f'"python": "{manifest.python}"', '"python": "3.9"'), (manifest.platforms[0], "win_amd64")):
        path.write_text(whole.replace(old, new))
        sealed.seal(bundle)
        assert main(["install", str(bundle), "--into", str(into)]) == VersionError.exit_code
        assert new.split('"')[-2 if '"' in new else 0] in capsys.readouterr().err
    for text in ("[]", "{}", whole.replace(f'"protocol": {manifest.protocol}', '"protocol": "1"'), "[" * 100_000):
        path.write_text(text)
        sealed.seal(bundle)
        assert main(["install", str(bundle), "--into", str(into)]) == ConfigError.exit_code
        assert "manifest" in capsys.readouterr().err
    path.write_text(whole)
    assert main(["install", str(bundle), "--into", str(into)]) == ConfigError.exit_code, "the checksum is of the other"
    assert not into.exists()


def test_the_bundle_s_own_script_says_which_python_it_needs(bundle: Path) -> None:
    script = bundle / "install.py"
    script.write_text(script.read_text().replace(f"{sys.version_info[0]}.{sys.version_info[1]}", "3.9"))
    got = subprocess.run([sys.executable, script], capture_output=True, check=False, text=True)
    assert got.returncode == 1
    assert "need 3.9: python3.9 install.py FOLDER" in got.stderr


def test_what_verifies_needs_nothing_but_python(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import medfl.cli.bundle, medfl.deployment.installing; print('fine')"
    )
    bare = [sys.executable, "-I", "-S", "-c", code, str(SOURCE)]
    assert subprocess.run(bare, capture_output=True, check=True, text=True).stdout == "fine\n"


def test_the_wheel_of_medfl_is_whole(tmp_path: Path) -> None:
    own = own_wheel(SOURCE, tmp_path)
    names = set(zipfile.ZipFile(own).namelist())
    for folder, pattern in (("configs", "*.yaml"), ("medfl", "*.py"), ("server", "*.py"), ("client", "*.py")):
        expected = {path.relative_to(SOURCE).as_posix() for path in (SOURCE / folder).rglob(pattern)}
        assert expected, folder
        assert expected <= names
    assert not any(name.startswith(("tests/", "build/")) for name in names)
    less = tmp_path / "less.whl"
    with zipfile.ZipFile(less, "w") as archive:
        for name in names - {"configs/study.yaml", "server/app.py"}:
            archive.writestr(name, "")
    with pytest.raises(ConfigError, match=r"lacks configs/study.yaml, server/app.py"):
        require_whole(less, SOURCE)


def test_build_refuses_what_is_there_and_what_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match="there already"):
        build(tmp_path, SOURCE, Hosts())
    shutil.copy(SOURCE / "constraints.txt", tmp_path)
    with pytest.raises(ConfigError, match="need a checkout"):
        build(tmp_path / "new", tmp_path, Hosts())
    assert main(["pack"]) == ConfigError.exit_code
    assert "build TARGET | verify BUNDLE | install BUNDLE" in capsys.readouterr().err


def test_a_newer_system_takes_the_wheels_of_older_ones() -> None:
    tags = older(["manylinux_2_28_x86_64"])
    assert tags[0] == "manylinux_2_28_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(tags)
    assert "manylinux_2_29_x86_64" not in tags
    assert older(["linux_aarch64"]) == ["linux_aarch64"]
