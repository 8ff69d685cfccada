"""Layers by number of spatial dimensions: one code for 1D features, 2D images and 3D volumes."""

import torch
from torch import Tensor, nn

from medfl.errors import one_of

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_POOLS: dict[int, type[nn.MaxPool2d] | type[nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_BATCH_NORMS: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
_INSTANCE_NORMS: dict[int, type[nn.InstanceNorm2d] | type[nn.InstanceNorm3d]] = {
    2: nn.InstanceNorm2d,
    3: nn.InstanceNorm3d,
}


def convolution(inputs: int, outputs: int, *, kernel: int, stride: int, dims: int) -> nn.Module:
    """A convolution without bias (a norm follows) that keeps the side at stride 1."""
    return CONVOLUTIONS[dims](inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


def max_pool(dims: int) -> nn.Module:
    """The pool of the ImageNet stem: window 3, stride 2."""
    return _POOLS[dims](3, stride=2, padding=1)


def normalization(kind: str, channels: int, *, dims: int) -> nn.Module:
    """Batch, group or instance norm with learned scale and shift.

    Raises:
        ConfigError: another kind.
    """
    one_of("encoder.norm", kind, ("batch", "group", "instance"))
    if kind == "batch":
        return _BATCH_NORMS[dims](channels)
    if kind == "group":
        return nn.GroupNorm(groups(channels), channels)
    return _INSTANCE_NORMS[dims](channels, affine=True)


def groups(channels: int) -> int:
    """The largest number of groups, at most 32, that divides `channels` and leaves 4 or more in each."""
    return max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4))


def pooled(maps: Tensor) -> Tensor:
    """Global average, (B, C, *S) -> (B, C); half precision is summed and returned as float32."""
    axes = tuple(range(2, maps.dim()))
    return maps.mean(axes, dtype=torch.promote_types(maps.dtype, torch.float32))
