"""Codebooks on the server: the first one, the merge of every round, revival, and what their sums tell.

All inputs are sums over many images of many sites; no token and no single site's code is ever looked at alone, but for
the union that starts the first codebook and for the diagnostics per site.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfl import codebooks, seeding
from medfl.codebooks import Book
from medfl.data.phantom import drawn_like
from medfl.errors import ConfigError
from medfl.gate import Update
from medfl.layout import Layout, Tensors
from medfl.methods.base import Method, Role
from medfl.models.quantizer import CodeSums
from medfl.privacy.codes import PUBLIC_IMAGES, SIGMAS, count_noise, public_seeds
from medfl.study import Study
from medfl.workshop import new_method

CALM = 2  # last rounds without revival: a new code needs some rounds to find its tokens
DEAD = 0.02  # of the mean tokens per code, of all sites together
PATIENCE = 2  # rounds below that
MOST = 0.25  # of the codes revived in one round


@dataclass(frozen=True)
class Kind:
    """What the server must know of one codebook."""

    codes: int
    decay: float
    smoothing: float
    tokens: int  # per image


def kinds_of(method: Method) -> dict[str, Kind]:
    books = method.codebooks().items()
    return {name: Kind(len(b.counts), b.decay, b.smoothing, b.tokens_per_image) for name, b in books}


def tensors_of(update: Update, layout: Layout) -> Tensors:
    """The codebook sums in an update, by name."""
    return layout.of_role(Role.CODEBOOK).unpack(update.flat)


def first(kinds: Mapping[str, Kind], updates: Sequence[Update], layout: Layout, seed: int) -> dict[str, Book]:
    """The first codebooks: weighted k-means of all sites' own centres.

    Raises:
        ConfigError: no centre of any site is used by enough images to be sent.
    """
    found = {}
    for name, kind in kinds.items():
        parts = _centres(name, updates, layout)
        if not any(float(part.counts.sum()) > 0 for part in parts):
            raise ConfigError(
                f"codebook '{name}': no centre is used by rounds.codebook_images images of any site. "
                "Lower rounds.codebook_images or the number of codes."
            )
        found[name] = codebooks.union(parts, kind.codes, seeding.generator(seed, "codebook", name))
    return found


def public(study: Study, tensors: Tensors) -> dict[str, Book]:
    """The first codebooks where a site's own centres may not be seen: clusters of the tokens of phantoms.

    Args:
        tensors: the global weights.
    """
    method = new_method(study)
    method.load_state_dict(tensors, strict=False)
    images = drawn_like(study.data, count=PUBLIC_IMAGES, classes=("smooth", "textured"), seed=0)
    found = public_seeds(method, images, study.seed)
    mass = {name: 2 * study.training.batch_size * book.tokens_per_image for name, book in method.codebooks().items()}
    return {name: Book(counts, sums).scaled(mass[name]) for name, (counts, sums) in found.items()}


def _centres(name: str, updates: Sequence[Update], layout: Layout) -> list[Book]:
    """Each site's own centres for one codebook."""
    return [Book(t[f"{name}.counts"], t[f"{name}.sums"]) for t in (tensors_of(u, layout) for u in updates)]


def joined(
    books: Mapping[str, Book], members: int, updates: Sequence[Update], layout: Layout, seed: int
) -> dict[str, Book]:
    """The codebooks of `members` sites with the centres of newcomers, each of them with the mass of one member."""
    found = {}
    for name, book in books.items():
        share = float(book.counts.sum()) / members
        new = [centres.scaled(share) for centres in _centres(name, updates, layout)]
        draw = seeding.generator(seed, "codebook", name, members)
        found[name] = codebooks.union([book, *new], len(book.counts), draw)
    return found


def lloyd(books: Mapping[str, Book], updates: Sequence[Update], layout: Layout, seed: int) -> dict[str, Book]:
    """One step of Lloyd's algorithm on the tokens of all sites; codes that got next to nothing are split off others."""
    found = {}
    for name, book in books.items():
        total = codebooks.add([_sums(update, name, layout) for update in updates])
        merged, idle = codebooks.merge_refresh(book, total, keep=0.0), torch.zeros(len(book.counts), dtype=torch.int64)
        draw = seeding.generator(seed, "codebook", name, "split")
        found[name], _, _ = codebooks.revive(merged, total, idle, share=DEAD, patience=1, most=1.0, generator=draw)
    return found


