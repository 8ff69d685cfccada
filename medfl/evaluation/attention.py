"""Where a classifier looks: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from medfl.evaluation.slices import FOOT, Slices, caption, picture, plane
from medfl.methods.base import Method

LEAST_SIDE = 4  # voxels of a map that still says where
LINEAR = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Attention:
    """What speaks for the class that each of B images is called.

    Attributes:
        found: (B,) int64, that class.
        probability: (B,) of it.
        maps: (B, *S) >= 0 on the grid of the images; 0 in all of an image where nothing speaks for it.
        layer: of the encoder, with the sides of its map: "layer3, 4×4".
    """

    found: Tensor
    probability: Tensor
    maps: Tensor
    layer: str


def attention(method: Method, images: Tensor) -> Attention:
    """Grad-CAM of the deepest layer whose map has `LEAST_SIDE` voxels along each axis, else of the largest map.

    Args:
        method: in evaluation mode, with `classify` and an encoder with `maps` of layer1, layer2, …; it is left as it
            is: no gradient is kept.
        images: (B, C, *S).
    """
    classifier: Any = method
    with torch.no_grad():
        probabilities = classifier.probabilities(images)
        sides = [tuple(one.shape[2:]) for one in classifier.encoder.maps(images[:1])]
    layer = f"layer{_deepest(sides) + 1}"
    found = probabilities.argmax(1)
    coarse = grad_cam(classifier.classify, method.encoder.get_submodule(layer), images, found)
    maps = interpolate(coarse[:, None], size=images.shape[2:], mode=LINEAR[images.ndim - 2])[:, 0]
    grid = "×".join(str(side) for side in coarse.shape[1:])
    values = probabilities.gather(1, found[:, None])[:, 0]
    return Attention(found.cpu(), values.cpu(), maps.cpu(), f"{layer}, {grid}")


def grad_cam(classify: Callable[[Tensor], Tensor], layer: torch.nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """ReLU(Σ_k α_k A^k), α_k the mean over space of ∂y^c / ∂A^k: (B, *s) of the layer's maps A (B, K, *s).

    Args:
        classify: logits y (B, classes) of images, or (B, 1) of the second of two classes; uses `layer` once.
        images: (B, C, *S).
        classes: c (B,).
    """
    kept: list[Tensor] = []

    def keep(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())  # a leaf: what lies below may be frozen
        return kept[-1]

    hook = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = classify(images)
            scores = torch.cat([-logits, logits], dim=1) if logits.shape[1] == 1 else logits
            (slopes,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), kept)
    finally:
        hook.remove()
    weights = slopes.flatten(2).mean(2)  # (B, K)
    return torch.einsum("bk,bk...->b...", weights, kept[0].detach()).relu()


def figure(
    looks: Mapping[int, Tensor],
    truth: Mapping[int, str],
    seen: Attention,
    classes: Sequence[str],
    spacing: Sequence[float],
) -> Slices:
    """A row for each image: itself, and what speaks for the class that was found.

    Args:
        looks: by the number of the test image, greys (1, *S) or colours (3, *S) in [0, 1]; in the order of `seen`.
        truth: by the same numbers, the class by label.
    """
    first = next(iter(looks.values()))
    sheet = Slices(first[0], len(looks), ["image", "what speaks for it"], spacing=spacing, foot=FOOT)
    for at, (row, look) in enumerate(looks.items()):
        heat, found = seen.maps[at], classes[int(seen.found[at])]
        sums = heat.flatten(0, -2).sum(0)
        place = int(sums.argmax()) if bool(sums.any()) else len(sums) // 2
        told = "correct" if found == truth[row] else f"wrong: is {truth[row]}"
        sheet.title(at, *caption(row, look[0], place), f"found {found}", f"p = {float(seen.probability[at]):.2f}", told)
        sheet.image(at, 0, picture(look, place))
        sheet.image(at, 1, plane(look.mean(0), place))  # grey, so that all colour there is the map's
        sheet.heat(at, 1, plane(heat / heat.max(), place)) if bool(sums.any()) else sheet.words(at, 1, "nowhere")
    sheet.note(f"Grad-CAM of {seen.layer} cells. The more orange, the", "more it speaks for the class that was found.")
    return sheet


def _deepest(sides: Sequence[Sequence[int]]) -> int:
    """The last layer whose map says where; without one, that with the largest map."""
    fine = [at for at, side in enumerate(sides) if min(side) >= LEAST_SIDE]
    return max(fine) if fine else max(range(len(sides)), key=lambda at: min(sides[at]))
