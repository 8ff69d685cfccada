"""Residual encoders with squeeze-and-excitation, one class for 2D and 3D (He et al. 2016; Hu et al. 2018)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.errors import ConfigError, one_of
from medfl.models.layers import convolution, max_pool, normalization, pooled, recomputed

STEMS = {"imagenet": (7, 2, True), "small": (7, 2, False), "none": (7, 1, False), "medmnist": (3, 1, False)}


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in (0, 1) computed from all pooled channels."""

    def __init__(self, channels: int, *, ratio: int) -> None:
        super().__init__()
        hidden = max(channels // ratio, 8)
        self.reduce, self.expand = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, maps: Tensor) -> Tensor:
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(pooled(maps)))))
        return maps * gate.to(maps.dtype)[(..., *[None] * (maps.dim() - 2))]


class Residual(nn.Module):
    """Convolutions, excitation, then the shortcut is added: a closed gate leaves the shortcut open."""

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        stride: int,
        bottleneck: bool,
        se_ratio: int | None,
        norm: str,
        dims: int,
    ) -> None:
        super().__init__()
        self.width = 4 * width if bottleneck else width
        plan = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        widths = [inputs, *[width] * (len(plan) - 1), self.width]
        layers: list[nn.Module] = []
        for (kernel, step), before, after in zip(plan, widths, widths[1:], strict=False):
            layers += [convolution(before, after, kernel=kernel, stride=step, dims=dims)]
            layers += [normalization(norm, after, dims=dims), nn.ReLU()]
        self.path = nn.Sequential(*layers[:-1])  # the last ReLU follows the sum
        self.excite = nn.Identity() if se_ratio is None else SqueezeExcite(self.width, ratio=se_ratio)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != self.width:
            self.shortcut = nn.Sequential(
                convolution(inputs, self.width, kernel=1, stride=stride, dims=dims),
                normalization(norm, self.width, dims=dims),
            )

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.excite(self.path(maps)) + self.shortcut(maps))


