"""NSLF: fusion of all contrasts of a brain into one image, and its tumour, in three phases that build on each other.

features:      Σ_m (‖x̂_m - x_m‖ - λ mean_k ‖x̂_m - x_k‖)                            one U-Net per modality
fusion:        fidelity + 5 intensity + 5 (1 - SSIM) + correlation + smoothness       decoder and matching network
segmentation:  (cross-entropy + 1 - Dice) / 2                                          segmentation decoder
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from medfl.data.sample import labelled, number, present
from medfl.errors import ConfigError, one_of
from medfl.methods.base import Claim, Method, Role
from medfl.methods.nslf_losses import (
    correlation_loss,
    fusion_terms,
    reconstruction_distances,
    segmentation_terms,
    smoothness,
)
from medfl.models.blocks import taken
from medfl.models.matching import Match, Matching
from medfl.models.multimodal import FUSED, Maps, MultimodalNet
from medfl.models.segmenter import CLASSES
from medfl.models.warp import jacobian

PHASES = ("features", "fusion", "segmentation")
TERMS = ("fidelity", "intensity", "ssim", "correlation", "smoothness")


class NSLF(Method):
    """Nested training of a `MultimodalNet`; any image may lack modalities, and masks where they are not drawn.

    Args:
        modalities: names of the channels, in order; the first one's U-Net is the start of the fused image's.
        spatial_dims, base_width, levels, norm_layer, sharing, segment_from, checkpointing: of the net; norm there.
        shares: of the rounds, for features, fusion and segmentation; 0 leaves a phase out.
        fine_tune: learning rate of what an earlier phase has trained, as a part of the phase's.
        contrast: λ in [0, 1].
        norm: rmse | code, the unit of all distances (see `distances`).
        weights: of the terms fidelity, intensity, ssim, correlation and smoothness.
        use_matching: have the last two; without there is no matching network.
        rec_weight: of the features' loss in the phase fusion.
        class_weights: of background, core, oedema and enhancing tumour in the cross-entropy.

    Raises:
        ConfigError: data without named modalities, or a value outside of the above.
    """

    encoder: MultimodalNet
    segments = True
    views = 1
    needs: Mapping[str, str] = {"fusion": "paired", "segmentation": "labelled"}

    def __init__(
        self,
        *,
        modalities: Sequence[str] | None,
        spatial_dims: int,
        base_width: int,
        levels: int,
        norm_layer: str,
        sharing: str,
        segment_from: str,
        checkpointing: bool,
        shares: Sequence[float],
        fine_tune: float,
        contrast: float,
        norm: str,
        weights: Mapping[str, float],
        use_matching: bool,
        rec_weight: float,
        class_weights: Sequence[float],
    ) -> None:
        super().__init__()
        if modalities is None:
            raise ConfigError("method=nslf needs data with named modalities: data=multimodal or data=brain.")
        one_of("method.norm", norm, ("rmse", "code"))
        _refuse(shares, weights, class_weights, fine_tune=fine_tune, contrast=contrast, rec_weight=rec_weight)
        self.encoder = MultimodalNet(
            modalities=modalities, spatial_dims=spatial_dims, base_width=base_width, levels=levels, norm=norm_layer,
            sharing=sharing, segment_from=segment_from, fused_net=use_matching or segment_from == FUSED,
            checkpointing=checkpointing,
        )  # fmt: skip
        if use_matching:
            self.matching = Matching(modalities, base_width, spatial_dims=spatial_dims)
        self.use_matching, self.norm, self.fine_tune = use_matching, norm, fine_tune
        self.contrast, self.rec_weight = contrast, rec_weight
        self.weights, self.class_weights = dict(weights), tuple(class_weights)
        self.phases = {name: share for name, share in zip(PHASES, shares, strict=True) if share}
        self.phase = next(iter(self.phases))
        self.claims = {prefix: Claim(Role.PARAMETER, owner) for prefix, owner in self._owners().items()}

    def enter(self, phase: str) -> None:
        """Train by the losses of this phase.

        Raises:
            ValueError: it has no such phase.
        """
        if phase not in self.phases:
            raise ValueError(f"NSLF: got phase {phase!r}, has {', '.join(self.phases)}.")
        self.phase = phase

    def start_phase(self, phase: str) -> None:
        """Before the fused image's net is first used, it becomes a copy of the first modality's."""
        uses = next((name for name in self.phases if name != "features"), "")
        nets = self.encoder.nets
        if phase == uses and FUSED in nets:
            first = nets[self.encoder.modalities[0]].state_dict()
            nets[FUSED].load_state_dict({name: first[name] for name in nets[FUSED].state_dict()})

    def trainable(self) -> list[torch.nn.Parameter]:
        """What the phase's losses reach; what an earlier phase has trained comes along at a lower rate."""
        return [p for name, p in self.named_parameters() if name.startswith(self._trained(self.phase))]

    def rate(self, name: str) -> float:
        """`fine_tune` for what an earlier phase has trained; the fused image's net starts as a copy of such a one."""
        name = name.replace("encoder.nets.fused.", f"encoder.nets.{self.encoder.modalities[0]}.")
        earlier = takewhile(lambda phase: phase != self.phase, self.phases)
        return self.fine_tune if any(name.startswith(self._trained(phase)) for phase in earlier) else 1.0

    def holdings(self, images: Tensor, masks: Tensor | None) -> dict[str, int]:
        """Owner group -> images that can teach it: of a modality, with two or more of them, labelled, and both with it.

        With one net for all modalities its group counts pairs of image and modality.
        """
        held = present(images)
        paired, labelled = held.sum(1) > 1, _labelled(images, masks) & held.any(1)
        counts = {"paired": int(paired.sum()), "labelled": int(labelled.sum())}
        if self.encoder.shared:
            counts["shared"] = int(held.sum())
        for name, column in zip(self.encoder.modalities, held.T, strict=True):
            groups = {"modality": column, "paired": column & paired, "labelled": column & labelled}
            counts |= {f"{group}:{name}": int(rows.sum()) for group, rows in groups.items()}
        return {group: count for group, count in counts.items() if count}

    def forward(
        self, views: list[Tensor], progress: float, labels: Tensor | None = None, masks: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The phase's terms before their weights, and "learned", the share of images that it can learn from.

        A batch without any gives a total of 0 without gradient, and no terms.

        Args:
            views: one of them, (B, M, *S) in [0, 1].
            masks: (B, *S) uint8, or None; 255 in all voxels of an image that is not labelled.
        """
        del progress, labels  # nothing is scheduled but the rate; classes are in the masks
        images = views[0]
        rows = self._learnable(images, masks).nonzero().flatten()
        learned = torch.tensor(len(rows) / len(images), device=images.device)
        if not len(rows):
            return {"total": torch.zeros((), device=images.device), "learned": learned}
        total, terms = self._losses(taken(images, rows), None if masks is None else taken(masks, rows))
        return {"total": total, "learned": learned, **{name: value.detach() for name, value in terms.items()}}

    def match(self, images: Tensor) -> Match:
        """The fused image of images (B, M, *S), moved onto its sources, and by how many voxels.

        Raises:
            ValueError: there is no matching network.
        """
        if not self.use_matching:
            raise ValueError("NSLF: got use_matching=false, so there is no matching network.")
        features = self.encoder.features(images)
        return self._matched(self.encoder.fused_from(images, features), features)

    def remarks(self, means: Mapping[str, float]) -> list[str]:
        """That a whole round had nothing of what its phase learns from."""
        if means.get("learned", 1.0) > 0:
            return []
        needs = {"features": "a modality", "fusion": "two or more modalities", "segmentation": "a mask"}
        return [f"phase {self.phase}: no image with {needs[self.phase]} was seen: this round had no effect."]

    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, 8w), without gradient, after every batch norm that images can reach has seen them."""
        del progress
        with torch.no_grad():
            if self.encoder.batch_norms:
                features = self.encoder.features(images)
                image = self.encoder.fused_from(images, features)
                self.encoder.segmented(image, features)
                if FUSED in self.encoder.nets:
                    self.encoder.features_of_fused(image)
            found: Tensor = self.encoder(images)
        return found

    def _owners(self) -> dict[str, str]:
        """Prefix of tensor names -> owner group."""
        names = self.encoder.modalities
        owners = {"encoder.fusion": "paired", "encoder.segmenter": "labelled"}
        owners |= {f"encoder.nets.{name}": f"modality:{name}" for name in names}
        owners |= {"encoder.nets.fused": "paired", "encoder.nets.shared": "shared"}
        owners |= {f"encoder.segmenter.slots.{name}": f"labelled:{name}" for name in names}
        if self.use_matching:
            owners["matching"] = "paired"
            owners |= {f"matching.{head}.slots.{n}": f"paired:{n}" for head in ("affine", "deformation") for n in names}
        return owners

    def _trained(self, phase: str) -> tuple[str, ...]:
        """Prefixes of the parameters that a phase steps."""
        nets = tuple(f"encoder.nets.{name}." for name in self.encoder.nets if name != FUSED)
        fused, fusion = ("encoder.nets.fused.",), ("encoder.fusion.",)
        if phase == "features":
            return nets
        if phase == "fusion":
            return (*nets, *fused, *fusion, "matching.") if self.use_matching else (*nets, *fusion)
        chosen = {"both": fusion, "local": (), "fused": (*fusion, *fused)}[self.encoder.segment_from]
        return (*nets, *chosen, "encoder.segmenter.")

    def _learnable(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """Which images the phase learns from, (B,) bool."""
        held = present(images)
        if self.phase == "segmentation":
            return held.any(1) & _labelled(images, masks)
        return held.sum(1) > (1 if self.phase == "fusion" else 0)

    def _losses(self, images: Tensor, masks: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The phase's total and its terms, of images that it can learn from."""
        if self.phase == "segmentation" and masks is not None:
            terms = segmentation_terms(self.encoder.segment(images), masks, class_weights=self.class_weights)
            return torch.stack(list(terms.values())).mean(), terms
        return self._features(images) if self.phase == "features" else self._fusion(images)

    def _features(self, images: Tensor, features: dict[str, Maps] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Each modality's mean over the images that have it, summed over modalities."""
        held, sums = present(images), []
        for name, maps in (features or self.encoder.features(images)).items():
            own, other = reconstruction_distances(
                maps.reconstruction, taken(images, maps.rows), taken(held, maps.rows),
                place=self.encoder.modalities.index(name), others=self.contrast > 0, norm=self.norm,
            )  # fmt: skip
            sums.append(torch.stack([own.mean(), other.mean()]))
        near, far = torch.stack(sums).sum(0).unbind()
        return near - self.contrast * far, {"reconstruction": near / len(sums), "others": far / len(sums)}

    def _fusion(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.encoder.features(images)
        fused = self.encoder.fused_from(images, features)
        held = present(images)
        some = held.any(0).nonzero().flatten()  # what nobody in the batch has costs nothing
        sources, held = images.index_select(1, some) if len(some) < held.shape[1] else images, held[:, some]
        terms, monitors = fusion_terms(fused, sources, held, norm=self.norm), {}
        if self.use_matching:
            match = self._matched(fused, features)
            terms["correlation"] = correlation_loss(match.warped, sources, held)
            terms["smoothness"] = smoothness(match.local)
            monitors = _moved(match.field)
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        if self.rec_weight:
            loss, found = self._features(images, features)
            total, monitors = total + self.rec_weight * loss, monitors | found
        return total, terms | monitors

    def _matched(self, fused: Tensor, features: dict[str, Maps]) -> Match:
        deep = {name: (maps.rows, maps.deep) for name, maps in features.items()}
        local = {name: (maps.rows, maps.local) for name, maps in features.items()}
        match: Match = self.matching(deep, local, image=fused, fused=self.encoder.features_of_fused(fused))
        return match


def _labelled(images: Tensor, masks: Tensor | None) -> Tensor:
    """Which images have a mask, (B,) bool."""
    if masks is None:
        return torch.zeros(len(images), dtype=torch.bool, device=images.device)
    return labelled(masks)


def _moved(field: Tensor) -> dict[str, Tensor]:
    """Mean displacement in voxels, and the share of voxels where the field folds."""
    with torch.no_grad():
        shift = torch.linalg.vector_norm(field, dim=1).mean()
        return {"shift": shift, "folds": (jacobian(field) <= 0).to(shift.dtype).mean()}


def _refuse(
    shares: Sequence[float], weights: Mapping[str, float], class_weights: Sequence[float], **others: float
) -> None:
    """ConfigError for numbers that do not belong together or are negative."""
    if len(shares) != len(PHASES) or not all(number(share) for share in shares) or not sum(shares) > 0:
        raise ConfigError(
            f"method.shares: got {list(shares)}, need numbers of at least 0 for {', '.join(PHASES)}, and one above it."
        )
    if set(weights) != set(TERMS) or not all(number(weight) for weight in weights.values()):
        raise ConfigError(
            f"method.weights: got {dict(weights)}, need a number of at least 0 for each of {', '.join(TERMS)}."
        )
    if len(class_weights) != CLASSES or not all(number(weight) for weight in class_weights) or not sum(class_weights):
        raise ConfigError(f"method.class_weights: got {list(class_weights)}, need {CLASSES} numbers of at least 0.")
    for name, value in others.items():
        if not number(value) or (name == "contrast" and value > 1):
            need = "a number in [0, 1]" if name == "contrast" else "a number of at least 0"
            raise ConfigError(f"method.{name}: got {value!r}, need {need}.")
