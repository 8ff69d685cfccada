"""MedCSS: mid and deep features aligned, their coding rates tied (doi 10.3389/fnins.2026.1739716).

Self-supervised:  L = NT-Xent(g(z4)) + λ_align JS(φ3(z3), φ4(z4)) + λ_crr ReLU(±(R(z3) - R(z4)))
Supervised:       L = cross-entropy(W z4, y) + the same two terms (eq. 11)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.errors import ConfigError, one_of
from medfl.methods.base import Claim, Method, Role
from medfl.methods.medcss_losses import (
    alignment,
    check_labels,
    coding_rate,
    coding_rate_bound,
    coding_rate_hinge,
    entropies,
    supervised_loss,
)
from medfl.methods.simclr import nt_xent, positive, stacked
from medfl.models.encoders import ResNet
from medfl.models.heads import MLP
from medfl.models.layers import pooled

LEAST_ROWS = 32  # with fewer, both coding rates sit at their rank limit and the hinge says nothing
LEAST_HISTOGRAM_ROWS = 64
INERT = 1e-3  # nats; an alignment below it in both of its monitors carries no information
PREFIX = ("stem", "layer1", "layer2")


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Switches of the alignment term, eqs. (6)-(7); see configs/method/medcss.yaml."""

    weight: float
    estimator: str
    temperature: float
    heads: str
    stopgrad: str
    cross_view: bool
    hidden: int
    width: int

    def __post_init__(self) -> None:
        one_of("method.align.estimator", self.estimator, ("sample", "marginal", "histogram"))
        one_of("method.align.heads", self.heads, ("trainable", "frozen_random"))
        one_of("method.align.stopgrad", self.stopgrad, ("none", "h3"))
        positive("method.align.temperature", self.temperature)
        _not_negative("method.align.weight", self.weight)


@dataclass(frozen=True, kw_only=True)
class CodingRate:
    """Switches of the coding-rate term, eqs. (8)-(10); see configs/method/medcss.yaml."""

    weight: float
    direction: str
    features: str
    normalize: bool
    scale: str
    detach: str
    alpha: float | None

    def __post_init__(self) -> None:
        one_of("method.crr.direction", self.direction, ("equation", "text"))
        one_of("method.crr.features", self.features, ("pooled", "projected"))
        one_of("method.crr.scale", self.scale, ("none", "max"))
        one_of("method.crr.detach", self.detach, ("none", "f3"))
        _not_negative("method.crr.weight", self.weight)
        if self.alpha is not None:
            positive("method.crr.alpha", self.alpha)
        if self.scale == "max" and not self.normalize:
            raise ConfigError(
                "method.crr.scale=max: got normalize=false, but only rows of unit length bound the rate. "
                "Set method.crr.normalize=true or method.crr.scale=none."
            )


