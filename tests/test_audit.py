"""The record of a site: every edit is found, many writers give one whole chain, a crash leaves a trace."""

import json
import multiprocessing
import random
from pathlib import Path

import pytest

from medfl.errors import ConfigError, InternalError, ResourceError
from medfl.onsite.audit import Audit, parse_head

EDITS = 1000


@pytest.fixture(autouse=True)
def _memory_is_durable_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medfl.onsite.audit.os.fsync", lambda number: None)


def filled(path: Path, lines: int = 8) -> Audit:
    audit = Audit(path)
    for number in range(lines):
        audit.write("answer", study="chest-0a1b2c3d", round=number, arrays=[f"parameter w float32 3x{number} 12"])
    return audit


def test_lines_are_bound_to_each_other_and_only_their_owner_may_read_them(tmp_path: Path) -> None:
    audit = filled(tmp_path / "a folder" / "audit.jsonl")
    assert Audit.verify(audit.path) == []
    assert audit.path.stat().st_mode & 0o077 == 0
    first, second, *_ = audit.entries()
    assert (first["n"], second["n"], second["previous"]) == (1, 2, first["hash"])
    assert audit.head() == (8, list(audit.entries())[-1]["hash"])
    assert Audit(tmp_path / "none").head()[0] == 0
    with pytest.raises(ValueError, match="'hash' is a name of the record"):
        audit.write("answer", hash="0")
    with pytest.raises(ValueError, match="JSON"):
        audit.write("answer", loss=float("nan"))
    assert Audit.verify(audit.path, audit.head()) == []


def edited(lines: list[bytes], draw: random.Random) -> list[bytes]:
    """One edit, as somebody with an editor, or with this code, could make it."""
    lines, place = list(lines), draw.randrange(len(lines))
    kind = draw.choice(
        ("flip", "value", "rehash", "delete", "swap", "repeat", "forge", "blank", "truncate", "cut", "space")
    )
    entry = json.loads(lines[place])
    if kind == "flip":
        at = draw.randrange(len(lines[place]))
        changed = bytes([lines[place][at] ^ (1 << draw.randrange(8))])
        lines[place] = lines[place][:at] + changed + lines[place][at + 1 :]
    elif kind == "value":
        lines[place] = json.dumps({**entry, "round": 99}, separators=(",", ":")).encode()
    elif kind in ("rehash", "forge"):
        from medfl.onsite.audit import _digest, _text

        made = {**entry, "round": 99} if kind == "rehash" else {**entry, "n": entry["n"] + 1, "previous": entry["hash"]}
        made = _text({**made, "hash": _digest(made)})
        lines[place : place + (kind == "rehash")] = [made]
    elif kind == "delete":
        del lines[place]
    elif kind == "swap":
        other = (place + draw.randrange(1, len(lines))) % len(lines)
        lines[place], lines[other] = lines[other], lines[place]
    elif kind in ("repeat", "blank"):
        lines.insert(place, lines[draw.randrange(len(lines))] if kind == "repeat" else b"")
    elif kind == "truncate":
        lines = lines[:place]
    elif kind == "cut":
        lines[place] = lines[place][: draw.randrange(len(lines[place]))]
    else:
        lines[place] = lines[place].replace(b":", b": ", 1)
    return lines


def test_all_of_a_thousand_random_edits_are_found(tmp_path: Path) -> None:
    audit = filled(tmp_path / "audit.jsonl")
    head, whole = audit.head(), audit.path.read_bytes()
    draw, missed = random.Random(7), 0
    for _ in range(EDITS):
        content = b"\n".join([*edited(whole.removesuffix(b"\n").split(b"\n"), draw), b""])
        assert content != whole
        audit.path.write_bytes(content)
        missed += not Audit.verify(audit.path, head)
    assert missed == 0


def test_a_line_cut_short_by_a_crash_is_reported_and_the_next_line_names_it(tmp_path: Path) -> None:
    audit = filled(tmp_path / "audit.jsonl", 3)
    whole = audit.path.read_bytes()
    for cut in (1, 20, 150):
        audit.path.write_bytes(whole[:-cut])
        (finding,) = Audit.verify(audit.path)
        assert "cut off" in finding
        audit.write("joined")
        assert Audit.verify(audit.path) == []
        kept = ["answer"] * (3 if cut == 1 else 2)  # of the first, the line end alone was lost
        assert [entry["what"] for entry in audit.entries()] == [*kept, "recovered", "joined"]
        content = audit.path.read_bytes()
        place = content.splitlines().index(whole[:-cut].splitlines()[-1])
        for changed in (b"", b"x"):  # neither can the trace be removed or changed
            lines = content.split(b"\n")
            lines[place : place + 1] = [changed] if changed else []
            audit.path.write_bytes(b"\n".join(lines))
            assert Audit.verify(audit.path)
        audit.path.write_bytes(content)


def test_nothing_is_bound_to_a_file_that_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"notes\nmore notes\n")
    with pytest.raises(InternalError, match="audit verify"):
        Audit(path).write("joined")
    assert len(Audit.verify(path)) == 2


def _write_many(path: Path, writer: int) -> None:
    for number in range(40):
        Audit(path).write("joined", writer=writer, number=number, padding="x" * (number * 37 % 500))


def test_four_processes_write_one_whole_chain(tmp_path: Path) -> None:
    path, context = tmp_path / "audit.jsonl", multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert Audit.verify(path) == []
    assert Audit(path).head()[0] == 160
    for writer in range(4):
        assert [e["number"] for e in Audit(path).entries() if e["writer"] == writer] == list(range(40))


def test_a_full_disk_leaves_the_record_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = filled(tmp_path / "audit.jsonl", 2)
    whole = audit.path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medfl.onsite.audit.os.fsync", full)
    with pytest.raises(ResourceError, match="no space left"):
        audit.write("joined")
    assert audit.path.read_bytes() == whole


def test_a_head_is_a_number_and_a_hash() -> None:
    digest = "0a" * 32
    assert parse_head(f"12:{digest}") == (12, digest)
    for text in ("", "12", "x:" + digest, "12:" + digest[:-1], "12:" + "Z" * 64):
        with pytest.raises(ConfigError, match="NUMBER:HASH"):
            parse_head(text)
