"""Fine-tuning: each is a study of its own, whose method is the task, trained through the rounds of any other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import yaml

from medfl import arms, checkpoint, config, export
from medfl.arms import Arm
from medfl.derived import derive_tree
from medfl.enrolment import Enrolled, Federation
from medfl.errors import ConfigError
from medfl.layout import Tensors
from medfl.run_folder import RunFolder
from medfl.server_state import Blueprint
from medfl.site import CENTRAL
from medfl.study import AT_ONE_SITE, TUNED, Study

FROZEN = ("head", "federated_head")


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning: of which arm's encoder, how, with what share of the labels, and at which site if at one."""

    protocol: str
    encoder: str
    fraction: float
    site: str = ""

    @property
    def name(self) -> str:
        """Of its arm in the run folder."""
        return ":".join(filter(None, (self.protocol, self.encoder, self.site, f"{self.fraction:g}")))


@dataclass(frozen=True)
class Task:
    """What the sites' labels and masks allow: the classes or findings they agree on, and the labels of their masks."""

    classes: tuple[str, ...]
    regions: int
    findings: tuple[str, ...] = ()

    @classmethod
    def of(cls, sites: Sequence[Enrolled]) -> "Task":
        """
        Raises:
            ConfigError: two sites have other classes or findings.
        """
        known = {(site.classes, site.findings): site.name for site in sites if site.classes or site.findings}
        if len(known) > 1:
            (first, one), (second, other), *_ = ((_said(*names), site) for names, site in known.items())
            raise ConfigError(
                f"finetune: site '{one}' has the {first}, site '{other}' the {second}; need the same names in the same "
                "order everywhere. Name classes in data.classes, or findings in data.labels, at every site."
            )
        classes, findings = next(iter(known), ((), ()))
        return cls(classes, max((site.regions for site in sites), default=0), findings)


def _said(classes: Sequence[str], findings: Sequence[str]) -> str:
    return f"findings {', '.join(findings)}" if findings else f"classes {', '.join(classes)}"


def derive(study: Study, task: Task, *, protocol: str, fraction: float) -> Study:
    """The study of a fine-tuning.

    Raises:
        ConfigError: the method's encoder is not the task's, or the sites have not what the task needs.
    """
    tree = yaml.safe_load(study.source)
    method = tree["task"]
    if tree["method"].get("encoder") != method["encoder"]:
        raise ConfigError(
            f"stages has finetune, but {tree['method']['_target_']} has an encoder of its own, which no task of "
            "configs/task/ can take. Leave finetune out; method=nslf trains its segmentation in a phase of its own."
        )
    if task.findings and "classes" in method:
        raise ConfigError(
            "finetune: the sites have findings (data.labels), and task=classification learns classes. Take "
            "task=multilabel."
        )
    sizes = {"classes": len(task.classes), "labels": task.regions + 1, "outputs": len(task.findings)}
    derived = derive_tree(tree, sizes, freeze=protocol in FROZEN, fraction=fraction)
    return config.parse(yaml.safe_dump(derived, sort_keys=False, allow_unicode=True))


def tunings(study: Study, sites: Sequence[Enrolled]) -> dict[Tuning, Arm]:
    """All fine-tunings of the study, with the sites that have labels for them; each model sees equal numbers of images.

    A site's own encoder is tuned at that site alone.
    """
    able = [site for site in arms.training(sites) if _teaches(study, site)]
    whole = [site for site in sites if site.name == CENTRAL and _teaches(study, site)]
    plan, steps = study.finetune, study.finetune.steps * len(able)
    found: dict[Tuning, Arm] = {}
    for protocol in (name for name in TUNED if name in plan.protocols):
        for encoder in arms.arms_of(study, sites):
            alone = encoder.removeprefix("local:") if encoder.startswith("local:") else ""
            for fraction in sorted(plan.fractions):
                if protocol in AT_ONE_SITE:
                    own = [site for site in able if alone in ("", site.name)]
                    found |= {Tuning(protocol, encoder, fraction, site.name): Arm([site], steps) for site in own}
                elif not alone and (members := whole if protocol == "central_finetune" else able):
                    each = steps if protocol == "central_finetune" else plan.steps
                    found[Tuning(protocol, encoder, fraction)] = Arm(members, each)
    return found


def _teaches(study: Study, site: Enrolled) -> bool:
    return bool(site.masked if "labels" in study.task else site.labelled)


def finetune(federation: Federation, sites: Sequence[Enrolled]) -> None:
    """Train every fine-tuning; a finished one is not repeated.

    Raises:
        ConfigError: no site has labels or masks, or an encoder has not been trained.
    """
    study, task = federation.study, Task.of(sites)
    wanted = tunings(study, sites)
    if not wanted and study.finetune.protocols:
        raise ConfigError(
            f"stages has finetune, but no training site has {'masks' if 'labels' in study.task else 'labels'} for "
            f"{study.task['_target_']}. Choose another task=, name the column in data=, or leave finetune out."
        )
    arms.plan(replace(federation, stage="finetune"), {t.name: arm for t, arm in wanted.items()}, study.finetune.rounds)
    for tuning, arm in wanted.items():
        if not arms.finished(federation.folder, tuning.name):
            tuned = of_tuning(federation, task, tuning)
            blueprint = arms.starting_from(Blueprint.of(tuned.study), encoder_of(federation.folder, tuning.encoder))
            parent = _lineage(federation.folder, tuning.encoder)
            arms.train(tuned, tuning.name, arm, blueprint, parent=parent)


def of_tuning(federation: Federation, task: Task, tuning: Tuning) -> Federation:
    """The federation with the study of a fine-tuning."""
    study = derive(federation.study, task, protocol=tuning.protocol, fraction=tuning.fraction)
    return replace(federation, study=study, stage="finetune")


def encoder_of(folder: RunFolder, arm: str) -> Tensors:
    """The encoder's tensors of a trained arm, under the names they have in a task."""
    return {name: tensor for name, tensor in arms.weights(folder, arm).items() if name.startswith(export.PREFIX)}


def _lineage(folder: RunFolder, arm: str) -> str:
    saved, _ = checkpoint.newest(folder.arm(arm) / "checkpoints")
    return str(saved.facts["lineage"]) if saved else ""
