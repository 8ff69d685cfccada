"""Codebooks of several sites as one: merging, revival of dead codes, and what the sums tell of the sites.

Pure functions on the server's float64 sums. Only sums are merged: N' = Σ N_i and S' = Σ S_i are those of one machine
that saw all tokens, as long as all sites assigned by the same codes; averages of code vectors are not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medfl.models.quantizer import CodeSums, kmeans, perplexity

FLOOR = 1e-6  # share of the mean mass that a silent code keeps: float32 buffers would lose its direction far below
MARGIN = 1e-5  # cosine by which a centroid must prefer another code: far above the rounding of float32
TINY = 1e-150  # length below which a sum is no direction
DONOR = 4.0  # a donor has at least this many times the tokens below which a code is dead


@dataclass(frozen=True)
class Book:
    """A codebook as what it is made of.

    Attributes:
        counts: N (K,), tokens per code, float64.
        sums: S (K, D), sum of those tokens, float64.

    Raises:
        ValueError: other shapes or types.
    """

    counts: Tensor
    sums: Tensor

    def __post_init__(self) -> None:
        fits = self.counts.dim() == 1 and self.sums.dim() == 2 and len(self.counts) == len(self.sums)
        if not fits or {self.counts.dtype, self.sums.dtype} != {torch.float64}:
            raise ValueError(
                f"Book: got counts {tuple(self.counts.shape)} {self.counts.dtype} and sums {tuple(self.sums.shape)} "
                f"{self.sums.dtype}, need (K,) and (K, D), both float64. Convert with .double()."
            )

    def vectors(self, smoothing: float) -> Tensor:
        """(K, D) rows e = S / N̂ at unit length, N̂ = (N + ε) / (ΣN + Kε) ΣN; zero rows where there is no sum."""
        total = self.counts.sum()
        smoothed = (self.counts + smoothing) * (total / (total + len(self.counts) * smoothing))
        return F.normalize(self.sums / smoothed.where(smoothed > 0, 1)[:, None], dim=1, eps=TINY)

    def scaled(self, mass: float) -> "Book":
        """The same codes with ΣN = mass: what a site gets as its share, or a round as its prior."""
        total = float(self.counts.sum())
        factor = mass / total if total > 0 else 0.0
        return Book(self.counts * factor, self.sums * factor)


def add(parts: Sequence[CodeSums]) -> CodeSums:
    """The sums of all sites, in the given order.

    Raises:
        ValueError: no part, or parts of different shapes.
    """
    shapes = sorted({tuple(part.sums.shape) for part in parts})
    if len(shapes) != 1:
        raise ValueError(f"add: got {len(parts)} parts with sums of shapes {shapes}, need one or more of one shape.")
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def merge_refresh(book: Book, total: CodeSums, keep: float) -> Book:
    """One step on the union of the sites' tokens: N' = keep a N + (1 - keep) Σn, S' alike; keep 0 is Lloyd's.

    a gives the old book the mass of the new sums, so that `keep` is a share whatever the size of the sample. Exact
    for any number of sites and of local steps, since all looked through the broadcast codes. A code without tokens
    keeps its direction, with at least FLOOR of the mean mass; without any token the book stays as it is.

    Raises:
        ValueError: keep outside of [0, 1).
    """
    if not 0 <= keep < 1:
        raise ValueError(f"merge_refresh: got keep={keep}, need at least 0 and less than 1.")
    mass = float(total.counts.sum())
    if mass <= 0:
        return book
    old = book.scaled(mass)
    share = keep if float(old.counts.sum()) > 0 else 0.0
    counts = share * old.counts + (1 - share) * total.counts
    sums = share * old.sums + (1 - share) * total.sums
    silent = (total.counts <= 0) & (old.counts > 0)
    kept = counts.clamp_min(FLOOR * mass / len(counts))
    mean = old.sums / old.counts.where(silent, 1)[:, None]
    return Book(kept.where(silent, counts), (mean * kept[:, None]).where(silent[:, None], sums))


def increment(start: Book, end: Book, *, decay: float, steps: float) -> Book:
    """What a site's own tokens added in `steps` steps of the moving average: N - γ^τ N_0, S alike."""
    left = decay**steps
    return Book(end.counts - left * start.counts, end.sums - left * start.sums)


