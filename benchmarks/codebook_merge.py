"""Merging the codebooks of hospitals: reconstruction error of encoder tokens for each rule, and dead codes per round.

Tokens are those of the product: layer3 of its tiny ResNet, after a short central SimCLR pretraining with its own
training loop (`--steps 0`: random weights), then frozen; a 1x1 orthogonal projection to D = 64, unit length. They are
extracted once per set and seed, so what is compared is the merging alone. The sites are the preset `hospital`: 4 with
scanner profiles at severity 3 and log-normal sizes, here with Dirichlet 0.5 labels in place of 2.0. All arms start from
the same random tokens as codes, but the sites' own books from tokens of their own, and see the same batches; central
draws as many images a step from the pooled data. The error is the mean squared distance of a token to its code, over
the test tokens of all sites; the recovered gap is 0 for the sites' own books (each on all sites' tests) and 1 for
central. `union` joins the sites' own books once, after the last round.

The second part starts with four fifths of the codes opposite to all tokens, and counts the dead ones at each round:
those with less than 2 % of the mean tokens per code.

    python benchmarks/codebook_merge.py [--data DIR] [--sets breast pneumonia] [--seeds 0 1 2 3 4] [--json FILE]

DIR holds medmnist/ and medmnist_rebuilt/; default: MEDFL_SHARED_DATA.
"""

import argparse
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from harness import machine, write
from table import SETS
from torch import Tensor, nn
from torch.nn import functional as F

from medfl import config, seeding
from medfl.codebooks import Book, add, health, increment, merge_increments, merge_mean, merge_refresh, revive, union
from medfl.data.sites import pool
from medfl.models.encoders import ResNet
from medfl.models.quantizer import CodeSums, Quantizer, perplexity
from medfl.training import Device, Plan, Task, train_locally
from medfl.workshop import new_method, sites_of