class MedCSS(Method):
    """NT-Xent or supervision, plus the two terms between the pooled features z3 (B, d3) and z4 (B, d4).

    Heads of its own are built last and without moving torch's generator, so that with both weights 0 the
    method is SimCLR bit for bit. Heads that no term uses do not exist.

    Args:
        encoder: ResNet.
        hidden, width, norm, temperature: of the contrastive loss, as in SimCLR; norm of all heads.
        objective: contrastive (two views) | supervised (first view, labels) | none (two views, `force`).
        classes: of the supervised form; 2 gives one output and binary cross-entropy.
        align, crr: the two terms.
        freeze: none | stem+layer1+layer2.
        force: allow objective=none.

    Raises:
        ConfigError: switches outside of the above or against each other.
    """

    encoder: ResNet
    classifier: nn.Linear  # supervised form only

    def __init__(
        self,
        *,
        encoder: ResNet,
        hidden: int | None,
        width: int,
        norm: str,
        temperature: float,
        objective: str,
        classes: int | None,
        align: Alignment,
        crr: CodingRate,
        freeze: str,
        force: bool,
    ) -> None:
        super().__init__()
        one_of("method.freeze", freeze, ("none", "+".join(PREFIX)))
        _refuse(objective, classes, align, crr, force=force)
        self.encoder, self.objective, self.align, self.crr = encoder, objective, align, crr
        self.temperature = positive("method.temperature", temperature)
        self.labelled = objective == "supervised"
        self.classes = classes or 0
        if objective == "contrastive":
            self.projector = MLP(widths=[encoder.width, hidden or encoder.width, width], norm=norm)
        with torch.random.fork_rng(devices=[]):
            self._build_heads(norm)
        self.claims = {name: Claim(Role.PARAMETER) for name, _ in self.named_children()}
        if freeze != "none":
            self.freeze(*(f"encoder.{name}" for name in PREFIX))
        if self._projects and align.heads == "frozen_random":
            self.freeze("align3", "align4")

    @property
    def _projects(self) -> bool:
        return self.align.weight > 0 or self.crr.features == "projected"

    def _build_heads(self, norm: str) -> None:
        d3, d4 = self.encoder.stage_widths[2:]
        if self._projects:
            self.align3 = MLP(widths=[d3, self.align.hidden, self.align.width], norm=norm)
            self.align4 = MLP(widths=[d4, self.align.hidden, self.align.width], norm=norm)
        if self.labelled:
            self.classifier = nn.Linear(d4, 1 if self.classes == 2 else self.classes)
        narrow = self.align.width if self.crr.features == "projected" else min(d3, d4)
        self.alpha = self.crr.alpha or narrow / 0.5

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Terms "nt_xent" or "supervised", "align", "crr" (unweighted), and monitors in nats.

        Raises:
            ConfigError: a batch too small for a term.
            ValueError: not two equal views, or no labels for the supervised form.
        """
        del progress  # nothing is scheduled
        z3, z4 = self._features(views[0] if self.labelled else stacked(views))
        terms, weights = self._spreading(z4, labels), {"align": self.align.weight, "crr": self.crr.weight}
        monitors: dict[str, Tensor] = {}
        if self._projects:
            h3, h4 = self.align3(z3), self.align4(z4)
            terms["align"], monitors = self._align(h3, h4)
            z3, z4 = (h3, h4) if self.crr.features == "projected" else (z3, z4)
        terms["crr"], rates = self._crr(z3, z4)
        monitors |= rates
        # a term of weight 0 is left out: 0 times infinity would spoil the total
        total = sum((w * terms[n] for n in terms if (w := weights.get(n, 1.0)) > 0), torch.zeros((), device=z4.device))
        return {"total": total, **{name: value.detach() for name, value in (terms | monitors).items()}}

    def check_labels(self, labels: Tensor) -> None:
        check_labels(labels, self.classes)

    def classify(self, images: Tensor) -> Tensor:
        """Logits of the supervised form: (B, 1) for two classes, else (B, classes).

        Raises:
            ValueError: the method was built without labels.
        """
        if not self.labelled:
            raise ValueError(f"classify: objective={self.objective} has no classifier, need objective=supervised.")
        logits: Tensor = self.classifier(self.encoder(images))
        return logits

    def probabilities(self, images: Tensor) -> Tensor:
        """(B, K) of the supervised form, with rows that sum to 1."""
        logits = self.classify(images).float()
        if logits.shape[1] > 1:
            return logits.softmax(1)
        return torch.cat([-logits, logits], dim=1).sigmoid()

    def remarks(self, means: Mapping[str, float]) -> list[str]:
        """Terms that did nothing in a whole round: a hinge that was never active, an alignment without information."""
        found = []
        if off := means.get("crr_off", 0.0):
            found.append(
                f"the coding-rate term was off for {off:.0%} of the weight: it needs {LEAST_ROWS} feature rows in a "
                f"batch, {LEAST_ROWS // 2} images ({LEAST_ROWS} in the supervised form). Raise training.batch_size, or "
                "leave it so where a site has no more images."
            )
        elif self.crr.weight > 0 and means.get("crr_active", 1.0) == 0:
            found.append(
                f"the coding-rate term was inactive in every step (direction={self.crr.direction}, "
                f"R3 {means['rate3']:.2f}, R4 {means['rate4']:.2f} nats): this round it had no effect."
            )
        spread = means.get("entropy_marginal", 1.0) - means.get("entropy_mean", 0.0)
        if self.align.weight > 0 and means.get("js", 1.0) < INERT and spread < INERT:
            found.append(f"the alignment term is inert (JS {means['js']:.1e}, entropy spread {spread:.1e} nats).")
        return found

    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) of un-augmented images through encoder and heads; with batch norm B >= 2."""
        del progress
        with torch.no_grad():
            z3, z4 = self._features(images)
            if self.objective == "contrastive":
                self.projector(z4)
            if self._projects:
                self.align3(z3)
                self.align4(z4)
        return z4

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        *_, f3, f4 = self.encoder.maps(images)
        return pooled(f3), pooled(f4)

    def _spreading(self, z4: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The loss that keeps features apart; empty for objective=none."""
        if self.objective == "contrastive":
            return {"nt_xent": nt_xent(self.projector(z4), temperature=self.temperature)}
        if not self.labelled:
            return {}
        if labels is None:
            raise ValueError("MedCSS: objective=supervised got no labels, need one per image.")
        return {"supervised": supervised_loss(self.classifier(z4), labels, classes=self.classes)}

    def _align(self, h3: Tensor, h4: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows, estimator = len(h3), self.align.estimator
        if estimator == "histogram" and rows < LEAST_HISTOGRAM_ROWS and self.align.weight > 0:
            raise ConfigError(
                f"method.align.estimator=histogram: got {rows} feature rows in a batch, need at least "
                f"{LEAST_HISTOGRAM_ROWS}. Raise training.batch_size, or take estimator=sample."
            )
        if self.align.stopgrad == "h3":
            h3 = h3.detach()
        if self.align.cross_view:
            h4 = h4.roll(rows // 2, dims=0)
        loss = alignment(h3, h4, estimator=estimator, temperature=self.align.temperature)
        with torch.no_grad():
            js = alignment(h3, h4, estimator="sample", temperature=self.align.temperature)
            marginal, mean = entropies(h3, temperature=self.align.temperature)
        return loss, {"js": js, "entropy_marginal": marginal, "entropy_mean": mean}

    def _crr(self, f3: Tensor, f4: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge; 0 in a batch too small for it, as at a site of few images: `crr_off` and `remarks` say so."""
        off = self.crr.weight == 0 or len(f3) < LEAST_ROWS
        f3 = f3.detach() if self.crr.detach == "f3" or off else f3
        rate3, rate4 = (self._rate(f) for f in (f3, f4.detach() if off else f4))
        loss = coding_rate_hinge(rate3, rate4, direction=self.crr.direction)
        if small := self.crr.weight > 0 and off:
            loss = loss * 0
        told = {"crr_active": (loss > 0).to(loss.dtype), "crr_off": torch.full_like(loss, float(small))}
        return loss, {"rate3": rate3, "rate4": rate4, **told}

    def _rate(self, features: Tensor) -> Tensor:
        rows = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
        rate = coding_rate(rows if self.crr.normalize else features, alpha=self.alpha)
        bound = coding_rate_bound(*features.shape, alpha=self.alpha) if self.crr.scale == "max" else 1.0
        return rate / bound


def _refuse(objective: str, classes: int | None, align: Alignment, crr: CodingRate, *, force: bool) -> None:
    """ConfigError for switches that contradict each other or cannot train anything."""
    one_of("method.objective", objective, ("contrastive", "supervised", "none"))
    if objective == "supervised" and (classes is None or classes < 2):
        raise ConfigError(f"method.classes: got {classes}, need at least 2 for objective=supervised.")
    if objective == "supervised" and align.cross_view:
        raise ConfigError("method.align.cross_view=true needs two views, objective=supervised has one. Set it false.")
    if objective != "none":
        return
    if crr.weight > 0 and crr.direction == "text":
        raise ConfigError(
            "method.crr.direction=text with objective=none: nothing spreads the features, collapse is an optimum. "
            "Use method.objective=contrastive or method.crr.direction=equation."
        )
    if not force or align.weight + crr.weight == 0:
        raise ConfigError(
            "method.objective=none: the two terms of MedCSS alone are no pretraining method (features lose half "
            "of their rank). Use method.objective=contrastive, or method.force=true and a weight above 0."
        )


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ConfigError(f"{name}: got {value}, need 0 or more.")