def merge_increments(book: Book, increments: Sequence[Book], decay: float, steps: float) -> Book:
    """N' = γ^τ N + Σ dN_i, S' alike: the moving average of one machine whose batches are the sites' together.

    Exact while assignments do not change within the round and all sites took equal steps. Each site must have started
    from its share of the book, `book.scaled(...)`, with Σ shares = 1: full copies count the past once per site.

    Args:
        increments: of each site, as `increment` gives them.
        decay: γ of one step.
        steps: τ, the mean of the sites' steps weighted by their shares.
    """
    left = decay**steps
    counts, sums = left * book.counts, left * book.sums
    for part in increments:
        counts, sums = counts + part.counts, sums + part.sums
    return Book(counts, sums)


def merge_mean(parts: Sequence[Book], weights: Sequence[float], smoothing: float) -> Book:
    """Weighted means of the code vectors and of N, with S = e N: the wrong merge that others use, as an ablation."""
    shares = torch.tensor(weights, dtype=torch.float64)[:, None] / math.fsum(weights)  # (sites, 1)
    counts = (shares * torch.stack([part.counts for part in parts])).sum(0)
    vectors = (shares[..., None] * torch.stack([part.vectors(smoothing) for part in parts])).sum(0)
    return Book(counts, F.normalize(vectors, dim=1) * counts[:, None])


def union(parts: Sequence[Book], codes: int, generator: torch.Generator) -> Book:
    """All sites' codes as weighted points, clustered to K (k-FED: Dennis et al. 2021).

    For books without a common index: independent starts, late joiners, other K per site. ΣN and ΣS are kept.

    Raises:
        ValueError: no code with mass at any site.
    """
    counts, sums = torch.cat([part.counts for part in parts]), torch.cat([part.sums for part in parts])
    points = torch.cat([part.vectors(0.0) for part in parts])
    live = (counts > 0) & points.any(1)
    if not bool(live.any()):
        raise ValueError(f"union: got {len(parts)} books without a code in use, need at least one.")
    counts, sums, points = counts[live], sums[live], points[live]
    centres = Book(*kmeans(points, codes, generator=generator, weights=counts))
    found = (points @ centres.vectors(0.0).T).argmax(1)
    return Book(
        torch.zeros(codes, dtype=counts.dtype).index_add_(0, found, counts),
        torch.zeros(codes, sums.shape[1], dtype=sums.dtype).index_add_(0, found, sums),
    )


def revive(
    book: Book,
    total: CodeSums,
    idle: Tensor,
    *,
    share: float,
    patience: int,
    most: float,
    generator: torch.Generator,
) -> tuple[Book, Tensor, int]:
    """Split the codes with the largest error in two and give one half to a dead code; no token of a site is used.

    Dead is a code with fewer than `share` of the mean tokens per code, over all sites, for `patience` rounds running.
    Donors come by decreasing residual energy q, with at least DONOR times that many tokens n. Their e becomes
    unit(e - d u), the dead one unit(e + d u), with d = sqrt(q / n) / 2 and u a random direction along the sphere; both
    get half of the two masses, and S = e N. ΣN does not change.

    Args:
        total: the sums of all sites in this round, under the codes before `book` was merged.
        idle: (K,) int64, rounds that each code has been below the threshold so far.
        most: share of K that may be revived in one round.

    Returns:
        The book, the new `idle`, and the number of revived codes.

    Raises:
        ValueError: patience below 1.
    """
    if patience < 1:
        raise ValueError(f"revive: got patience={patience}, need at least 1 round.")
    tokens, codes = float(total.counts.sum()), len(idle)
    if tokens <= 0:
        return book, idle, 0
    least = share * tokens / codes
    idle = torch.where(total.counts < least, idle + 1, 0)
    dead = _largest_first(idle.double(), idle >= patience)
    donors = _largest_first(total.residuals, (total.counts >= DONOR * least) & (total.residuals > 0))
    number = min(len(dead), len(donors), int(most * codes))
    dead, donors = dead[:number], donors[:number]
    idle[dead] = 0  # a donor's is 0 already
    return _split(book, total, dead, donors, generator), idle, number


def _largest_first(values: Tensor, allowed: Tensor) -> Tensor:
    """Indices of the allowed values in decreasing order; equal ones in the order of their index."""
    return values.where(allowed, -torch.inf).argsort(descending=True, stable=True)[: int(allowed.sum())]


