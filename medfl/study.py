"""A study: one resolved configuration, typed. Everything below `config.py` sees these classes, never a DictConfig."""

from dataclasses import dataclass
from typing import Any

from medfl.errors import ConfigError, one_of
from medfl.names import ARMS
from medfl.protection import Privacy, Secagg, Section

Node = dict[str, Any]  # one component: `_target_` and the arguments of that one constructor call

STAGES = ("synthesize", "pretrain", "finetune", "evaluate", "transfer", "report")
SCHEDULES = ("cosine", "steps")
LEAST_COUNT = 3  # patients behind a count that may leave a site
PROTOCOLS = ("linear", "knn", "classifier", "fusion", "segmentation")
TUNED = ("finetune", "head", "federated_finetune", "federated_head", "central_finetune")
AT_ONE_SITE = ("finetune", "head")  # of TUNED: a network of one site, for everybody's steps
WIRES = ("fp32", "bf16", "fp16", "int8", "topk")
MOST_SHARE = 0.5  # of values in wire=topk: each takes its place along, so more would be no smaller than all


def check_fractions(at: str, fractions: tuple[float, ...]) -> None:
    """
    Raises:
        ConfigError: no share, one outside (0, 1], or one twice.
    """
    if not fractions or not all(0.001 <= f <= 1 for f in fractions) or len(set(fractions)) < len(fractions):
        raise ConfigError(f"{at}: got {list(fractions)}, need shares from 0.001 to 1, each once, such as [0.1, 1.0].")


@dataclass(frozen=True)
class Training(Section):
    """Local training: what one site does in one round."""

    steps: int  # optimizer steps per round
    batch_size: int  # volumes; each gives two views
    optimizer: Node
    schedule: str  # cosine | steps
    warmup: float  # share of the whole schedule with a rising learning rate
    optimizer_state: str  # reset | keep: its moments at the start of a round
    precision: str  # auto | fp32 | bf16
    channels_last: str  # auto (on CUDA only) | always | never
    device: str  # auto | cpu | cuda
    threads: int  # CPU threads per process; equal counts give equal bits
    parts: int  # of a batch, computed one after another for one step
    checkpointing: bool  # compute activations of an encoder again in the backward pass
    synthetic: float  # synthetic images per real one, from this site's own stage synthesize
    label_fraction: float  # of each site's patients of each class whose labels a method that needs them may read
    label_least: int  # patients of each class that keep theirs, however small the share


@dataclass(frozen=True)
class Rounds(Section):
    """The federation: how many rounds, over which carrier, and when a round counts."""

    count: int
    carrier: str  # inprocess | workers | ray
    workers: int | str  # processes of carrier=workers; auto: as many as cores and free memory allow
    ray_address: str | None  # of a Ray cluster that runs already; None: one is started on this machine
    quorum: float  # least share of the enrolled sites that must give a usable update
    deadline: float  # s, for one round
    norm: str  # pooled | local_statistics | local
    codebook: str  # refresh | split_prior | mean | local
    codebook_keep: float  # share of the old codebook in the new one, where codebook=refresh
    codebook_images: int  # a site leaves out the codes that fewer of its images use
    target: str  # auto (the method's own) | average | shift | reset | local
    queue: str  # refresh | keep | clear: what a round starts with
    queue_age: int  # where queue=keep: rounds after which a key is dropped
    blend: str  # none | paper | code: how much of a site's own weights it keeps (FedEMA)
    blend_tau: float
    gram: str  # auto | always | never: sums of the features' products
    on_collapse: str  # stop | warn
    refresh_volumes: int  # volumes per site in the refresh pass
    max_share: float  # largest weight of one site
    max_update: float  # largest L2 norm of an update, in units of the broadcast's
    max_growth: float  # largest L2 norm of an update, in units of the median accepted so far
    inspect: str  # none | flag | exclude: sites whose updates stick out
    wire: str  # fp32 | bf16 | fp16 | int8 | topk: the form of weights in training requests
    wire_share: float  # of the values that wire=topk sends
    keep_checkpoints: int

    def __post_init__(self) -> None:
        one_of("rounds.carrier", self.carrier, ("inprocess", "workers", "ray"))
        if self.workers != "auto" and not (isinstance(self.workers, int) and self.workers > 0):
            raise ConfigError(f"rounds.workers: got {self.workers!r}, need auto or a number above 0.")
        one_of("rounds.norm", self.norm, ("pooled", "local_statistics", "local"))
        one_of("rounds.codebook", self.codebook, ("refresh", "split_prior", "mean", "local"))
        one_of("rounds.target", self.target, ("auto", "average", "shift", "reset", "local"))
        one_of("rounds.queue", self.queue, ("refresh", "keep", "clear"))
        one_of("rounds.blend", self.blend, ("none", "paper", "code"))
        one_of("rounds.gram", self.gram, ("auto", "always", "never"))
        one_of("rounds.inspect", self.inspect, ("none", "flag", "exclude"))
        one_of("rounds.wire", self.wire, WIRES)
        if not 0 < self.wire_share <= MOST_SHARE:
            raise ConfigError(f"rounds.wire_share: got {self.wire_share}, need a share above 0, up to {MOST_SHARE}.")
        one_of("rounds.on_collapse", self.on_collapse, ("stop", "warn"))
        for name, share in {"codebook_keep": self.codebook_keep, "blend_tau": self.blend_tau}.items():
            if not 0 <= share < 1:
                raise ConfigError(f"rounds.{name}: got {share}, need a share in [0, 1).")
        if not 0 < self.quorum <= 1:
            raise ConfigError(f"rounds.quorum: got {self.quorum}, need a share in (0, 1].")


