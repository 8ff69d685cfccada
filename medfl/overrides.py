"""Which overrides tell studies apart, in their shortest form; from resolved studies and the commands that made them."""

import functools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from medfl.config import CONFIGS

Tree = Mapping[str, Any]
ABSENT = "absent"  # value of a key that this version of a study does not have
OWN = ("seed", "resume", "run", "stages", "arms")  # sections and keys of one run, not of what is studied
COMMAND, WHOLE = 2, ("medfl simulate", "medfl synthesize")  # words of a command; commands with all overrides


def studied(config: Tree) -> dict[str, Any]:
    """What two runs have in common that differ in nothing but their seed: config.yaml without what is of one run."""
    seed = config.get("seed")
    kept = {name: part for name, part in config.items() if name not in (*OWN, "provenance")}
    return _without_seed(kept, seed)


def _without_seed(tree: Tree, seed: object) -> dict[str, Any]:
    """Drawn data take the study's seed as theirs."""
    return {
        name: _without_seed(value, seed) if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if name != "seed" or value != seed
    }


def flat(tree: Tree, at: str = "") -> dict[str, str]:
    """The leaves of nested mappings by dotted name, as text; a list is one leaf."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{at}{name}.")
        else:
            found[f"{at}{name}"] = _text(value)
    return found


def names(configs: Sequence[Tree]) -> list[str]:
    """One name for each of some different studies: the overrides that not all of them share, such as "method=simclr".

    They are read from the commands that made the runs, else from the first differences of the studies themselves.
    """
    trees = [studied(config) for config in configs]
    if len(trees) == 1:
        return [f"method={_option('method', trees[0].get('method', ABSENT))}"]
    found = _by_commands(configs, trees)
    if len(set(found)) < len(trees) or not all(found):
        found = [" ".join(f"{key}={value}" for key, value in words.items()) for words in _differences(trees)]
    return found


def _by_commands(configs: Sequence[Tree], trees: Sequence[Tree]) -> list[str]:
    """[] where a command is not known. A study without any of these words says what it has in their place."""
    given = [dict(_words(config)) for config in configs]
    if not all(_command(config) for config in configs):
        return []
    keys = [key for key in dict.fromkeys(key for words in given for key in words)
            if any(words.get(key) != given[0].get(key) for words in given)]  # fmt: skip
    found = []
    for words, tree in zip(given, trees, strict=True):
        own = {key: words[key] for key in keys if key in words} or {key: _value(tree, key) for key in keys}
        found.append(" ".join(f"{key}={value}" for key, value in own.items() if value != ABSENT))
    return found


def _command(config: Tree) -> str:
    """The command that began the run, or "" where it does not say the whole study."""
    command = str((config.get("provenance") or {}).get("command", ""))
    return command if command.startswith(WHOLE) else ""


def _words(config: Tree) -> Iterator[tuple[str, str]]:
    for word in shlex.split(_command(config))[COMMAND:]:
        key, given, value = word.lstrip("+~").partition("=")
        if given and key.partition(".")[0] not in OWN:
            yield key, value


def _value(tree: Tree, key: str) -> str:
    """Of a group the option, else the value at a dotted path."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part, ABSENT) if isinstance(value, Mapping) else ABSENT
    return _option(key, value)


def _differences(trees: Sequence[Tree]) -> list[dict[str, str]]:
    """For each tree, path -> value where not all agree; of paths with equal values throughout, only the first."""
    found = [dict(words) for words in _apart(trees)]
    seen: set[tuple[str, ...]] = set()
    for path in dict.fromkeys(path for words in found for path in words):
        column = tuple(words.get(path, "") for words in found)
        if column in seen:  # a part that repeats another, such as the encoder inside of the method
            for words in found:
                words.pop(path, None)
        seen.add(column)
    return found


def _apart(nodes: Sequence[Any], at: str = "") -> list[dict[str, str]]:
    """Down to the first difference of kind: another class is named, and its arguments are not."""
    found: list[dict[str, str]] = [{} for _ in nodes]
    if all(node == nodes[0] for node in nodes):
        return found
    kinds: dict[str, list[int]] = {}
    for index, node in enumerate(nodes):
        kinds.setdefault(_kind(node), []).append(index)
    if len(kinds) > 1:
        found = [{at: _option(at, node)} for node in nodes]
    for members in kinds.values():
        parts = [nodes[index] for index in members]
        if isinstance(parts[0], Mapping):
            for key in dict.fromkeys(key for part in parts for key in part):
                deeper = _apart([part.get(key, ABSENT) for part in parts], f"{at}.{key}".lstrip("."))
                for index, words in zip(members, deeper, strict=True):
                    found[index] |= words
    return found


def _kind(node: Any) -> str:
    """Equal for two mappings of one class; else the value itself."""
    return f"mapping {node.get('_target_', '')}" if isinstance(node, Mapping) else _text(node)


def _option(group: str, node: Any) -> str:
    """The file under configs/ that is most like a node, else the name of its class, else its text."""
    if not isinstance(node, Mapping):
        return _text(node)
    target, own = node.get("_target_"), flat(node).items()
    alike = {
        stem: len(leaves.items() & own) for stem, leaves in _options(group).items() if leaves.get("_target_") == target
    }
    return max(alike, key=lambda stem: alike[stem]) if alike else str(target or "other").rpartition(".")[2]


@functools.cache
def _options(group: str) -> dict[str, dict[str, str]]:
    """File name -> leaves, of one folder under configs/."""
    return {file.stem: flat(yaml.safe_load(file.read_text())) for file in sorted((CONFIGS / group).glob("*.yaml"))}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
