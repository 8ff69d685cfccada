"""NSLF's network: a U-Net for each modality, their fusion into one image, and the tumour's classes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medfl.data.sample import present, whole
from medfl.errors import ConfigError, one_of
from medfl.models.blocks import NORMS, spread, taken
from medfl.models.fusion import FusionDecoder, fusion_weights
from medfl.models.layers import pooled
from medfl.models.segmenter import Segmenter
from medfl.models.unet import UNet

FUSED, SHARED = "fused", "shared"
RESERVED = (FUSED, SHARED, "bias", "outputs", "modalities")


class Maps(NamedTuple):
    """What a U-Net makes of the R images of a batch that have its modality."""

    rows: Tensor  # (R,) int64, ascending
    deep: Tensor  # (R, 8w, *S / 2^levels)
    local: Tensor  # (R, w, *S)
    reconstruction: Tensor  # (R, 1, *S) in (0, 1)


class MultimodalNet(nn.Module):
    """Features, fused image and segmentation of images (B, M, *S) in [0, 1] that may lack modalities.

    A modality that is missing is a channel of zeros: its net does not run, and nothing else sees it. An image without
    any has features and a fused image of zeros.

    Args:
        modalities: names of the channels, in order.
        spatial_dims: 2 | 3.
        base_width: channels of the U-Nets' first level; the paper's is 32.
        levels: halvings of the sides; the paper's are 4.
        norm: instance | batch | group.
        sharing: per_modality | shared (one U-Net for all modalities and the fused image, as in the authors' code).
        segment_from: both (local features and fused image) | local (features alone) | fused (the fused image alone,
            through its own U-Net).
        fused_net: with per_modality, have a U-Net for the fused image; only matching and segment_from=fused use it.
        checkpointing: compute the nets' activations again in the backward pass instead of keeping them.

    Raises:
        ConfigError: a value outside of the above.
    """

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        spatial_dims: int,
        base_width: int,
        levels: int,
        norm: str,
        sharing: str,
        segment_from: str,
        fused_net: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self._architecture: dict[str, Any] = {
            "modalities": list(modalities), "spatial_dims": spatial_dims, "base_width": base_width, "levels": levels,
            "norm": norm, "sharing": sharing, "segment_from": segment_from, "fused_net": fused_net,
            "checkpointing": checkpointing,
        }  # fmt: skip
        _refuse(self._architecture)
        self.modalities, self._base_width, self.batch_norms = tuple(modalities), base_width, norm == "batch"
        self.shared, self.segment_from, self.checkpointing = sharing == SHARED, segment_from, checkpointing
        sizes: dict[str, Any] = {"norm": norm, "spatial_dims": spatial_dims}
        names = (SHARED,) if self.shared else (*self.modalities, *((FUSED,) if fused_net else ()))
        self.nets = nn.ModuleDict(
            {name: UNet(base_width, levels=levels, reconstructs=name != FUSED, **sizes) for name in names}
        )
        self.fusion = FusionDecoder(base_width, levels=levels, **sizes)
        slots = () if segment_from == FUSED else self.modalities
        self.segmenter = Segmenter(slots, base_width, use_fused=segment_from != "local", **sizes)

    @property
    def width(self) -> int:
        """Channels of the representation."""
        return 8 * self._base_width

    def describe(self) -> dict[str, Any]:
        """The constructor call that gives this architecture again, as a configuration node."""
        return {"_target_": f"{__name__}.{type(self).__name__}", **self._architecture}

    def net(self, name: str) -> UNet:
        """The U-Net of a modality, or of the fused image."""
        unet: UNet = self.nets[SHARED if self.shared else name]  # type: ignore[assignment]
        return unet

    def forward(self, images: Tensor) -> Tensor:
        """The representation (B, 8w): mean over an image's modalities of their deep features' means."""
        held = self._held(images)
        total = torch.zeros(len(images), self.width, device=images.device)
        for name, rows in _rows(held, self.modalities, images.device).items():
            values = taken(self._channel(images, name), rows)
            total = total + spread(pooled(self.net(name).deep(values)), rows, len(images))
        return total / held.sum(1, keepdim=True).clamp_min(1).to(images.device)

    def features(self, images: Tensor) -> dict[str, Maps]:
        """Each modality's features of the images that have it; a modality that none has is left out."""
        found = _rows(self._held(images), self.modalities, images.device)
        return {
            name: Maps(rows, *self._run(self.net(name), taken(self._channel(images, name), rows)))
            for name, rows in found.items()
        }

    def features_of_fused(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Deep and local features of a fused image (B, 1, *S)."""
        found: tuple[Tensor, Tensor] = self._run(self.net(FUSED).maps, image)
        return found

    def fuse(self, images: Tensor) -> Tensor:
        """The fused image (B, 1, *S): in every voxel a weighted mean of the image's modalities."""
        return self.fused_from(images, self.features(images))

    def fused_from(self, images: Tensor, features: dict[str, Maps]) -> Tensor:
        """As `fuse`, of images whose features are known."""
        return (self.weights(images, features) * images).sum(1, keepdim=True)

    def weights(self, images: Tensor, features: dict[str, Maps]) -> Tensor:
        """What each modality counts in each voxel of the fused image, (B, M, *S)."""
        nothing = images.new_zeros(len(images), 1, *images.shape[2:])
        logits = [
            spread(self._run(self.fusion, maps.deep, maps.local), maps.rows, len(images))
            if (maps := features.get(name))
            else nothing
            for name in self.modalities
        ]
        return fusion_weights(torch.cat(logits, dim=1), present(images))

    def segment(self, images: Tensor) -> Tensor:
        """Logits (B, 4, *S): background, necrotic or non-enhancing core, oedema, enhancing tumour."""
        features = self.features(images)
        unused = self.segment_from == "local"
        return self.segmented(images[:, :1] if unused else self.fused_from(images, features), features)

    def segmented(self, image: Tensor, features: dict[str, Maps]) -> Tensor:
        """As `segment`, of images whose fused image (B, 1, *S) and features are known."""
        if self.segment_from == FUSED:
            logits: Tensor = self.segmenter({}, image=image, fused=self.features_of_fused(image)[1])
        else:
            logits = self.segmenter({name: (maps.rows, maps.local) for name, maps in features.items()}, image=image)
        return logits

    def _channel(self, images: Tensor, name: str) -> Tensor:
        place = self.modalities.index(name)
        return images[:, place : place + 1]

    def _run(self, module: Callable[..., Any], *inputs: Tensor) -> Any:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def _held(self, images: Tensor) -> Tensor:
        """Which modalities each image has, (B, M) bool, on the CPU: it decides which nets run.

        Raises:
            ValueError: another number of channels than modalities.
        """
        if images.shape[1] != len(self.modalities):
            raise ValueError(f"got images {tuple(images.shape)}, need a channel for each of {self.modalities}.")
        return present(images).cpu()


def _rows(held: Tensor, modalities: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    found = {name: column.nonzero().flatten() for name, column in zip(modalities, held.T, strict=True)}
    return {name: rows.to(device) for name, rows in found.items() if len(rows)}


def _refuse(architecture: Mapping[str, Any]) -> None:
    """ConfigError for an architecture that does not exist, by the names of the method's settings."""
    names = list(architecture["modalities"])
    one_of("method.spatial_dims", architecture["spatial_dims"], (2, 3))
    one_of("method.norm_layer", architecture["norm"], NORMS)
    one_of("method.sharing", architecture["sharing"], ("per_modality", SHARED))
    one_of("method.segment_from", architecture["segment_from"], ("both", "local", FUSED))
    for name in ("base_width", "levels"):
        if not whole(architecture[name]):
            raise ConfigError(f"method.{name}: got {architecture[name]!r}, need an integer of at least 1.")
    unusable = {name for name in names if name in RESERVED or hasattr(nn.ModuleDict, name)}
    if not names or len(set(names)) < len(names) or unusable:
        raise ConfigError(
            f"method.modalities: got {names}, need one or more names, all different, none of them "
            f"{', '.join(RESERVED)} or the name of a network's own function. Rename it in data.modalities."
        )
    if architecture["norm"] == "batch" and architecture["checkpointing"]:
        raise ConfigError(
            "method.checkpointing=true with method.norm_layer=batch would count every batch twice in the running "
            "statistics. Take norm_layer=instance or group, or checkpointing=false."
        )
    if architecture["segment_from"] == FUSED and not (architecture["fused_net"] or architecture["sharing"] == SHARED):
        raise ConfigError("method.segment_from=fused needs a network for the fused image. Set fused_net=true.")