@dataclass(frozen=True)
class Evaluation(Section):
    """Frozen-encoder evaluation at every site."""

    protocols: tuple[str, ...]  # linear | knn | classifier | fusion | segmentation
    regularization: tuple[float, ...]  # the linear probe's C, chosen on the validation split
    neighbours: int
    resamples: int  # of patients, for the 95 % intervals
    batch_size: int  # images, or windows of them, at once
    window: tuple[int, ...] | None  # voxels along each axis that are fused and segmented at once; None: all
    fractions: tuple[float, ...]  # of the labelled patients, for linear and knn
    counts: int | None  # least test patients behind a count that leaves, for curves; None: no counts leave
    pictures: str  # federated | all | none: the arms that a site draws for the people there

    @property
    def predicting(self) -> tuple[str, ...]:
        """The protocols that give each test image class probabilities."""
        return tuple(protocol for protocol in self.protocols if protocol in ("linear", "knn", "classifier"))

    def __post_init__(self) -> None:
        if self.window is not None and (not self.window or min(self.window) < 1):
            raise ConfigError(
                f"evaluation.window: got {list(self.window)}, need null or a size for each axis, above 0."
            )
        one_of("evaluation.pictures", self.pictures, ("federated", "all", "none"))
        check_fractions("evaluation.fractions", self.fractions)
        if self.counts is not None and self.counts < LEAST_COUNT:
            raise ConfigError(
                f"evaluation.counts: got {self.counts}, need null or at least {LEAST_COUNT} patients behind a count."
            )


@dataclass(frozen=True)
class Finetune(Section):
    """Training the encoders further, with labels or masks. What is not named here is as in `training` and `rounds`."""

    protocols: tuple[str, ...]
    fractions: tuple[float, ...]  # of the labelled patients of each class at each site
    rounds: int
    steps: int  # optimizer steps per round; a lone site takes everybody's
    batch_size: int  # images
    optimizer: Node
    schedule: str  # cosine | steps
    warmup: float  # share of the whole schedule
    views: Node

    def __post_init__(self) -> None:
        for protocol in self.protocols:
            one_of("finetune.protocols", protocol, TUNED)
        check_fractions("finetune.fractions", self.fractions)


@dataclass(frozen=True)
class Synthesis(Section):
    """Synthetic images: the latent diffusion model of one site, and the curation of what it makes."""

    autoencoder: Node
    denoiser: Node
    autoencoder_steps: int
    denoiser_steps: int
    batch_size: int  # images
    lr: float  # AdamW's peak: it rises for 2 % of the steps, then falls to zero as a cosine
    weight_decay: float
    kl: float  # weight of the divergence of the latents from N(0, 1), summed over an image's latents
    ssim: float  # weight of 1 - SSIM of the reconstruction
    ema: float  # largest momentum of the denoiser's average; (1 + step) / (10 + step) before
    latents: str  # sample: drawn anew in every step | mean
    held_out: float  # share of the patients whose images only choose the best weights
    check_every: int  # steps between two held-out losses, and two states on disk
    patience: int  # checks without a lower held-out loss that end a training
    sampler_steps: int  # of DDIM
    candidates: float  # images made, for each that the budget allows
    budget: float  # images kept at most, for each real training image
    features: Node  # method whose encoder judges realism and copies, pretrained on this site's images alone
    feature_steps: int

    def __post_init__(self) -> None:
        one_of("synthesis.latents", self.latents, ("sample", "mean"))
        for name in ("autoencoder_steps", "denoiser_steps", "batch_size", "check_every", "patience", "feature_steps"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"synthesis.{name}: got {value}, need at least 1.")
        for name in ("ema", "held_out"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ConfigError(f"synthesis.{name}: got {value}, need a number in [0, 1).")
        for name, least in {"candidates": 1, "budget": 0.001, "lr": 1e-12}.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"synthesis.{name}: got {getattr(self, name)}, need at least {least}.")


