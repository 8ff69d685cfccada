"""From overrides to a typed study, and from a node to the object it names. The only file that sees Hydra.

Hydra composes once, where the command is typed. What travels is the resolved YAML; a site parses it as data and builds
objects only from the closed set of medfl's own packages, so that no configuration can name other code.
"""

import difflib
import functools
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from medfl.derived import converted, unconverted
from medfl.errors import ConfigError
from medfl.protection import Privacy, Secagg
from medfl.secagg.scope import check
from medfl.study import Evaluation, Finetune, Node, Rounds, Study, Synthesis, Training

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SECTIONS = (
    *("seed", "stages", "arms", "run", "data", "sites", "views", "encoder", "method"),
    *("training", "rounds", "secagg", "rule", "server_optimizer", "evaluation", "synthesis", "task", "finetune"),
    "privacy",
)
NODES = ("data", "sites", "views", "method", "task", "rule", "server_optimizer")
BUILDABLE = (
    "medfl.data",
    "medfl.views",
    "medfl.models",
    "medfl.methods",
    "medfl.tasks",
    "medfl.optimizers",
    "medfl.rules",
    "medfl.synthesis",
)


def compose(overrides: Sequence[str]) -> Study:
    """The study that `medfl simulate <overrides>` means.

    Raises:
        ConfigError: an unknown group, option or key (with its nearest match), or a value that cannot be used.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = hydra.compose("study", overrides=list(overrides), return_hydra_config=True)
        choices = {str(k): str(v) for k, v in config.hydra.runtime.choices.items()}
        tree = OmegaConf.to_container(config, resolve=False)
        if not isinstance(tree, dict):
            raise ConfigError("configs/study.yaml must be a mapping.")
        tree.pop("hydra")
        tree.pop("resume")  # of this command, not of the study
        _complete(tree)
        tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from None
    if not isinstance(tree, dict):
        raise ConfigError("configs/study.yaml must be a mapping.")
    named = {str(key): value for key, value in tree.items()}
    if named["run"]["dir"] is None:
        what = choices["method"] if choices["experiment"] == "None" else choices["experiment"]
        parts = [what, str(named["data"].get("name") or choices["data"]), choices["sites"]]
        named["run"]["dir"] = f"runs/{'-'.join(parts)}-seed{named['seed']}"
    return parse(yaml.safe_dump(converted(named), sort_keys=False, allow_unicode=True))


def _complete(tree: dict[Any, Any]) -> None:
    """Fill what a data source knows from its name alone (spatial dimensions, channels), before interpolation."""
    node = tree["data"]
    module = importlib.import_module(_module_of(str(node["_target_"])))
    if complete := getattr(module, "complete", None):
        tree["data"] = complete(node)


def changed(text: str, overrides: Sequence[str]) -> Study:
    """A resolved study with other values for some of its keys, such as finetune.rounds=8.

    Raises:
        ConfigError: no key=value, an unknown key, or a value that cannot be used.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.create(yaml.safe_load(text))
    for word in overrides:
        key, equals, value = word.partition("=")
        missing = object()
        if not equals or OmegaConf.select(tree, key, default=missing) is missing:
            raise ConfigError(
                f"got {word!r}, need key=value with a key of the study.{_nearest(key)} List the keys with: "
                "medfl simulate --cfg job"
            )
        try:
            OmegaConf.update(tree, key, yaml.safe_load(value))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{word}: {error}. Write it as in YAML, such as finetune.fractions=[0.1,1.0].") from None
    plain: Any = OmegaConf.to_container(tree)
    return parse(yaml.safe_dump(converted(plain), sort_keys=False, allow_unicode=True))


