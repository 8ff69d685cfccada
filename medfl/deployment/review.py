"""What a study would do at this site, computed from its invitation: what runs, and what leaves, in bytes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from medfl import __version__, config
from medfl.derived import derive_tree
from medfl.errors import ConfigError
from medfl.finetuning import FROZEN
from medfl.forms import Form
from medfl.layout import Layout, Policy, counts_layout, seed_layout, study_claims, update_layout
from medfl.messages import DESCRIBE, EVALUATE, KEYS, REFRESH, SEED, SHARES, SYNTHESIZE, TRAIN, UNMASK
from medfl.methods.base import Method, Role
from medfl.onsite.approvals import forbidden
from medfl.onsite.policy import method_name, private
from medfl.onsite.site_file import SiteFile
from medfl.provision.app import differences, version_of
from medfl.provision.documents import Invitation
from medfl.rounds import LLOYD
from medfl.secagg import layouts, shamir
from medfl.study import AT_ONE_SITE, Study
from medfl.workshop import new_method

UNKNOWN = 2  # classes, or labels of masks, where neither study nor site says how many
METRIC_BYTES = 8
METRICS = 60  # numbers of an answer, about
SITES = 16  # for the size of shares, of which there is one for each site
AROUND = {  # bytes by role of the steps around a masked answer
    KEYS: {"key": layouts.OFFER + layouts.SIGNATURE},
    SHARES: {"share": SITES * layouts.SEALED},
    UNMASK: {"share": SITES * shamir.BYTES},
}


@dataclass(frozen=True)
class Asked:
    """One kind of answer that the study asks of this site."""

    stage: str
    request: str
    times: int
    bytes: dict[str, int]  # of one answer, by role

    @property
    def total(self) -> int:
        return self.times * sum(self.bytes.values())


@dataclass(frozen=True)
class Named:
    """Texts of a data set's list that leave as names."""

    data: str  # the data set
    key: str  # label: texts in that column | classes: names given beforehand | labels: names of columns, the findings
    texts: list[str]  # the columns, or of classes the names
    own: bool  # site.yaml says so; else the study does


@dataclass(frozen=True)
class Review:
    """One page about a study, for the people who decide."""

    study_id: str
    name: str
    address: str
    created: str
    until: str
    medfl: str  # release of the bundle
    changed: list[str]  # files of the bundle that are not those of the release installed here
    method: str
    stages: list[str]
    rounds: int
    steps: int  # optimizer steps of a round
    batch: int  # images of a step
    parameters: int
    wire: str  # form of the weights in answers to training, `rounds.wire`
    privacy: dict[str, Any]  # the study's section, with this site's limits
    assumed: str  # what had to be guessed; "": nothing
    asked: list[Asked]
    named: list[Named]  # which names leave in words
    private: dict[str, int]  # role -> tensors of the method that never leave
    refused: list[str]  # why the site's policy forbids it

    @property
    def total(self) -> int:
        """Bytes of all answers."""
        return sum(row.total for row in self.asked)

    @property
    def largest(self) -> int:
        """Bytes of the largest answer."""
        return max((sum(row.bytes.values()) for row in self.asked), default=0)

    def facts(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self) | {"bytes": self.total, "largest_answer": self.largest, "allowed": not self.refused}