@dataclass(frozen=True)
class Study:
    """All of a study. `source` is its YAML text: it travels to the sites and is parsed there again."""

    seed: int
    tensorboard: bool  # whether curves are written for it
    mlflow: str | None  # folder of its database, or none
    stages: tuple[str, ...]
    arms: tuple[str, ...]
    run_dir: str
    state_dir: str
    study_id: str | None  # of a study among real sites; None: a simulation
    encoders: str | None  # finished run, or folder of an exported encoder, whose encoders take the place of pretraining
    data: Node
    sites: Node
    views: Node
    method: Node
    task: Node
    rule: Node
    server_optimizer: Node
    synthesis: Synthesis
    privacy: Privacy
    training: Training
    rounds: Rounds
    secagg: Secagg
    evaluation: Evaluation
    finetune: Finetune
    source: str

    def __post_init__(self) -> None:
        for key, got, allowed in (
            ("stages", self.stages, STAGES),
            ("arms", self.arms, ARMS),
            ("evaluation.protocols", self.evaluation.protocols, PROTOCOLS),
        ):
            for item in got:
                one_of(key, item, allowed)
        one_of("training.schedule", self.training.schedule, SCHEDULES)
        one_of("finetune.schedule", self.finetune.schedule, SCHEDULES)
        one_of("training.optimizer_state", self.training.optimizer_state, ("reset", "keep"))
        one_of("training.precision", self.training.precision, ("auto", "fp32", "bf16"))
        one_of("training.channels_last", self.training.channels_last, ("auto", "always", "never"))
        one_of("training.device", self.training.device, ("auto", "cpu", "cuda"))
        for name, value in {
            "training.steps": self.training.steps,
            "training.batch_size": self.training.batch_size,
            "training.threads": self.training.threads,
            "training.parts": self.training.parts,
            "training.label_least": self.training.label_least,
            "finetune.rounds": self.finetune.rounds,
            "finetune.steps": self.finetune.steps,
            "finetune.batch_size": self.finetune.batch_size,
            "rounds.count": self.rounds.count,
            "rounds.keep_checkpoints": self.rounds.keep_checkpoints,
            "rounds.codebook_images": self.rounds.codebook_images,
            "rounds.queue_age": self.rounds.queue_age,
            "rounds.refresh_volumes": self.rounds.refresh_volumes,
        }.items():
            if value < 1:
                raise ConfigError(f"{name}: got {value}, need at least 1.")
        if not 0 <= self.training.synthetic <= 10:
            raise ConfigError(f"training.synthetic: got {self.training.synthetic}, need a share from 0 to 10.")
        if self.rounds.ray_address and not self.state_dir.startswith("/"):
            raise ConfigError(
                f"rounds.ray_address: sites of several hosts keep their state in {self.state_dir!r}, which is another "
                "place on each. Set run.dir to an absolute path on a disk that they share."
            )
        check_fractions("training.label_fraction", (self.training.label_fraction,))
        self._check_private()

    def _check_private(self) -> None:
        if not self.privacy.on:
            return
        if "synthesize" in self.stages:
            raise ConfigError(
                "stages: synthesize makes images of patients and counts of them, without any privacy. Leave it out, or "
                "take privacy=none."
            )
        if self.data.get("slab_splits"):
            raise ConfigError(
                "data.slab_splits: each slab counts as a patient, so privacy would be that of a slab, not of a person. "
                "Set it to null, or take privacy=none."
            )
        if self.training.parts > 1:
            raise ConfigError("training.parts: under privacy gradients are of single patients or groups. Set it to 1.")
        if self.training.checkpointing:
            raise ConfigError(
                "training.checkpointing: gradients of single patients need all activations. Set it false."
            )
