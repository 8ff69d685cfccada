"""Layers by number of spatial dimensions: one code for 1D features, 2D images and 3D volumes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

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


def recomputed(module: nn.Module, inputs: Tensor) -> Tensor:
    """`module(inputs)`, whose activations are computed again in the backward pass instead of being kept."""
    outputs: Tensor = checkpoint(
        module, inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _still(module))
    )
    return outputs


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Running statistics of batch norms stay: the second pass over the same images is none."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    before = [(norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
              for norm in norms]  # fmt: skip
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
