"""What a study may hold together with secure aggregation: nothing that needs one site's update."""

from collections.abc import Iterator

from medfl.errors import ConfigError
from medfl.study import Study

SUMS = ("weighted_mean", "uniform_mean")  # rules that are a sum with weights known beforehand
ARMS = ("random", "federated")
TUNED = ("federated_finetune", "federated_head")


def check(study: Study) -> None:
    """
    Raises:
        ConfigError: with each part that needs single updates, and what to do.
    """
    if study.secagg.active and (found := list(_refusals(study))):
        raise ConfigError(f"secagg.active=true: {' '.join(found)} Or take secagg.active=false.")


def _refusals(study: Study) -> Iterator[str]:
    rule = str(study.rule.get("_target_")).rpartition(".")[2]
    if rule not in SUMS:
        yield f"the rule {rule} needs the update of each site, the server has their sum. Take rule=weighted_mean."
    if study.rounds.inspect != "none":
        yield "rounds.inspect looks at the update of each site, the server has their sum. Take rounds.inspect=none."
    if odd := [arm for arm in study.arms if arm not in ARMS]:
        yield f"arm '{odd[0]}' is a network of one place, sent to the server. Take arms=[random,federated]."
    if study.rounds.wire != "fp32":
        yield f"rounds.wire={study.rounds.wire}: masks add up on fixed point values alone. Take rounds.wire=fp32."
    if study.rounds.codebook == "mean":
        yield "rounds.codebook=mean normalises each site's codes by themselves. Take rounds.codebook=refresh."
    tuned = [protocol for protocol in study.finetune.protocols if protocol not in TUNED]
    if "finetune" in study.stages and tuned:
        yield (
            f"finetune.protocols: '{tuned[0]}' is a network of one place, sent to the server. Take "
            f"finetune.protocols=[{TUNED[0]}]."
        )
