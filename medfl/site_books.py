"""Codebooks at a site: their first codes, their share of the broadcast mass, and what of them is sent."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.codebooks import Book, increment
from medfl.layout import Tensors
from medfl.methods.base import Method
from medfl.models.quantizer import CodeSums, kmeans

Sums = Mapping[str, CodeSums]
TOKENS_PER_CODE = 30  # as in the rule for the number of codes


def take_prior(method: Method, images: int) -> dict[str, Book]:
    """Scale each broadcast codebook to this site's own mass, the codes stay as they are; what training starts from.

    A moving average of `images` images per step settles at their tokens. With the mass of the whole federation a
    codebook would be deaf to one site's batches.

    Args:
        images: images per step, both views counted.
    """
    prior = {}
    for name, book in method.codebooks().items():
        mass = float(book.counts.sum())
        scale = images * book.tokens_per_image / mass if mass > 0 else 1.0
        book.set(book.counts * scale, book.sums * scale)
        prior[name] = Book(book.counts.double().cpu(), book.sums.double().cpu())
    return prior


def seeds(method: Method, tokens: Mapping[str, Tensor], *, least: int, seed: torch.Generator) -> Tensors:
    """This site's own k-means of its tokens, as masses and sums per codebook; as many centres as its tokens can feed.

    Args:
        tokens: (images, tokens, D) per codebook.
        least: images that must use a centre for it to be sent.
    """
    found: Tensors = {}
    for name, book in method.codebooks().items():
        points, codes = tokens[name].flatten(0, 1), len(book.counts)
        centres = min(codes, max(1, len(points) // TOKENS_PER_CODE))
        missing = codes - centres
        counts, sums = kmeans(points, centres, generator=seed)
        book.set(F.pad(counts, (0, missing)), F.pad(sums, (0, 0, 0, missing)))
        shown = book.statistics(tokens[name].to(book.sums.device)).suppressed(least)
        found[f"{name}.counts"], found[f"{name}.sums"] = shown.counts.cpu(), shown.sums.cpu()
    return found


def refreshed(sums: Sums, least: int) -> Tensors:
    """The refresh pass's sums as they may leave: codes that fewer than `least` images use are left out."""
    found: Tensors = {}
    for name, part in sums.items():
        shown = part.suppressed(least)
        found |= {f"{name}.counts": shown.counts, f"{name}.sums": shown.sums, f"{name}.residuals": shown.residuals}
    return {name: tensor.cpu() for name, tensor in found.items()}


def trained(method: Method, prior: Mapping[str, Book], sums: Sums, *, mode: str, steps: int, least: int) -> Tensors:
    """What is sent after local training instead of the refresh pass's counts and sums.

    split_prior: what training added, N - γ^T N₀, which adds up over the sites to one machine's moving average.
    mean: N and S as they are, for the average of code vectors. Residuals are the refresh pass's, per token sent.
    """
    found: Tensors = {}
    for name, book in method.codebooks().items():
        shown = sums[name].images.cpu() >= least
        own = Book(book.counts.double().cpu(), book.sums.double().cpu())
        if mode == "split_prior":
            own = increment(prior[name], own, decay=book.decay, steps=steps)
        counts, total = own.counts.clamp_min(0).where(shown, 0), own.sums.where(shown[:, None], 0)
        residuals = sums[name].residuals.cpu() / sums[name].counts.cpu().clamp_min(1) * counts
        found |= {f"{name}.counts": counts, f"{name}.sums": total, f"{name}.residuals": residuals}
    return found
