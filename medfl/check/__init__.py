"""`medfl site check`: the machine, the network, the keys, the data and one training step, before joining a study."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from medfl.errors import DataError

HERE = Path()
PRIVATE, OWN = 0o600, 0o700  # modes of what names files, and of its folder


def command(words: Sequence[str]) -> None:
    """Check this machine, its network and its data: medfl site check [DIR].

    medfl site check [DIR]                  everything; DIR: the site's folder, ./site or the present one if left out
    medfl site check [DIR] --offline        without the network
    medfl site check [DIR] --study STUDY    for one study: the id of an approved one, or an invitation file
    medfl site check [DIR] --data NAME      with one of several data sets of site.yaml
    medfl site check [DIR] --json           print what is in share.json, and nothing else

    Writes DIR/check/private.html, which names files and stays here, and DIR/check/share.json, which holds counts alone
    and can be sent to the study lead. Ends with exit code 10 where something failed.
    """
    if {"-h", "--help"} & set(words):
        print((command.__doc__ or "").replace("\n    ", "\n"))  # noqa: T201  as every command does
        return
    parser = argparse.ArgumentParser(prog="medfl site check", add_help=False)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--site", type=Path)  # as the other commands of a site have it
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--study")
    parser.add_argument("--data")
    parser.add_argument("--json", action="store_true")
    _check(parser.parse_args(list(words)))


def _check(given: argparse.Namespace) -> None:
    """
    Raises:
        DataError: something failed.
    """
    from rich.console import Console

    from medfl.check import page, share, table
    from medfl.check.finding import number
    from medfl.check.run import run
    from medfl.check.scope import scope

    console = Console(highlight=False, stderr=given.json)
    folder = given.folder or given.site or (HERE if (HERE / "site.yaml").is_file() else HERE / "site")
    chosen = scope(folder, study=given.study, data=given.data, offline=given.offline)
    stop, tell = table.watching(console)
    try:
        result = run(chosen, tell)
    finally:
        stop()
    written = _write(chosen.site.check, page.render(result), share.text(result))
    if given.json:
        print(share.text(result))  # noqa: T201  the command's answer
    else:
        table.show(console, result)
        console.print(f"wrote {written / 'private.html'} (stays here) and {written / 'share.json'}", soft_wrap=True)
    if problems := number(result.findings, "fail"):
        raise DataError(
            f"{problems} of {len(result.findings)} checks failed. Repair them as {written / 'private.html'} says, "
            "then check again."
        )


def _write(folder: Path, page: str, share: str) -> Path:
    from medfl.files import write_bytes

    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(OWN)
    write_bytes(folder / "private.html", page.encode())
    (folder / "private.html").chmod(PRIVATE)
    write_bytes(folder / "share.json", f"{share}\n".encode())
    return folder
