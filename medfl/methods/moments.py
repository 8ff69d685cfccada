"""Batch-norm moments as plain sums, which add up over batches and sites."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Sums(NamedTuple):
    """Values per channel `n`, their sum `s` (C,) and their sum of squares `ss` (C,), float64."""

    n: int
    s: Tensor
    ss: Tensor


class Moments:
    """While active, sums the inputs of every batch norm of a module and leaves all running statistics alone.

    Layers in training mode keep normalising by their batch, as in training; frozen ones by what they hold.

        with torch.no_grad(), Moments(method) as moments:
            for images in batches:
                method.observe(images, progress)
        moments.sums["encoder.stem.1"]      # of encoder.stem.1.running_mean and running_var

    The sums are of patients' activations per channel: they travel only as the role norm_moments allows.
    """

    def __init__(self, module: nn.Module) -> None:
        named = module.named_modules()
        self._layers = {n: m for n, m in named if isinstance(m, _BatchNorm) and m.track_running_stats}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.sums: dict[str, Sums] = {}

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            layer.track_running_stats = False  # in training mode: batch statistics, and no update
            self._hooks.append(layer.register_forward_pre_hook(self._recorder(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers.values():
            layer.track_running_stats = True
        while self._hooks:
            self._hooks.pop().remove()

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            new, old = sums_of(inputs[0].detach()), self.sums.get(name)
            self.sums[name] = new if old is None else Sums(old.n + new.n, old.s + new.s, old.ss + new.ss)

        return record


def sums_of(values: Tensor) -> Sums:
    """Sums of (B, C, ...) over all axes but the channels, in float64 without a float64 copy of the maps."""
    axes = [axis for axis in range(values.dim()) if axis != 1]
    total = values.sum(axes, dtype=torch.float64)
    squares = torch.linalg.vector_norm(values, dim=axes, dtype=torch.float64).square()
    return Sums(values.numel() // values.shape[1], total, squares)


def pool(parts: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of all values by the law of total variance.

    The variance between parts is included, which an average of the parts' variances loses. It is the
    population variance; torch's own running_var has n / (n - 1) of it.

    Args:
        parts: (n, sum, sum of squares) of each batch or site; a part with n = 0 adds nothing.

    Raises:
        ValueError: no value in any part.
    """
    n = sum(part[0] for part in parts)
    if n <= 0:
        raise ValueError(f"pool: got {len(parts)} parts without a value, need at least one value.")
    mean = torch.stack([part[1] for part in parts]).sum(0) / n
    square = torch.stack([part[2] for part in parts]).sum(0) / n
    return mean, (square - mean.square()).clamp_min(0)  # rounding can leave a constant channel below 0
