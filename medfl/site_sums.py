"""The plain sums of a refresh pass that a site sends, beside those of its codebooks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.evaluation import collapse
from medfl.layout import Tensors
from medfl.methods.moments import Moments


def feature_sums(features: Tensor) -> Tensors:
    """Count, sum and Σzzᵀ of the features at unit length (N, F), for the coding rate of all sites together.

    Of the symmetric Σzzᵀ the upper triangle, which is half of the bytes.
    """
    count, total, gram = collapse.sums(F.normalize(features.double(), dim=1))
    return {
        "features.count": torch.tensor([count], dtype=torch.float64),
        "features.sum": total.cpu(),
        "features.gram": collapse.triangle(gram.cpu()),
    }


def norm_sums(moments: Moments, names: Sequence[str]) -> Tensors:
    """Count, sum and sum of squares of the inputs of each of these batch norms, by channel."""
    sums: Tensors = {}
    for name in names:
        count, total, square = moments.sums[name]
        sums |= {
            f"{name}.count": torch.full_like(total, count),
            f"{name}.sum": total,
            f"{name}.square": square,
        }
    return {name: tensor.double().cpu() for name, tensor in sums.items()}
