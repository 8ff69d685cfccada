"""An image from an update, by gradient matching (Geiping et al. 2020), and what a guess without the update reaches.

The attacker has the network, the label and the update, and looks for an image whose own gradient points the same way,
smooth by its total variation. It is one attack of many: that it fails proves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.methods.base import Method
from medfl.models.similarity import ssim

STEPS, RATE, SMOOTH = 200, 0.1, 1e-3


@dataclass(frozen=True)
class Inverted:
    """SSIM of the best image found with the nearest training image, and the same of guesses from other images."""

    ssim: float
    prior: float


def gradient(method: Method, image: Tensor, label: Tensor, *, graph: bool = False) -> list[Tensor]:
    """Of the loss of images (B, C, *S) with classes (B,), for each trained parameter."""
    total = method([image], 0.0, labels=label)["total"]
    found = torch.autograd.grad(total, method.trainable(), create_graph=graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(method.trainable(), found, strict=True)]


def invert(method: Method, update: Sequence[Tensor], label: Tensor, shape: Sequence[int], *, seed: int) -> Tensor:
    """The image (1, C, *S) in [-1, 1] whose gradient has the largest cosine with an update, and smooth."""
    draw = torch.Generator().manual_seed(seed)
    image = (0.3 * torch.randn(1, *shape, generator=draw)).to(label.device).requires_grad_()
    optimizer = torch.optim.Adam([image], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = _apart(gradient(method, image, label, graph=True), update) + SMOOTH * _variation(image)
        torch.autograd.backward(loss, inputs=[image])
        if image.grad is not None:
            image.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            image.clamp_(-1, 1)
    return image.detach()


def judged(found: Tensor, truth: Tensor, others: Tensor) -> Inverted:
    """
    Args:
        found: (1, C, *S).
        truth: (n, C, *S), the images behind the update.
        others: (m, C, *S) of other patients: what a guess of a typical image would be.
    """
    guesses = torch.cat([others.mean(0, keepdim=True), others])
    prior = torch.stack([_alike(guess[None], truth).max() for guess in guesses])
    return Inverted(float(_alike(found, truth).max()), float(prior.max()))


def _alike(image: Tensor, truth: Tensor) -> Tensor:
    """SSIM (n,) of an image with each of several."""
    return torch.stack([ssim((image + 1) / 2, (one[None] + 1) / 2, span=1.0).mean() for one in truth])


def _apart(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    flat = [torch.cat([part.reshape(-1) for part in parts]) for parts in (mine, theirs)]
    return 1 - F.cosine_similarity(flat[0], flat[1], dim=0)


def _variation(image: Tensor) -> Tensor:
    return torch.stack([image.diff(dim=axis).abs().mean() for axis in range(2, image.dim())]).sum()