ROOT = Path(os.environ.get("MEDFL_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
WIDTH, DECAY, SMOOTHING = 64, 0.99, 1e-5
SHARE, PATIENCE, MOST = 0.02, 2, 0.25  # of the revival
QUIET = 2  # last rounds without revival
LOCAL, CENTRAL = "local books", "central EMA"
FIGURES = ("error", "worst_site", "perplexity", "dead")


@dataclass(frozen=True)
class Contest:
    """What all arms share. Tokens are (images, N, D), one tensor per site."""

    train: list[Tensor]
    test: list[Tensor]
    start: Book  # ΣN: the tokens of one step of all sites
    seed: int
    rounds: int
    steps: int
    batch: int
    keep: float
    refresh: int  # images per site in the refresh pass

    @property
    def shares(self) -> list[float]:
        """Of the tokens of a step, by site."""
        sizes = [min(self.batch, len(tokens)) for tokens in self.train]
        return [size / sum(sizes) for size in sizes]

    def mass(self) -> float:
        return float(self.start.counts.sum())


Arm = Callable[[Contest], tuple[Book, list[float]]]  # the last book, and the share of dead codes before each round


def quantizer(book: Book, tokens: Tensor) -> Quantizer:
    """The product's quantizer with that book."""
    made = Quantizer(
        codes=len(book.counts),
        width=tokens.shape[2],
        decay=DECAY,
        smoothing=SMOOTHING,
        tokens_per_image=tokens.shape[1],
    )
    made.set(book.counts, book.sums)
    return made


def trained(book: Book, tokens: Tensor, size: int, contest: Contest, *stream: int | str) -> Book:
    """The book after one round of the quantizer's own moving average on batches of `size` images."""
    draw, local = seeding.generator(contest.seed, "batches", *stream), quantizer(book, tokens)
    for _ in range(contest.steps):
        batch = tokens[torch.randperm(len(tokens), generator=draw)[:size]]
        local.update(batch, local.assign(batch))
    return Book(local.counts.double(), local.sums.double())


def at_sites(contest: Contest, books: Sequence[Book], number: int) -> list[Book]:
    """Each site's book after a round from the book it was given."""
    parts = enumerate(zip(books, contest.train, strict=True))
    return [trained(book, tokens, contest.batch, contest, site, number) for site, (book, tokens) in parts]


def statistics(book: Book, sites: Sequence[Tensor], images: int | None = None) -> list[CodeSums]:
    """Sums of each site's tokens, of at most `images` images, under one book."""
    return [quantizer(book, tokens).statistics(tokens[:images]) for tokens in sites]


def dead(contest: Contest, book: Book) -> float:
    """Share of the codes that all training tokens leave below the threshold."""
    parts = {str(site): part for site, part in enumerate(statistics(book, contest.train))}
    return health(book, book, parts, share=SHARE).dead


def repeated(contest: Contest, start: Book, step: Callable[[Book, int], Book]) -> tuple[Book, list[float]]:
    """All rounds of one arm."""
    book, curve = start, []
    for number in range(contest.rounds):
        curve.append(dead(contest, book))
        book = step(book, number)
    return book, [*curve, dead(contest, book)]


def central(contest: Contest) -> tuple[Book, list[float]]:
    pooled, size = torch.cat(contest.train), sum(min(contest.batch, len(tokens)) for tokens in contest.train)
    return repeated(
        contest, contest.start, lambda book, number: trained(book, pooled, size, contest, "central", number)
    )


def averaged(contest: Contest) -> tuple[Book, list[float]]:
    weights = [float(len(tokens)) for tokens in contest.train]

    def step(book: Book, number: int) -> Book:
        return merge_mean(at_sites(contest, [book] * len(weights), number), weights, SMOOTHING)

    return repeated(contest, contest.start.scaled(contest.mass() / len(weights)), step)


def raw_sum(contest: Contest) -> tuple[Book, list[float]]:
    def step(book: Book, number: int) -> Book:
        parts = at_sites(contest, [book] * len(contest.train), number)
        return merge_increments(book.scaled(0.0), parts, DECAY, contest.steps)  # plain sums

    return repeated(contest, contest.start, step)


def split_prior(contest: Contest) -> tuple[Book, list[float]]:
    def step(book: Book, number: int) -> Book:
        begun = [book.scaled(share * float(book.counts.sum())) for share in contest.shares]
        ended = at_sites(contest, begun, number)
        parts = [increment(a, b, decay=DECAY, steps=contest.steps) for a, b in zip(begun, ended, strict=True)]
        return merge_increments(book, parts, DECAY, contest.steps)

    return repeated(contest, contest.start, step)


def refresh(contest: Contest, *, revival: bool = False) -> tuple[Book, list[float]]:
    idle, draw = torch.zeros(len(contest.start.counts), dtype=torch.int64), seeding.generator(contest.seed, "revival")

    def step(book: Book, number: int) -> Book:
        nonlocal idle
        total = add(statistics(book, contest.train, contest.refresh))
        merged = merge_refresh(book, total, contest.keep)
        if revival and number < contest.rounds - QUIET:
            merged, idle, _ = revive(merged, total, idle, share=SHARE, patience=PATIENCE, most=MOST, generator=draw)
        return merged

    return repeated(contest, contest.start, step)


MERGES: Mapping[str, Arm] = {
    "raw sum": raw_sum,
    "mean of vectors": averaged,
    "split prior": split_prior,
    "refresh": refresh,
    "refresh + revival": functools.partial(refresh, revival=True),
}
HEALING = ("split prior", "refresh", "refresh + revival")  # the arms of the second part


def random_tokens(sites: Sequence[Tensor], codes: int, mass: float, draw: torch.Generator) -> Book:
    """A book of equal masses at random tokens of the given sites."""
    pooled = torch.cat(list(sites)).flatten(0, 1)
    counts = torch.full((codes,), mass / codes, dtype=torch.float64)
    return Book(counts, pooled[torch.randperm(len(pooled), generator=draw)[:codes]].double() * counts[:, None])


def local_books(contest: Contest) -> list[Book]:
    """Each site's own book from its own tokens after all rounds, never merged."""
    codes = len(contest.start.counts)
    books = [
        random_tokens([tokens], codes, contest.mass() * share, seeding.generator(contest.seed, "start", site))
        for site, (tokens, share) in enumerate(zip(contest.train, contest.shares, strict=True))
    ]
    for number in range(contest.rounds):
        books = at_sites(contest, books, number)
    return books


def figures(contest: Contest, book: Book) -> dict[str, float]:
    """What a book is worth on the sites' test tokens."""
    parts = statistics(book, contest.test)
    total = add(parts)
    return {
        "error": float(total.residuals.sum() / total.counts.sum()),
        "worst_site": max(float(part.residuals.sum() / part.counts.sum()) for part in parts),
        "perplexity": float(perplexity(total.counts)),
        "dead": dead(contest, book),
    }


def compared(contest: Contest) -> dict[str, dict[str, float]]:
    """Figures by arm, on one set and seed."""
    books = local_books(contest)
    alone = [figures(contest, book) for book in books]
    found = {LOCAL: {name: mean(row[name] for row in alone) for name in FIGURES}}
    found |= {"the start": figures(contest, contest.start)}
    found |= {name: figures(contest, arm(contest)[0]) for name, arm in MERGES.items()}
    joined = union(books, len(contest.start.counts), seeding.generator(contest.seed, "union"))
    return found | {"union, once": figures(contest, joined), CENTRAL: figures(contest, central(contest)[0])}


def crippled(contest: Contest) -> Contest:
    """The same with four fifths of the codes opposite to the mean token."""
    draw, vectors = seeding.generator(contest.seed, "crippled"), contest.start.vectors(SMOOTHING)
    away = -torch.cat(contest.train).mean((0, 1)).double()
    far = F.normalize(away + 0.1 * away.norm() * F.normalize(torch.randn(vectors.shape, generator=draw), dim=1), dim=1)
    living = torch.arange(len(vectors)) < len(vectors) // 5
    each = contest.start.counts[:, None]
    return replace(contest, start=Book(contest.start.counts, vectors.where(living[:, None], far) * each))


def healed(contest: Contest) -> dict[str, dict[str, list[float]]]:
    """From the crippled start: share of dead codes before each round and after the last, and the last error, by arm."""
    hurt, found = crippled(contest), {}
    for name in HEALING:
        book, curve = MERGES[name](hurt)
        found[name] = {"dead": curve, "error": [figures(hurt, book)["error"]]}
    return found


def tokens_of(given: argparse.Namespace, name: str, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Train and test tokens of each site under the frozen encoder."""
    words = [word.format(data=given.data) for word in SETS[name]]
    study = config.compose(["method=simclr", "encoder=tiny", *words, "training.threads=1", f"seed={seed}"])
    sites, method = sites_of(study), new_method(study)
    plain = Device.choose("cpu", "fp32", "never")
    if given.steps:
        task = Task(pool(sites).train.images, None, config.build(study.views))
        optimizer = config.build(study.training.optimizer, parameters=method.trainable())
        plan = Plan(seed, "central", 1, 1, given.steps, study.training.batch_size, study.training.warmup)
        train_locally(method, task, optimizer, plan, plain)
    encoder = method.encoder.eval()
    if not isinstance(encoder, ResNet):
        raise TypeError(f"got {type(encoder).__name__}, need the maps of a ResNet.")
    projection = nn.init.orthogonal_(
        torch.empty(WIDTH, encoder.stage_widths[2]), generator=seeding.generator(seed, "projection")
    )

    @torch.no_grad()
    def tokens(images: Tensor) -> Tensor:
        maps = torch.cat([encoder.maps(part)[2].flatten(2) for part in torch.split(images, 64)])  # (images, C, N)
        return F.normalize(maps.transpose(1, 2) @ projection.T, dim=2)

    return [tokens(site.train.images) for site in sites], [tokens(site.test.images) for site in sites]


def contest_of(given: argparse.Namespace, name: str, seed: int) -> Contest:
    train, test = tokens_of(given, name, seed)
    mass = float(sum(min(given.batch, len(tokens)) for tokens in train) * train[0].shape[1])
    start = random_tokens(train, given.codes, mass, seeding.generator(seed, "start"))
    shuffled = [
        tokens[torch.randperm(len(tokens), generator=seeding.generator(seed, "refresh", site))]
        for site, tokens in enumerate(train)
    ]
    return Contest(shuffled, test, start, seed, given.rounds, given.round_steps, given.batch, given.keep, given.refresh)


def recovered(rows: Sequence[Mapping[str, Mapping[str, float]]], arm: str) -> str:
    """Recovered gap of the means over seeds, where the gap is larger than twice its standard error."""
    gaps = [row[LOCAL]["error"] - row[CENTRAL]["error"] for row in rows]
    doubt = 2 * stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    if mean(gaps) <= doubt:
        return "gap not resolvable"
    return f"{mean(row[LOCAL]['error'] - row[arm]['error'] for row in rows) / mean(gaps):.2f}"


def table(rows: Sequence[Mapping[str, Mapping[str, float]]]) -> None:
    """Mean ± standard deviation over seeds, by arm."""
    print("| merge | error | worst site | perplexity | dead | recovered gap |\n|---|---|---|---|---|---|")
    for arm in rows[0]:
        error, worst, effective, lost = ([row[arm][name] for row in rows] for name in FIGURES)
        spread = f" ± {stdev(error):.4f}" if len(error) > 1 else ""
        cells = f"{mean(error):.4f}{spread} | {mean(worst):.4f} | {mean(effective):.1f} | {mean(lost):.1%}"
        print(f"| {arm} | {cells} | {recovered(rows, arm)} |")


def curves(rows: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> None:
    """Dead codes in percent before each round and after the last, and the last error, mean over seeds."""
    print("from a start with 80 % dead: dead codes in percent before each round and after the last; error")
    for arm in rows[0]:
        points = zip(*(row[arm]["dead"] for row in rows), strict=True)
        error = mean(row[arm]["error"][0] for row in rows)
        print(f"  {arm:<18}" + " ".join(f"{100 * mean(point):>3.0f}" for point in points) + f"   {error:.4f}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=ROOT)
    options.add_argument("--sets", nargs="+", choices=list(SETS), default=["breast", "pneumonia"])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--steps", type=int, default=100, help="of pretraining; 0: random weights")
    options.add_argument("--codes", type=int, default=64)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--round-steps", type=int, default=20)
    options.add_argument("--batch", type=int, default=32, help="images per site and step")
    options.add_argument("--keep", type=float, default=0.5, help="share of the old book after a refresh")
    options.add_argument("--refresh", type=int, default=256, help="images per site in the refresh pass")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {}
    for name in given.sets:
        contests = [contest_of(given, name, seed) for seed in given.seeds]
        sizes, cells = [len(tokens) for tokens in contests[0].train], contests[0].train[0].shape[1]
        print(f"\n{name}, K = {given.codes}; at the first seed, sites of {sizes} images with {cells} tokens each")
        rows = [compared(contest) for contest in contests]
        table(rows)
        crippled_rows = [healed(contest) for contest in contests]
        curves(crippled_rows)
        result[name] = {"images": sizes, "merges": rows, "crippled": crippled_rows}
    if given.json:
        what = {key: value for key, value in vars(given).items() if key not in ("json", "data")}
        write(given.json, {"machine": machine(), "what": what, "sets": result})


if __name__ == "__main__":
    main()
