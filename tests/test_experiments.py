"""Every experiment composes and builds, and the commands written above the papers' tables can be given as they are."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from medfl import config, finetuning
from medfl.prepare.recipes import RECIPES
from medfl.study import Study
from medfl.workshop import new_method

FILES = {path.stem: path for path in sorted((config.CONFIGS / "experiment").glob("*.yaml"))}
TABLES = [name for name, path in FILES.items() if "# Expected" in path.read_text()]
SECTIONS = ("Expected", "Caveats", "Time", "Run", "Federated")
OWN_ENCODER = ("brains", "nslf_brats2021", "nslf_paper")
FROM_ITS_ARCHIVE = {"decathlon": ["data.regions={anterior: [1], posterior: [2]}"]}  # what prepare prints for the task


@cache
def composed(name: str) -> Study:
    """The experiment, with narrow networks: what is built is the same, in less time."""
    narrow = "method.base_width=2" if name in OWN_ENCODER else "encoder.base_width=4"
    study = config.compose([f"experiment={name}", narrow])
    root = ["data.root=/data"] if "root" in study.data else []
    return config.changed(study.source, [*root, *FROM_ITS_ARCHIVE.get(name, [])])


def commands(path: Path) -> list[list[str]]:
    """The words of each command in the comments; a line that ends in a backslash goes on."""
    lines = [re.sub(r"^# ?(Run|Federated)? *", "", line) for line in path.read_text().splitlines() if line[:1] == "#"]
    text = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("medfl ")]


@pytest.mark.parametrize("name", FILES)
def test_every_experiment_builds(name: str) -> None:
    study = composed(name)
    assert new_method(study).trainable()
    for node in (study.data, study.sites, study.views, study.finetune.views):
        config.build(node)
    if "finetune" in study.stages:
        findings = tuple(study.data["labels"] or ()) if "outputs" in study.task else ()
        task = finetuning.Task(() if findings else ("no", "yes"), len(study.data.get("regions") or ()), findings)
        for protocol in study.finetune.protocols:
            assert new_method(finetuning.derive(study, task, protocol=protocol, fraction=0.1)).trainable()


@pytest.mark.parametrize("name", TABLES)
def test_the_commands_above_a_table_are_right(name: str) -> None:
    text, found = FILES[name].read_text(), commands(FILES[name])
    assert all(f"\n# {section}" in text for section in SECTIONS)
    tree = OmegaConf.create(yaml.safe_load(composed(name).source))
    assert any(f"experiment={name}" in words for words in found)
    for program, command, *words in found:
        assert (program, command in ("prepare", "simulate", "compare")) == ("medfl", True)
        if command == "prepare":
            assert words[0] in RECIPES
            assert [word.partition("=")[0] for word in words[1:]] == ["from", "to"]
        elif command == "simulate":
            assert f"experiment={name}" in words
            assert [word for word in words if not usable(word, tree)] == []


def usable(word: str, tree: Any) -> bool:
    """Whether a word names a file of a group, or a key of the study."""
    key, _, value = word.lstrip("~").partition("=")
    if word == "--multirun":
        return True
    if (config.CONFIGS / key).is_dir():
        return all((config.CONFIGS / key / f"{choice}.yaml").is_file() for choice in value.split(","))
    return OmegaConf.select(tree, key, default=tree) is not tree