def review(site: SiteFile, invitation: Invitation) -> Review:
    """
    Raises:
        ConfigError: the study or the bundle cannot be read, or needs another release of medfl.
    """
    study = config.parse(invitation.config)
    try:
        method = new_method(study)
    except (TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise ConfigError(f"this medfl {__version__} cannot build the study's method: {error}.") from None
    policy = Policy.of(method, study.rounds)
    outputs, assumed = _outputs(site, study)
    asked = [row for row in _hidden(study, _asked(study, method, policy, outputs)) if row.times]
    review = Review(
        study_id=invitation.study_id,
        name=invitation.name,
        address=f"{invitation.address}:{invitation.port}",
        created=invitation.created,
        until=invitation.until,
        medfl=version_of(invitation.app),
        changed=differences(invitation.app),
        method=method_name(study.method),
        stages=list(study.stages),
        rounds=study.rounds.count,
        steps=study.training.steps,
        batch=study.training.batch_size,
        parameters=sum(parameter.numel() for parameter in method.parameters()),
        wire=study.rounds.wire,
        privacy=private(yaml.safe_load(invitation.config), site.policy),
        assumed=assumed,
        asked=asked,
        named=[row for name, own in site.data.items() for row in _named(name, own, study.data)],
        private=_private(method, policy),
        refused=forbidden(site, invitation),
    )
    if review.largest > site.policy.most_bytes:
        text = f"one answer has {review.largest} bytes: policy.most_bytes allows {site.policy.most_bytes}."
        review.refused.append(text)
    return review


def _asked(study: Study, method: Method, policy: Policy, outputs: Mapping[str, int]) -> Iterator[Asked]:
    """Each kind of answer, with how often it is given until the study ends."""
    yield _row("enrolment", DESCRIBE, 1, Layout(()))
    arms = [arm for arm in ("random", "federated", "local") if arm in study.arms]
    training = [arm for arm in arms if arm != "random"]
    sums = update_layout(method, policy, parameters=False)
    books = bool(method.codebooks()) and study.rounds.codebook != "local"
    seeded = books and not study.privacy.on  # else the first codebooks are of drawn images
    if "synthesize" in study.stages:
        yield _row("synthesize", SYNTHESIZE, 1, Layout(()))
    if "pretrain" in study.stages and study.encoders is None:
        trained = len(training)
        yield _row("pretrain", TRAIN["pretrain"], trained * study.rounds.count, _update(study, method, policy))
        yield _row("pretrain", SEED, trained * seeded, seed_layout(method))
        yield _row("pretrain", REFRESH, len(arms) + trained * seeded * LLOYD, sums)
    scored = len(arms)
    if "finetune" in study.stages:
        for frozen, times in _tunings(study, arms).items():
            layouts = _of_tuning(study, outputs, frozen=frozen)
            yield _row("finetune", TRAIN["finetune"], times * study.finetune.rounds, layouts[0])
            yield _row("finetune", REFRESH, times, layouts[1])
            scored += times
    if {"evaluate", "transfer"} & set(study.stages):
        classes, plan = outputs.get("classes", 0), study.evaluation
        protocols = plan.predicting or ("classifier",)
        yield _row("evaluate", EVALUATE, scored, counts_layout(protocols, classes if plan.counts else 0))


def _hidden(study: Study, rows: Iterable[Asked]) -> Iterator[Asked]:
    """The same answers under secure aggregation, where the study has it: masked, with the steps around each."""
    steps: dict[tuple[str, str], Asked] = {}
    for row in rows:
        if not study.secagg.active or row.request not in (*TRAIN.values(), REFRESH, SEED):
            yield row
            continue
        if row.request == SEED:
            continue
        numbers = row.bytes["metric"]
        yield replace(row, bytes={"masked": sum(row.bytes.values()) - numbers, "metric": numbers})
        for request, sizes in AROUND.items():
            before = steps.get((row.stage, request), Asked(row.stage, request, 0, sizes))
            steps[row.stage, request] = replace(before, times=before.times + row.times)
    yield from steps.values()


def _row(stage: str, request: str, times: int, layout: Layout) -> Asked:
    sizes: dict[str, int] = {}
    for slot in layout.slots:
        sizes[slot.role.value] = sizes.get(slot.role.value, 0) + slot.bytes
    return Asked(stage, request, times, sizes | {"metric": METRICS * METRIC_BYTES})


def _update(study: Study, method: Method, policy: Policy) -> Layout:
    """The answer to a training request, in its form on the wire."""
    return Form.of(study.rounds.wire, update_layout(method, policy), study.rounds.wire_share).coded


def _tunings(study: Study, arms: Sequence[str]) -> dict[bool, int]:
    """How many fine-tunings take place at one site; key: whether only the head is trained."""
    found: dict[bool, int] = {}
    for protocol in study.finetune.protocols:
        if protocol != "central_finetune":
            own = [arm for arm in arms if arm != "local" or protocol in AT_ONE_SITE]
            frozen = protocol in FROZEN
            found[frozen] = found.get(frozen, 0) + len(own) * len(study.finetune.fractions)
    return found


def _of_tuning(study: Study, outputs: Mapping[str, int], *, frozen: bool) -> tuple[Layout, Layout]:
    fraction = study.finetune.fractions[0]
    tree = derive_tree(yaml.safe_load(study.source), outputs, freeze=frozen, fraction=fraction)
    tuned = config.parse(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    method = new_method(tuned)
    policy = Policy.of(method, tuned.rounds)
    return _update(tuned, method, policy), update_layout(method, policy, parameters=False)


def _outputs(site: SiteFile, study: Study) -> tuple[dict[str, int], str]:
    """Classes or findings and labels of masks, as far as study or site name them, and what was assumed."""
    nodes = [study.data, *site.data.values()]
    classes = max((len(node["classes"]) for node in nodes if node.get("classes")), default=0)
    values = [value for node in nodes for part in (node.get("regions") or {}).values() for value in part]
    labels = len(set(values)) + 1 if values else UNKNOWN + 1
    if findings := max((len(node["labels"]) for node in nodes if node.get("labels")), default=0):
        return {"outputs": findings, "labels": labels}, ""
    assumed = "" if classes else f"{UNKNOWN} classes (neither the study nor site.yaml names them)"
    return {"classes": classes or UNKNOWN, "labels": labels}, assumed


def _named(name: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Named]:
    """What leaves in words of one data set; of a study whose data have neither column, nothing."""
    node = {**given, **own}
    if isinstance(node.get("labels"), list):
        yield Named(name, "labels", [str(column) for column in node["labels"]], "labels" in own)
    elif node.get("label") is not None:
        key = "classes" if node.get("classes") else "label"
        texts = node["classes"] if key == "classes" else [node["label"]]
        yield Named(name, key, [str(text) for text in texts], key in own)


def _private(method: Method, policy: Policy) -> dict[str, int]:
    leaves = {slot.name for slot in update_layout(method, policy).slots}
    found: dict[str, int] = {}
    for name, claim in study_claims(method, policy).items():
        if name not in leaves and claim.role in (Role.LOCAL, Role.QUEUE):
            found[claim.role.value] = found.get(claim.role.value, 0) + 1
    return found
