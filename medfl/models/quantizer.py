"""Vector quantisation of unit tokens; the codebook is a moving average of plain sums (van den Oord et al. 2017, A.1).

The codebook is held as N, the tokens per code, and S, their sum; the code vectors follow from them. Sums add up over
batches and sites, code vectors do not.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfl.errors import ConfigError

CPU_CHUNK = 256  # tokens scored at once: 2 MiB of scores for 2048 codes stay in the cache of the processor
LARGEST_CHUNK = 8192  # on other devices: 64 MiB of scores for 2048 codes
SAME = 1e-6  # 1 - cosine below which two unit vectors are one point: the rounding of float32
SEEDED_FROM = 16  # points per code among which k-means looks for its first centres


@dataclass(frozen=True)
class Quantized:
    """Tokens as codes.

    Attributes:
        tokens: (B, N, D) codes, with the gradient of the input: d tokens / d input is the identity.
        codes: (B, N, D) the same values, without gradient.
        indices: (B, N) int64.
        commitment: mean over tokens and dimensions of (sg[e_k] - x)², DiSSECT eq. (5) without β.
    """

    tokens: Tensor
    codes: Tensor
    indices: Tensor
    commitment: Tensor


@dataclass(frozen=True)
class CodeSums:
    """What tokens say about a codebook, as float64 sums, which add up over batches and sites.

    Attributes:
        counts: (K,) tokens per code.
        sums: (K, D) sum of those tokens.
        residuals: (K,) sum of their squared distances to the code.
        images: (K,) images with at least one of them; added over batches without a common image.
    """

    counts: Tensor
    sums: Tensor
    residuals: Tensor
    images: Tensor

    def __add__(self, other: "CodeSums") -> "CodeSums":
        return CodeSums(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def suppressed(self, least: int) -> "CodeSums":
        """The same without the codes that fewer than `least` images hit: a sum of few images shows them."""
        few = (self.images < least).nonzero()[:, 0]
        return CodeSums(**{name: value.index_fill(0, few, 0) for name, value in vars(self).items()})


class Quantizer(nn.Module):
    """Nearest of K unit codes, which follow the tokens by N <- γN + (1-γ)n and S <- γS + (1-γ)s.

    Start it with `set` and the sums of `kmeans`. Until then it has no mass, and every token gets the zero vector.
    A code without mass takes no token; only `set` brings it back.

    Args:
        codes: K.
        width: D, channels of a token.
        decay: γ in [0, 1).
        smoothing: ε >= 0 of the Laplace smoothing of N.
        tokens_per_image: N, cells of the map that the tokens come from.

    Raises:
        ConfigError: a number outside of its range.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, *, codes: int, width: int, decay: float, smoothing: float, tokens_per_image: int) -> None:
        super().__init__()
        if min(codes, width, tokens_per_image) < 1 or not 0 <= decay < 1 or smoothing < 0:
            raise ConfigError(
                f"quantizer: got codes={codes}, width={width}, tokens_per_image={tokens_per_image}, decay={decay}, "
                f"smoothing={smoothing}; need the first three at least 1, decay in [0, 1) and smoothing at least 0."
            )
        self.decay, self.smoothing, self.tokens_per_image = decay, smoothing, tokens_per_image
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", torch.zeros(codes, width))

    @property
    def ready(self) -> bool:
        """Whether the codebook holds any mass."""
        return bool(self.counts.sum() > 0)

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        """(K, D) rows e = S / N̂ at unit length, N̂ = (N + ε) / (ΣN + Kε) ΣN; zero where there is no sum.

        At unit length the smoothing only keeps the division defined. It is never written back: N would be no sum.
        """
        total = self.counts.sum()
        smoothed = (self.counts + self.smoothing) * (total / (total + len(self.counts) * self.smoothing))
        return _unit(torch.where(smoothed[:, None] > 0, self.sums / smoothed[:, None], 0))

    def assign(self, tokens: Tensor) -> Tensor:
        """Index of the nearest code of each token, (..., D) -> (...); a code without mass is nearest to none."""
        return _nearest(tokens.detach(), self.code_vectors(), self.counts > 0)

    def forward(self, tokens: Tensor) -> Quantized:
        """The codes of unit tokens (B, N, D), in float32 or float64; changes no state."""
        wide, vectors = _widened(tokens), self.code_vectors()
        indices = _nearest(wide.detach(), vectors, self.counts > 0)
        codes = vectors.to(wide.dtype).index_select(0, indices.flatten()).view_as(wide)
        through = codes + (wide - wide.detach())  # its value is exactly that of the codes
        return Quantized(through, codes, indices, F.mse_loss(wide, codes))

    @torch.no_grad()
    def update(self, tokens: Tensor, indices: Tensor) -> None:
        """One step of the moving averages from tokens (..., D) and their codes (...); none in evaluation mode."""
        if not self.training:
            return
        flat, found = tokens.reshape(-1, tokens.shape[-1]).to(self.sums.dtype), indices.reshape(-1)
        # index_add_ for the counts too: bincount would wait for the device. Whole numbers first: they add exactly
        counts = torch.zeros_like(self.counts).index_add_(0, found, torch.ones_like(flat[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, found, flat)
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)

    @torch.no_grad()
    def statistics(self, tokens: Tensor) -> CodeSums:
        """Sums of tokens (B, N, D), one row of B per image, by the nearest of the present codes."""
        vectors = self.code_vectors()
        indices = _nearest(tokens, vectors, self.counts > 0)
        flat, found = tokens.reshape(-1, tokens.shape[-1]), indices.reshape(-1)
        counts, sums = _sums_by_code(flat, found, len(vectors), weights=None)
        residuals = torch.zeros_like(counts).index_add_(0, found, _squared_distances(flat, vectors, found).double())
        hit = torch.zeros(len(tokens), len(vectors), dtype=torch.bool, device=tokens.device)
        return CodeSums(counts, sums, residuals, hit.scatter_(1, indices, True).sum(0).double())

    @torch.no_grad()
    def set(self, counts: Tensor, sums: Tensor) -> None:
        """Replace N and S by counts (K,) and sums (K, D) of any float type.

        Raises:
            ValueError: another shape.
        """
        got, need = (*counts.shape, *sums.shape), (*self.counts.shape, *self.sums.shape)
        if got != need:
            raise ValueError(
                f"Quantizer.set: got counts {tuple(counts.shape)} and sums {tuple(sums.shape)}, need "
                f"{tuple(self.counts.shape)} and {tuple(self.sums.shape)}. Use a codebook of the same codes and width."
            )
        self.counts.copy_(counts)
        self.sums.copy_(sums)


@torch.no_grad()
def kmeans(
    points: Tensor,
    codes: int,
    *,
    generator: torch.Generator,
    weights: Tensor | None = None,
    iterations: int = 10,
) -> tuple[Tensor, Tensor]:
    """Spherical k-means: float64 masses (codes,) and sums (codes, D) of the members of each cluster.

    Seeds as k-means++ (Arthur and Vassilvitskii 2007) with the distance 1 - cosine; an empty cluster restarts at the
    point that is farthest from its centre. With fewer different points than codes, the masses of the rest are 0.

    Args:
        points: (T, D) of unit length.
        codes: K.
        generator: on any device; the same draws everywhere.
        weights: (T,) >= 0; None counts every point once.
        iterations: Lloyd iterations.

    Raises:
        ValueError: no mass, a negative weight, or another number of weights than points.
    """
    mass = torch.ones(len(points), device=points.device) if weights is None else weights
    if points.dim() != 2 or mass.shape != points.shape[:1] or not mass.sum() > 0 or mass.min() < 0:
        raise ValueError(
            f"kmeans: got points {tuple(points.shape)} and weights {tuple(mass.shape)} of sum {float(mass.sum()):g}, "
            "need (T, D) and (T,) >= 0 of a positive sum. Leave out a site without points."
        )
    points, mass = _unit(_widened(points)), mass.double()  # half precision is of unit length to 1 %
    centres = _seeds(points, mass, codes, generator)
    for _ in range(iterations):
        found = _nearest(points, centres, centres.any(1))
        masses, sums = _sums_by_code(points, found, codes, weights=mass)
        distances = _squared_distances(points, centres, found).double()
        far = mass * distances.where(distances > 2 * SAME, 0)
        centres = _restarted(_unit(sums).to(points.dtype), points, far, masses)
    found = _nearest(points, centres, centres.any(1))
    return _sums_by_code(points, found, codes, weights=mass)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the usage (K,): K where uniform, 1 for a single code, 0 without mass."""
    total = counts.double().sum()
    usage = counts.double() / total
    return torch.where(total > 0, torch.exp(-torch.xlogy(usage, usage).sum()), 0)


def _nearest(tokens: Tensor, vectors: Tensor, live: Tensor) -> Tensor:
    """Index of the unit row of `vectors` (K, D) with the largest cosine, among the live, of (..., D) -> (...)."""
    flat = _widened(tokens).reshape(-1, tokens.shape[-1])
    transposed = vectors.to(flat.dtype).T
    bias = torch.zeros_like(transposed[0]).masked_fill(~live, -torch.inf)
    found = torch.empty(len(flat), dtype=torch.int64, device=flat.device)
    size = CPU_CHUNK if flat.device.type == "cpu" else LARGEST_CHUNK
    scores = flat.new_empty(min(size, len(flat)), len(vectors))
    for rows, to in zip(torch.split(flat, size), torch.split(found, size), strict=True):
        # into given memory: no new pages, and autocast leaves such calls in full precision
        _argmax(torch.addmm(bias, rows, transposed, out=scores[: len(rows)]), out=to)
    return found.view(tokens.shape[:-1])


def _argmax(scores: Tensor, *, out: Tensor) -> None:
    """Index of the largest of each row of (T, K): the best of each of K / 32 interleaved groups, then within one.

    torch.argmax itself costs a third of the matrix product before it, torch.amax next to nothing.
    """
    size = math.gcd(scores.shape[1], 32)
    groups = scores.shape[1] // size
    grouped = scores.view(len(scores), size, groups)
    group = grouped.amax(1).argmax(1)
    member = grouped.gather(2, group[:, None, None].expand(-1, size, 1))[..., 0].argmax(1)
    torch.add(group, member, alpha=groups, out=out)


def _sums_by_code(points: Tensor, found: Tensor, codes: int, *, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float64 masses (K,) and weighted sums (K, D) of points (T, D) with codes (T,)."""
    ones = torch.ones_like(found, dtype=torch.float64) if weights is None else weights
    masses = torch.zeros(codes, dtype=torch.float64, device=points.device).index_add_(0, found, ones)
    sums = torch.zeros(codes, points.shape[1], dtype=torch.float64, device=points.device)
    for rows, to, share in zip(*(torch.split(x, LARGEST_CHUNK) for x in (points, found, ones)), strict=True):
        sums.index_add_(0, to, rows.double() * share[:, None])
    return masses, sums


def _squared_distances(points: Tensor, vectors: Tensor, found: Tensor) -> Tensor:
    """|x - e|² (T,) of points (T, D) to their codes (T,), without a (T, D) copy of the codes."""
    parts = zip(torch.split(points, LARGEST_CHUNK), torch.split(found, LARGEST_CHUNK), strict=True)
    return torch.cat([(_widened(rows) - vectors[to]).square().sum(1) for rows, to in parts])


def _seeds(points: Tensor, mass: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """First centres (codes, D) of k-means; zero rows where the different points ran out.

    They are looked for among the points of `SEEDED_FROM * codes` draws: more would cost more than the iterations.
    """
    if len(points) > SEEDED_FROM * codes:
        some = torch.unique(_draw(mass, SEEDED_FROM * codes, generator))
        points, mass = points[some], mass[some]
    centres = torch.zeros(codes, points.shape[1], dtype=points.dtype, device=points.device)
    chance = mass
    apart, cosines = torch.full_like(mass, torch.inf), torch.empty_like(points[:, 0])
    for row in centres:
        if not chance.sum() > 0:
            break
        row.copy_(points[_draw(chance, 1, generator)[0]])
        apart = torch.minimum(apart, 1 - torch.mv(points, row, out=cosines).double())
        chance = mass * apart.where(apart > SAME, 0)
    return centres


def _draw(chances: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Indices (number,) drawn with replacement, by numbers that do not depend on the device of `chances`."""
    cumulative = chances.cumsum(0)
    uniform = torch.rand(number, dtype=torch.float64, generator=generator, device=generator.device)
    return torch.searchsorted(cumulative, uniform.to(chances.device) * cumulative[-1])


def _restarted(centres: Tensor, points: Tensor, far: Tensor, masses: Tensor) -> Tensor:
    """Centres with each empty cluster moved onto one of the points with the largest `far`."""
    empty = (masses <= 0).nonzero()[:, 0]
    farthest = far.topk(min(len(empty), len(far))).indices
    farthest = farthest[far[farthest] > 0]
    centres[empty[: len(farthest)]] = points[farthest]
    return centres


def _unit(rows: Tensor) -> Tensor:
    """Rows at unit length, zero rows as they are; by their largest entry first, so that no square underflows."""
    tiny = torch.finfo(rows.dtype).tiny
    return F.normalize(rows / rows.abs().amax(1, keepdim=True).clamp_min(tiny), dim=1)


def _widened(tokens: Tensor) -> Tensor:
    """Half precision as float32."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))
