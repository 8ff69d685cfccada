"""Public data sets, from their publishers' archives to a data list."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from medfl.cli.main import asks_help
from medfl.errors import ConfigError

VAL = 0.1


def prepare(words: Sequence[str]) -> None:
    """Make a public data set ready: medfl prepare NAME from=PATH to=FOLDER.

    medfl prepare nih from=DOWNLOADS to=nih              from the archives, unpacked into FOLDER
    medfl prepare brats from=UNPACKED to=brats           from a folder that is unpacked: FOLDER/source is a link to it
    medfl prepare chexpert from=PATH to=FOLDER uncertain=ones val=0.05

    Writes FOLDER/datalist.csv, says what was found and left out, and the command that trains on it. PATH is what was
    downloaded: one archive, a folder with several, or a folder that they were unpacked into. val: share of the
    training patients for validation, where the publishers have a test split alone; 0.1 by default. MedMNIST needs no
    preparation: data=medmnist fetches it.
    """
    from medfl.prepare.recipes import RECIPES
    from medfl.prepare.recipes import prepare as run
    from medfl.prepare.table import summary

    if asks_help(prepare, words):
        for name, recipe in RECIPES.items():
            options = "".join(f" {option}={'|'.join(allowed)}" for option, allowed in recipe.options.items())
            print(f"  {name}{options}\n      {recipe.layout}\n      {recipe.origin}")
        return
    given = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    source, to = given.pop("from", ""), given.pop("to", "")
    if not words or "=" in words[0] or not source or not to or len(words) != 3 + len(given):
        raise ConfigError(f"usage: medfl prepare NAME from=PATH to=FOLDER. NAME is one of {', '.join(RECIPES)}.")
    val = _share(given.pop("val", str(VAL)))
    table = run(words[0], Path(source).expanduser(), Path(to).expanduser(), options=given, val=val, show=print)
    print("\n".join(summary(words[0], table)))
    print(f"wrote {to}/datalist.csv\nnext: medfl simulate {' '.join((*table.command, f'data.root={shlex.quote(to)}'))}")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"val: got {text!r}, need a share between 0 and 1, such as {VAL}.")
    return share
