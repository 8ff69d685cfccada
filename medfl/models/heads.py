"""Heads on the pooled representation."""

from itertools import pairwise

from torch import nn

from medfl.errors import ConfigError, one_of


class MLP(nn.Sequential):
    """Linear, norm and ReLU for each hidden width, then one Linear: (B, widths[0]) -> (B, widths[-1]).

    Args:
        widths: input, hidden..., output.
        norm: batch | layer | none. With a norm, the Linear before it has no bias.

    Raises:
        ConfigError: fewer than two widths, or another norm.
    """

    def __init__(self, *, widths: list[int], norm: str) -> None:
        one_of("norm of a head", norm, ("batch", "layer", "none"))
        if len(widths) < 2 or min(widths) < 1:
            raise ConfigError(f"widths of a head: got {widths}, need the input and the output width, both positive.")
        layers: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            layers.append(nn.Linear(before, after, bias=norm == "none"))
            if norm != "none":
                layers.append(nn.BatchNorm1d(after) if norm == "batch" else nn.LayerNorm(after))
            layers.append(nn.ReLU())
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))