@dataclass
class Books:
    """The codebooks of one arm, over its rounds."""

    kinds: Mapping[str, Kind]
    idle: Tensors  # (K,) int64 per codebook: rounds running in which a code got next to nothing

    @classmethod
    def start(cls, kinds: Mapping[str, Kind], saved: Mapping[str, Tensor]) -> "Books":
        fresh = {name: torch.zeros(kind.codes, dtype=torch.int64) for name, kind in kinds.items()}
        return cls(kinds, {name: saved.get(f"idle/{name}", zeros) for name, zeros in fresh.items()})

    def checkpoint(self) -> Tensors:
        return {f"idle/{name}": tensor for name, tensor in self.idle.items()}

    def merge(
        self, book: Book, name: str, updates: Sequence[Update], weights: Sequence[float], layout: Layout, mode: str,
        keep: float,
    ) -> tuple[Book, dict[str, CodeSums]]:  # fmt: skip
        """The new codebook of a round by `rounds.codebook`, and each site's sums."""
        kind, sums = self.kinds[name], {u.site: _sums(u, name, layout) for u in updates}
        parts = list(sums.values())
        if mode == "refresh":
            return codebooks.merge_refresh(book, codebooks.add(parts), keep), sums
        books = [Book(part.counts, part.sums) for part in parts]
        if mode == "mean":
            return _or_old(codebooks.merge_mean(books, weights, kind.smoothing), book), sums
        steps = sum(u.metrics["site/steps"] * w for u, w in zip(updates, weights, strict=True))
        return codebooks.merge_increments(book, books, kind.decay, steps), sums

    def revive(
        self, book: Book, name: str, sums: Mapping[str, CodeSums], study: Study, *, number: int, sites: int
    ) -> tuple[Book, int]:
        """Split the codes with most distortion into those that nobody has used for two rounds.

        Under differential privacy a count below three deviations of its noise says nothing: then no code is dead that
        might be used, and none is split that might be empty.
        """
        draw = seeding.generator(study.seed, "revival", name, number)
        total = codebooks.add(list(sums.values()))
        share, tokens = DEAD, float(total.counts.sum())
        if study.privacy.on and tokens > 0:
            noise = count_noise(study.privacy, len(self.kinds)) * self.kinds[name].tokens * math.sqrt(sites)
            share = max(share, SIGMAS * noise * len(total.counts) / tokens)
        revived, self.idle[name], count = codebooks.revive(
            book, total, self.idle[name], share=share, patience=PATIENCE, most=MOST, generator=draw
        )
        return revived, count


def _or_old(book: Book, old: Book) -> Book:
    """`book`, with the old code in the place of one that no site has sent."""
    silent = book.counts <= 0
    kept = (old.counts * codebooks.FLOOR).where(silent, book.counts)
    return Book(kept, (old.sums * codebooks.FLOOR).where(silent[:, None], book.sums))


def _sums(update: Update, name: str, layout: Layout) -> CodeSums:
    found = tensors_of(update, layout)
    counts = found[f"{name}.counts"]
    return CodeSums(counts, found[f"{name}.sums"], found[f"{name}.residuals"], torch.zeros_like(counts))


def round_of(
    books: Books, tensors: Tensors, updates: Sequence[Update], weights: Sequence[float], layout: Layout, study: Study,
    number: int, *, sites: int,
) -> Iterator[tuple[str, str, float]]:  # fmt: skip
    """Move every codebook by one round, in place in `tensors`; yields (site, name, value) of its diagnostics.

    Args:
        number: of the round; 0: a refresh pass alone, whose sums are of `refresh` in every mode.
        sites: behind the updates, which may be one sum.
    """
    rounds, mode = study.rounds, study.rounds.codebook if number else "refresh"
    for name in books.kinds:
        counts, sums = tensors[f"{name}.counts"], tensors[f"{name}.sums"]
        before = Book(counts.double(), sums.double())
        if float(before.counts.sum()) == 0:  # an arm without training has no codebook
            continue
        after, parts = books.merge(before, name, updates, weights, layout, mode, rounds.codebook_keep)
        revived = 0
        if 0 < number <= rounds.count - CALM:
            after, revived = books.revive(after, name, parts, study, number=number, sites=sites)
        counts.copy_(after.counts)
        sums.copy_(after.sums)
        yield "", f"codebook/{name}/revived", float(revived)
        exact = mode == "refresh" and not study.privacy.on
        yield from _told(name, codebooks.health(before, after, parts, share=DEAD), exact=exact)


def _told(name: str, health: codebooks.Health, *, exact: bool) -> Iterator[tuple[str, str, float]]:
    for kind in ("perplexity", "dead", "rare", "drift", "exclusivity"):
        yield "", f"codebook/{name}/{kind}", float(getattr(health, kind))
    # where codes move during the round, or sums have noise, honest tokens can lie nearer to another broadcast code
    kinds = ("js", "exclusive", "error", "index_alarm") if exact else ("js", "exclusive", "error")
    for site, found in health.sites.items():
        for kind in kinds:
            yield site, f"codebook/{name}/{kind}", float(getattr(found, kind))
