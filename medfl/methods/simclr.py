"""SimCLR: contrastive learning of two views (Chen et al., arXiv:2002.05709)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.errors import ConfigError
from medfl.methods.base import Claim, Method, Role, full_precision
from medfl.models.encoders import ResNet
from medfl.models.heads import MLP


class SimCLR(Method):
    """NT-Xent on projected representations; negatives only from the site's own batch.

    Args:
        encoder: gives h (B, F).
        hidden, width, norm: of the projector; hidden null is F. Norm: batch | layer | none.
        temperature: τ > 0.

    Raises:
        ConfigError: a temperature that is not positive.
    """

    encoder: ResNet

    def __init__(self, *, encoder: ResNet, hidden: int | None, width: int, norm: str, temperature: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = MLP(widths=[encoder.width, hidden or encoder.width, width], norm=norm)
        self.claims = {"encoder": Claim(Role.PARAMETER), "projector": Claim(Role.PARAMETER)}
        self.temperature = positive("method.temperature", temperature)

    def forward(self, views: list[Tensor], progress: float, labels: Tensor | None = None) -> dict[str, Tensor]:
        del progress, labels  # nothing is scheduled, nothing is supervised
        z = self.projector(self.encoder(stacked(views)))
        total = nt_xent(z, temperature=self.temperature)
        return {"total": total, "nt_xent": total.detach()}

    def observe(self, images: Tensor, progress: float) -> Tensor:
        """Features (B, F) of un-augmented images through encoder and projector; with batch norm B >= 2."""
        del progress
        with torch.no_grad():
            features: Tensor = self.encoder(images)
            self.projector(features)
        return features


def stacked(views: list[Tensor]) -> Tensor:
    """Two views of the same images, each (B, C, *S), as one batch (2B, C, *S): one forward, one batch norm.

    Raises:
        ValueError: not two views of equal shape.
    """
    shapes = [tuple(view.shape) for view in views]
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        raise ValueError(f"got views of shapes {shapes}, need two of equal shape.")
    return torch.cat(views)


@full_precision
def nt_xent(z: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent, eq. (1), as a cross-entropy over the other 2B - 1 embeddings.

    Args:
        z: (2B, E), rows i and i + B are views of one image; normalised here.
        temperature: τ.

    Raises:
        ValueError: an odd number of rows or fewer than two images.
    """
    n = len(z)
    if n < 4 or n % 2:
        raise ValueError(f"nt_xent: got {n} embeddings, need both views of at least two images (an even number).")
    u = F.normalize(z, dim=1)
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    logits = (u @ u.T / temperature).masked_fill(itself, float("-inf"))  # (2B, 2B)
    partner = torch.arange(n, device=z.device).roll(n // 2)
    return F.cross_entropy(logits, partner)


def positive(name: str, value: float) -> float:
    """`value`, or ConfigError naming the key if it is not above 0."""
    if not value > 0:
        raise ConfigError(f"{name}: got {value}, need a number above 0.")
    return value
