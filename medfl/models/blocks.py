"""Parts of the networks for fusion and segmentation, in 2D and 3D: blocks, up-convolutions, slots, rows of a batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.models.layers import convolution, normalization

TRANSPOSED: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
NORMS = ("instance", "batch", "group")
Rows = tuple[Tensor, Tensor]  # places (R,) int64 in a batch, ascending, and a value for each (R, ...)


class InstanceNorm(nn.Module):
    """Instance norm with learned scale and shift; one voxel alone, which has no spread, is scaled and shifted only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, maps: Tensor) -> Tensor:
        if maps.shape[2:].numel() == 1:
            ones = [1] * (maps.dim() - 2)
            return maps * self.weight.view(-1, *ones) + self.bias.view(-1, *ones)
        return F.group_norm(maps.contiguous(), len(self.weight), self.weight, self.bias)


class Block(nn.Module):
    """Convolution of side 3, norm, ReLU: (B, inputs, *S) -> (B, outputs, *S).

    Attributes:
        inplace: of the ReLU, to save memory; as torch's own has it.
    """

    def __init__(self, inputs: int, outputs: int, *, norm: str, dims: int) -> None:
        super().__init__()
        self.convolution = convolution(inputs, outputs, kernel=3, stride=1, dims=dims)
        self.norm, self.inplace = norm_of(norm, outputs, dims=dims), True

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolution(ordered(maps))), inplace=self.inplace)


class Slots(nn.Module):
    """A 3-convolution over the concatenation of one input per modality, of which some images lack some.

    y = b + M / |δ| Σ_m W_m x_m + W_fused x_fused, the sum over the |δ| of M modalities that an image has. It equals
    the convolution over the concatenation where nothing is missing; the slot of a missing modality does not run, so
    it has neither a gradient nor decay. Each modality's weights are `<modality>.weight`.

    Args:
        names: of the modalities, M of them.
        inputs, outputs: channels of each input, and of the result.
        fused: whether there is an input that every image has.
    """

    def __init__(self, names: Sequence[str], inputs: int, outputs: int, *, fused: bool, dims: int) -> None:
        super().__init__()
        self.outputs, self.modalities = outputs, len(names)
        for name in (*names, *(["fused"] if fused else [])):
            self.add_module(name, convolution(inputs, outputs, kernel=3, stride=1, dims=dims))
        bound = (inputs * max(len(self._modules), 1) * 3**dims) ** -0.5  # torch's own for one convolution over all
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-bound, bound)
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, parts: Mapping[str, Rows], *, like: Tensor, fused: Tensor | None = None) -> Tensor:
        """(B, outputs, *S), with B and S of `like`, from the modalities' rows and the fused input (B, inputs, *S)."""
        ones = [1] * (like.dim() - 2)
        total = self._summed(parts, like)
        if fused is not None:
            total = total.add_(self.get_submodule("fused")(ordered(fused)))
        return total.add_(self.bias.view(-1, *ones))

    def _summed(self, parts: Mapping[str, Rows], like: Tensor) -> Tensor:
        count, total = len(like), None
        held = torch.zeros(count, device=like.device)
        for name, (rows, values) in parts.items():
            made = spread(self.get_submodule(name)(ordered(values)), rows, count)
            total = made if total is None else total.add_(made)  # convolutions do not need what they gave
            held[rows] += 1
        if total is None:
            return like.new_zeros(count, self.outputs, *like.shape[2:])
        scale = self.modalities / held.clamp_min(1)
        return total.mul_(scale.view(-1, *[1] * (like.dim() - 1)).to(total.dtype))


def norm_of(kind: str, channels: int, *, dims: int) -> nn.Module:
    """Instance norm that takes one voxel, or batch or group norm; with scale and shift."""
    return InstanceNorm(channels) if kind == "instance" else normalization(kind, channels, dims=dims)


def ordered(maps: Tensor) -> Tensor:
    """On a CPU the same maps with channels last: convolutions of few channels are about twice as fast so.

    Elsewhere as they are: `training.channels_last` decides.
    """
    if maps.device.type != "cpu":
        return maps
    return maps.contiguous(memory_format=torch.channels_last if maps.dim() == 4 else torch.channels_last_3d)


def taken(values: Tensor, rows: Tensor) -> Tensor:
    """The given rows; no copy where they are all."""
    return values if len(rows) == len(values) else values[rows]


def spread(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """`values` (R, ...) at their rows of (count, ...), zeros elsewhere; no copy where they are all."""
    if len(rows) == count:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, rows, values)
