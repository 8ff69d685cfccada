"""From overrides to a study: mistakes are named, and received text can build nothing but medfl's own parts."""

import pytest
import yaml

from medfl import config
from medfl.errors import ConfigError
from tests.federation.small import SMALL


def test_defaults_compose_and_survive_the_wire() -> None:
    study = config.compose(["seed=7"])
    assert study.seed == 7
    assert config.parse(study.source) == study
    assert study.run_dir == "runs/medcss-anatomy-hospital-seed7"


@pytest.mark.parametrize(
    ("override", "finding"),
    [
        ("training.step=3", r"unknown override 'training\.step'\. Did you mean 'training\.steps'\?"),
        ("method=simclrr", r"method=simclrr does not exist\. Choose one of: .*medcss.*simclr"),
        ("seed=one", "seed: got 'one', need an integer"),
        ("rounds.count=0", r"rounds\.count: got 0, need at least 1"),
        ("rounds.count=two", r"rounds\.count: got 'two' \(str\), need int"),
        ("rounds.quorum=1.5", r"rounds\.quorum: got 1\.5, need a share"),
        ("training.precision=fp8", r"training\.precision: got 'fp8', need one of auto, fp32, bf16"),
        ("stages=[pretrain,finetune2]", "stages: got 'finetune2', need one of synthesize"),
        ("arms=federated", "arms: got 'federated', need a list"),
        ("data=medmnist data.name=adrenal", "adrenalmnist3d"),
    ],
)
def test_a_mistake_is_named_in_one_line(override: str, finding: str) -> None:
    with pytest.raises(ConfigError, match=finding) as error:
        config.compose(override.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "medfl.files.write_bytes", "medfl.cli.main.main", "medfl.methods.base.nn.Module",
     "medfl.models.encoders.torch", "medfl.models.encoders.__import__", "medfl.optimizers._private", "medfl.rules"],
)  # fmt: skip
def test_received_configuration_cannot_name_other_code(target: str) -> None:
    with pytest.raises(ConfigError, match="_target_"):
        config.build({"_target_": target, "command": "true"})


def test_received_text_is_plain_data() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.parse("!!python/object/apply:os.system ['true']")
    tree = yaml.safe_load(config.compose(SMALL).source)
    with pytest.raises(ConfigError, match="unknown section 'hook'"):
        config.parse(yaml.safe_dump(tree | {"hook": {"_target_": "os.system"}}))
    tree.pop("rounds")
    with pytest.raises(ConfigError, match="has no section 'rounds'"):
        config.parse(yaml.safe_dump(tree))


def test_nested_targets_are_checked_too() -> None:
    study = config.compose(SMALL)
    node = {**study.method, "encoder": {"_target_": "subprocess.run", "args": ["true"]}}
    with pytest.raises(ConfigError, match=r"got 'subprocess\.run', need a name inside medfl"):
        config.build(node)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"weighted_mean|rate"):
        config.build({"_target_": "medfl.optimizers.learning_rate", "rate": 1})