def parse(text: str) -> Study:
    """A study from its resolved YAML; the text is data, never code.

    Raises:
        ConfigError: not YAML, a missing or unknown section, or a value of the wrong type.
    """
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the study is not valid YAML: {error}. Send the file that medfl wrote.") from None
    if not isinstance(tree, dict):
        raise ConfigError("the study must be a mapping of sections. Send the file that medfl wrote.")
    if odd := sorted(set(SECTIONS) ^ tree.keys()):
        state = "has no" if odd[0] in SECTIONS else "has an unknown"
        raise ConfigError(f"the study {state} section {odd[0]!r}. Send the file that medfl wrote.")
    if type(tree["seed"]) is not int:
        raise ConfigError(f"seed: got {tree['seed']!r}, need an integer.")
    for name in ("stages", "arms"):
        if not isinstance(tree[name], list):
            raise ConfigError(f"{name}: got {tree[name]!r}, need a list such as [{name[:-1]}].")
    study = Study(
        seed=tree["seed"],
        stages=tuple(tree["stages"]),
        arms=tuple(tree["arms"]),
        run_dir=str(tree["run"]["dir"]),
        study_id=tree["run"].get("study"),
        encoders=tree["run"].get("encoders"),
        tensorboard=bool(tree["run"].get("tensorboard")),
        mlflow=tree["run"].get("mlflow"),
        state_dir=str(tree["run"].get("state_dir") or Path(tree["run"]["dir"]) / "sites"),
        training=Training.read(tree["training"], "training"),
        rounds=Rounds.read(tree["rounds"], "rounds"),
        secagg=Secagg.read(tree["secagg"], "secagg"),
        evaluation=Evaluation.read(tree["evaluation"], "evaluation"),
        synthesis=Synthesis.read(tree["synthesis"], "synthesis"),
        finetune=Finetune.read(tree["finetune"], "finetune"),
        privacy=Privacy.read(tree["privacy"], "privacy"),
        source=text,
        **{name: tree[name] for name in NODES},
    )
    check(study)
    if key := unconverted(tree):
        raise ConfigError(
            f"{key}: under privacy it would let images of other patients change a patient's gradient. Make the study "
            "again with medfl, which sets it."
        )
    return study


def build(node: Node, **extra: Any) -> Any:
    """The object that a node names; nested nodes first.

    Raises:
        ConfigError: a target outside medfl's own packages, or arguments that it does not take.
    """
    target = _target(node)
    arguments = {name: _nested(value) for name, value in node.items() if name != "_target_"}
    try:
        return target(**arguments, **extra)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise ConfigError(f"{node['_target_']}: {error}. Compare with its file under configs/.") from None


def partial(node: Node) -> Callable[..., Any]:
    """The pure function that a node names, with its arguments bound."""
    return functools.partial(_target(node), **{k: _nested(v) for k, v in node.items() if k != "_target_"})


def _nested(value: Any) -> Any:
    if isinstance(value, dict):
        return build(value) if "_target_" in value else {k: _nested(v) for k, v in value.items()}
    return [_nested(item) for item in value] if isinstance(value, list) else value


def _module_of(target: str) -> str:
    module = target.rpartition(".")[0]
    if not any(module == package or module.startswith(f"{package}.") for package in BUILDABLE):
        raise ConfigError(f"_target_: got {target!r}, need a name inside {', '.join(BUILDABLE)}.")
    return module


def _target(node: Node) -> Callable[..., Any]:
    path = str(node.get("_target_"))
    module, name = _module_of(path), path.rpartition(".")[2]
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ConfigError(f"_target_: {path!r} does not exist in this version of medfl.") from None
    if name.startswith("_") or not callable(found) or getattr(found, "__module__", "") != module:
        raise ConfigError(f"_target_: {path!r} is not a public class or function of {module}.")
    return found  # type: ignore[no-any-return]


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """One line: what was got, what is near it."""
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if key := re.search(r"Could not override '([^']+)'", str(error)):
        return f"unknown override {key[1]!r}.{_nearest(key[1])} List the keys with: medfl simulate --cfg job"
    if option := re.search(r"Could not find '([^']+)/([^']+)'", str(error)):
        group, name = option[1], option[2]
        found = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
        return f"{group}={name} does not exist. Choose one of: {', '.join(found) or 'nothing (no such group)'}."
    return f"{text} (overrides: {' '.join(overrides) or 'none'})"


def _nearest(key: str) -> str:
    """The closest existing key, over all config files."""
    known = set()
    for path in CONFIGS.rglob("*.yaml"):
        group = path.relative_to(CONFIGS).parent.as_posix()
        for line in path.read_text().splitlines():
            if name := re.match(r"([a-z_]+):", line):
                known.add(name[1] if group == "." else f"{group}.{name[1]}")
    close = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