class ResNet(nn.Module):
    """ResNet-10/18/50 by `blocks` and `bottleneck`, for images or volumes.

    Args:
        blocks: residual blocks in layer1..layer4; layer2..layer4 start with stride 2.
        bottleneck: True for 1-3-1 blocks, four times as wide.
        base_width: channels of the stem; layer k has base_width * 2^(k-1), times 4 with bottlenecks.
        se_ratio: channels over hidden units of squeeze-and-excitation (at least 8 hidden); null: none.
        norm: batch | group | instance.
        stem: imagenet (7^d, stride 2, max-pool) | small (7^d, stride 2) | none (7^d, stride 1) | medmnist
            (3^d, stride 1) | auto: imagenet from side 48, small from 24, else none: 2 voxels in layer4.
        zero_init_residual: start every block as its shortcut (last norm scale 0; Goyal et al. 2017). Then the
            convolutions of a block have zero gradient in the first step.
        spatial_dims, in_channels, image_size: 2 | 3; channels; smallest side of the input in voxels.

    Weights are drawn from torch's global generator: seed it for equal encoders.

    Raises:
        ConfigError: a value outside of the above, or an image too small for the norm.
    """

    def __init__(
        self,
        *,
        blocks: list[int],
        bottleneck: bool,
        base_width: int,
        se_ratio: int | None,
        norm: str,
        stem: str,
        zero_init_residual: bool,
        spatial_dims: int,
        in_channels: int,
        image_size: int,
    ) -> None:
        super().__init__()
        one_of("encoder.spatial_dims", spatial_dims, (2, 3))
        one_of("encoder.stem", stem, ("auto", *STEMS))
        if len(blocks) != 4 or min(blocks) < 1:
            raise ConfigError(f"encoder.blocks: got {blocks}, need four counts of at least 1, e.g. [2, 2, 2, 2].")
        self.checkpointing = False  # compute the maps inside a block again in the backward pass; no part of what it is
        self._architecture: dict[str, Any] = {
            "blocks": list(blocks),
            "bottleneck": bottleneck,
            "base_width": base_width,
            "se_ratio": se_ratio,
            "norm": norm,
            "stem": stem_for(image_size) if stem == "auto" else stem,
            "zero_init_residual": zero_init_residual,
            "spatial_dims": spatial_dims,
            "in_channels": in_channels,
            "image_size": image_size,
        }
        self._refuse_single_voxels()
        kernel, stride, pool = STEMS[self._architecture["stem"]]
        self.stem = nn.Sequential(
            convolution(in_channels, base_width, kernel=kernel, stride=stride, dims=spatial_dims),
            normalization(norm, base_width, dims=spatial_dims),
            nn.ReLU(),
            *([max_pool(spatial_dims)] if pool else []),
        )
        a, b, c, d = (base_width * 2**k * (4 if bottleneck else 1) for k in range(4))
        self.stage_widths, self.width = (a, b, c, d), d
        self.layer1, self.layer2 = self._stage(0, base_width), self._stage(1, a)
        self.layer3, self.layer4 = self._stage(2, b), self._stage(3, c)
        self._initialize()

    @property
    def map_sides(self) -> tuple[int, int, int, int]:
        """Sides of the maps of layer1..layer4 in voxels, for an input of side `image_size`."""
        _, stride, pool = STEMS[self._architecture["stem"]]
        side = -(-self._architecture["image_size"] // stride)
        side = -(-side // 2) if pool else side
        return (side, -(-side // 2), -(-side // 4), -(-side // 8))

    def describe(self) -> dict[str, Any]:
        """The constructor call that gives this architecture again, as a configuration node."""
        return {"_target_": f"{__name__}.{type(self).__name__}", **self._architecture}

    def maps(self, images: Tensor) -> list[Tensor]:
        """Maps of layer1..layer4 of images (B, C, *S).

        Raises:
            ValueError: other channels or spatial dimensions than built for.
        """
        dims, channels = self._architecture["spatial_dims"], self._architecture["in_channels"]
        if images.dim() != dims + 2 or images.shape[1] != channels:
            raise ValueError(f"got images {tuple(images.shape)}, need (B, {channels}, {', '.join('DHW'[-dims:])}).")
        run = (
            self._recomputed if self.checkpointing and self.training and torch.is_grad_enabled() else nn.Module.__call__
        )
        found, current = [], run(self.stem, images)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            current = run(stage, current)
            found.append(current)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """The representation h (B, F): the mean of layer4 over space."""
        return pooled(self.maps(images)[3])

    @staticmethod
    def _recomputed(part: nn.Sequential, current: Tensor) -> Tensor:
        """Stem or stage without keeping what is inside its blocks."""
        blocks = list(part) if isinstance(part[0], Residual) else [part]
        for block in blocks:
            current = recomputed(block, current)
        return current

    def _stage(self, index: int, inputs: int) -> nn.Sequential:
        a = self._architecture
        stage = nn.Sequential()
        for block in range(a["blocks"][index]):
            residual = Residual(
                inputs,
                a["base_width"] * 2**index,
                stride=2 if index > 0 and block == 0 else 1,
                bottleneck=a["bottleneck"],
                se_ratio=a["se_ratio"],
                norm=a["norm"],
                dims=a["spatial_dims"],
            )
            stage.append(residual)
            inputs = residual.width
        return stage

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Residual) and self._architecture["zero_init_residual"]:
                nn.init.zeros_(module.path[-1].get_parameter("weight"))

    def _refuse_single_voxels(self) -> None:
        if self._architecture["norm"] == "instance" and self.map_sides[3] < 2:
            raise ConfigError(
                "encoder.norm=instance: layer4 has one voxel, nothing to normalise, for side "
                f"{self._architecture['image_size']} and stem {self._architecture['stem']!r}. "
                "Use encoder.norm=group or a larger data.size."
            )


def stem_for(side: int) -> str:
    """The stem that leaves layer4 at least 2 voxels per axis (from side 9 on)."""
    if side >= 48:
        return "imagenet"
    return "small" if side >= 24 else "none"
