"""What a site's own rules say about a study and about one request of it."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

STAGES = {  # request, without its kind -> stages of which one must be allowed
    "pretrain": ("pretrain",), "refresh": ("pretrain", "finetune"), "codebook": ("pretrain",),
    "keys": ("pretrain", "finetune"), "shares": ("pretrain", "finetune"), "unmask": ("pretrain", "finetune"),
    "finetune": ("finetune",), "probe": ("evaluate", "transfer"), "synthesize": ("synthesize",),
}  # fmt: skip
CODE_IMAGES = 5  # behind the sums of a code, as behind a count
NEEDED = ("pretrain", "finetune", "evaluate", "transfer", "synthesize")  # stages that ask something of a site


class Rules(Protocol):
    """The part of site.yaml under `policy`."""

    @property
    def methods(self) -> tuple[str, ...] | None: ...
    @property
    def stages(self) -> tuple[str, ...]: ...
    @property
    def least_steps(self) -> int: ...
    @property
    def least_batch(self) -> int: ...
    @property
    def privacy(self) -> Mapping[str, Any] | None: ...


def method_name(node: Mapping[str, Any]) -> str:
    """The method's short name, such as "medcss"."""
    return str(node.get("_target_", "")).split(".")[-2:][0]


def refusals(study: Mapping[str, Any], rules: Rules) -> list[str]:
    """Why these rules forbid a study (its resolved configuration); [] where they allow it."""
    found = []
    name, plan = method_name(study["method"]), study["training"]
    if rules.methods is not None and name not in rules.methods:
        found.append(f"method {name}: policy.methods allows {', '.join(rules.methods) or 'none'}.")
    wanted = [stage for stage in study["stages"] if stage in NEEDED and stage not in rules.stages]
    found += [f"stage {stage}: policy.stages allows {', '.join(rules.stages) or 'none'}." for stage in wanted]
    if rules.privacy is not None and study["privacy"]["mechanism"] == "none":
        found.append("no differential privacy: policy.privacy asks for it (privacy=patient or privacy=group).")
    found += _sums(study["rounds"], rules.least_batch)
    trainings = {"training": plan} if "pretrain" in study["stages"] else {}
    if "finetune" in study["stages"]:
        trainings["finetune"] = study["finetune"]
    for section, part in trainings.items():
        for key, least in (("steps", rules.least_steps), ("batch_size", rules.least_batch)):
            if part[key] < least:
                rule = f"policy.least_{key.partition('_')[0]}"
                found.append(f"{section}.{key}={part[key]}: {rule} asks for {least} at least.")
    return found


def _sums(rounds: Mapping[str, Any], least: int) -> Iterator[str]:
    """Sums over so few images that single ones can be read from them."""
    if rounds["refresh_volumes"] < least:
        yield f"rounds.refresh_volumes={rounds['refresh_volumes']}: policy.least_batch asks for {least} at least."
    if rounds["codebook"] != "local" and rounds["codebook_images"] < CODE_IMAGES:
        yield f"rounds.codebook_images={rounds['codebook_images']}: sums of a code are of {CODE_IMAGES} images or more."


def private(study: Mapping[str, Any], rules: Rules) -> dict[str, Any]:
    """The study's section `privacy` with this site's own limits, where they are lower."""
    section: dict[str, Any] = dict(study["privacy"])
    for name, limit in (rules.privacy or {}).items():
        section[name] = limit if section[name] is None else min(section[name], limit)
    return section