def _split(book: Book, total: CodeSums, dead: Tensor, donors: Tensor, generator: torch.Generator) -> Book:
    """Each donor's code as two codes on either side of it, the second in the place of the dead one."""
    codes = book.vectors(0.0)[donors]
    random = torch.randn(codes.shape, dtype=codes.dtype, generator=generator)
    along = F.normalize(random - (random * codes).sum(1, keepdim=True) * codes, dim=1)
    shift = along * (total.residuals[donors] / total.counts[donors]).sqrt()[:, None] / 2
    counts, sums = book.counts.clone(), book.sums.clone()
    half = (counts[dead] + counts[donors]) / 2
    for place, vectors in ((dead, codes + shift), (donors, codes - shift)):
        counts[place] = half
        sums[place] = F.normalize(vectors, dim=1) * half[:, None]
    return Book(counts, sums)


@dataclass(frozen=True)
class SiteHealth:
    """How one site uses the common codebook; all 0 for a site without tokens.

    Attributes:
        js: Jensen-Shannon divergence of its usage and that of all sites, in [0, ln 2] nats.
        exclusive: share of its tokens in codes that no other site uses.
        error: mean squared distance of a token to its code.
        index_alarm: share of its tokens in codes whose centroid lies nearer to another code. Honest sums give 0, as
            the cell of a code is convex; swapped indices or other codes than the broadcast ones do not.
    """

    js: float
    exclusive: float
    error: float
    index_alarm: float


@dataclass(frozen=True)
class Health:
    """What the sums of one round say about a codebook.

    Attributes:
        perplexity: exp of the entropy of the usage by all sites, in [0, K].
        dead: share of the codes below the threshold of `revive`.
        rare: share of the codes that exactly one site uses.
        drift: |e - e_before|, mean over the codes by their new mass; code vectors have length 1.
        exclusivity: max_i p_i(k) / Σ_i p_i(k), mean over the codes by usage: 1 / sites if all use all alike, 1 if
            each has its own.
        sites: by name.
    """

    perplexity: float
    dead: float
    rare: float
    drift: float
    exclusivity: float
    sites: Mapping[str, SiteHealth]


def health(before: Book, after: Book, per_site: Mapping[str, CodeSums], *, share: float) -> Health:
    """The diagnostics of one codebook and round, from sums that crossed the wire anyway.

    Args:
        before: the broadcast book, under which the sums were taken; `after` is the merged one.
        per_site: sums by name of site, at least one.
        share: of the mean tokens per code, below which a code is dead.
    """
    total = add(list(per_site.values())).counts
    usage = torch.stack([_shares(part.counts) for part in per_site.values()])  # (sites, K)
    used_by = (usage > 0).sum(0)
    peak = usage.amax(0) / usage.sum(0).where(used_by > 0, 1)
    return Health(
        perplexity=float(perplexity(total)),
        dead=float((total < share * total.sum() / len(total)).double().mean()),
        rare=float((used_by == 1).double().mean()),
        drift=float((_shares(after.counts) * (after.vectors(0.0) - before.vectors(0.0)).norm(dim=1)).sum()),
        exclusivity=float((_shares(total) * peak).sum()),
        sites={name: _site_health(before, part, total, used_by) for name, part in per_site.items()},
    )


def _site_health(before: Book, part: CodeSums, total: Tensor, used_by: Tensor) -> SiteHealth:
    tokens, usage = float(part.counts.sum()), _shares(part.counts)
    if tokens <= 0:
        return SiteHealth(js=0.0, exclusive=0.0, error=0.0, index_alarm=0.0)
    return SiteHealth(
        js=_jensen_shannon(usage, _shares(total)),
        exclusive=float(usage[used_by == 1].sum()),
        error=float(part.residuals.sum()) / tokens,
        index_alarm=float(usage[_misplaced(before, part)].sum()),
    )


def _misplaced(book: Book, part: CodeSums) -> Tensor:
    """Codes (K,) whose centroid S_k / n_k has a larger cosine with another code in use than with e_k."""
    scores = (part.sums @ book.vectors(0.0).T).masked_fill(book.counts <= 0, -torch.inf)  # n_k times the cosine
    return scores.amax(1) - scores.diagonal() > MARGIN * part.counts


def _jensen_shannon(p: Tensor, q: Tensor) -> float:
    """JS(p || q) in nats of two distributions (K,)."""
    middle = (p + q) / 2
    to_p, to_q = (torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q))
    return max(float((to_p + to_q).sum()) / 2, 0.0)  # rounding can leave equal ones below 0


def _shares(counts: Tensor) -> Tensor:
    """Counts as shares of their sum; zeros where there are none."""
    total = counts.sum()
    return counts / total if total > 0 else torch.zeros_like(counts)
