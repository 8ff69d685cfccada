"""Codebooks of several sites: merged is pooled, revival revives, and the diagnostics see what they should."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor
from torch.nn import functional as F

from medfl.codebooks import (
    Book,
    SiteHealth,
    add,
    health,
    increment,
    merge_increments,
    merge_mean,
    merge_refresh,
    revive,
    union,
)
from medfl.models.quantizer import CodeSums, Quantizer, kmeans

K, D = 12, 6
REVIVAL: dict[str, Any] = {"share": 0.02, "patience": 2, "most": 0.25}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(count: int, *, centres: int, width: int, seed: int, noise: float = 0.1) -> Tensor:
    """Unit tokens (1, count, width) around unit centres that do not depend on the seed."""
    means = F.normalize(torch.randn(centres, width, generator=generator(7)), dim=1)
    chosen = torch.randint(centres, (count,), generator=generator(seed))
    return F.normalize(means[chosen] + noise * torch.randn(count, width, generator=generator(seed + 1)), dim=1)[None]


def book_of(vectors: Tensor, mass: float = 1.0) -> Book:
    counts = torch.full((len(vectors),), mass, dtype=torch.float64)
    return Book(counts, F.normalize(vectors.double(), dim=1) * mass)


def quantizer(book: Book) -> Quantizer:
    made = Quantizer(codes=len(book.counts), width=book.sums.shape[1], decay=0.9, smoothing=1e-5, tokens_per_image=1)
    made.set(book.counts, book.sums)
    return made


def start() -> Book:
    return book_of(torch.randn(K, D, generator=generator(3)), mass=2.0)


def sites_tokens(sites: int) -> list[Tensor]:
    """Unequal sites, the third without any token."""
    sizes = [0 if site == 2 else 40 + 37 * site for site in range(sites)]
    return [clusters(size, centres=9, width=D, seed=10 * site) for site, size in enumerate(sizes)]


def error(book: Book, tokens: Tensor) -> float:
    """Mean squared distance of the tokens to their codes."""
    sums = quantizer(book).statistics(tokens)
    return float(sums.residuals.sum() / sums.counts.sum())


def lloyd(vectors: Tensor, tokens: Tensor) -> tuple[list[int], list[list[float]]]:
    """Counts and unit means of one Lloyd step as plain loops; a code without tokens keeps its vector."""
    rows, points = vectors.double().tolist(), tokens.double().reshape(-1, vectors.shape[1]).tolist()
    counts, sums = [0] * len(rows), [[0.0] * len(rows[0]) for _ in rows]
    for point in points:
        near = min(range(len(rows)), key=lambda k: math.dist(rows[k], point))
        counts[near] += 1
        sums[near] = [a + b for a, b in zip(sums[near], point, strict=True)]
    kept = [total if count else row for total, count, row in zip(sums, counts, rows, strict=True)]
    return counts, [[x / math.hypot(*row) for x in row] for row in kept]


@pytest.mark.parametrize("sites", range(1, 9))
def test_merged_is_lloyds_step_on_the_pooled_tokens(sites: int) -> None:
    book, tokens = start(), sites_tokens(sites)
    local = quantizer(book)
    counts, vectors = lloyd(local.code_vectors(), torch.cat(tokens, 1))
    parts = [local.statistics(part) for part in tokens]
    for order in (parts, parts[::-1], [part for part in parts if part.counts.sum() > 0]):
        total = add(order)
        assert total.counts.tolist() == counts
        merged = quantizer(merge_refresh(book, total, keep=0.0)).code_vectors()
        torch.testing.assert_close(merged, torch.tensor(vectors), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_refresh_keeps_its_share_of_the_past_whatever_the_size_of_the_sample(keep: float) -> None:
    book, tokens = start(), clusters(500, centres=9, width=D, seed=1)
    total = quantizer(book).statistics(tokens)
    merged = merge_refresh(book, total, keep)
    heard = total.counts > 0
    expected = keep * 500 / K + (1 - keep) * total.counts  # the old book has equal masses
    torch.testing.assert_close(merged.counts[heard], expected[heard], rtol=1e-12, atol=0)
    torch.testing.assert_close(merge_refresh(book.scaled(7.0), total, keep).sums, merged.sums)
    twice = merge_refresh(book, total + total, keep)
    torch.testing.assert_close(twice.vectors(1e-5), merged.vectors(1e-5))


def test_a_silent_code_keeps_its_direction_through_many_rounds_in_float32() -> None:
    book = start()
    tokens = F.normalize(book.sums[:1].float(), dim=1).expand(50, -1)[None]  # all tokens are code 0
    total = quantizer(book).statistics(tokens)
    later = book
    for _ in range(300):
        later = merge_refresh(later, total, keep=0.5)
    torch.testing.assert_close(quantizer(later).code_vectors(), quantizer(book).code_vectors())
    assert bool((quantizer(later).counts > 0).all())  # a code without mass would be nearest to none
    assert float(later.counts.sum()) == pytest.approx(50, rel=1e-5)


def test_a_round_without_tokens_changes_nothing() -> None:
    book = start()
    nothing = quantizer(book).statistics(torch.zeros(0, 1, D))
    assert merge_refresh(book, nothing, keep=0.5) is book
    same, idle, revived = revive(book, nothing, torch.ones(K, dtype=torch.int64), generator=generator(), **REVIVAL)
    assert same is book
    assert revived == 0
    assert idle.tolist() == [1] * K


def test_a_code_unused_at_one_site_is_the_other_sites() -> None:
    book = book_of(torch.eye(3))
    first = quantizer(book).statistics(torch.eye(3)[:2][None])  # never the third code
    own = F.normalize(torch.tensor([[0.3, 0.0, 0.9]]), dim=1)
    second = quantizer(book).statistics(own[None])
    merged = merge_refresh(book, add([first, second]), keep=0.0)
    torch.testing.assert_close(merged.vectors(1e-5)[2].float(), own[0])
    stale = Book(torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    mean = merge_mean([stale, merged], [1.0, 1.0], 1e-5)
    assert float((mean.vectors(1e-5)[2] - merged.vectors(1e-5)[2]).norm()) > 0.1


def moving_average(book: Book, batches: Sequence[Tensor], assignments: Sequence[Tensor], decay: float) -> Book:
    """N and S after the batches, as plain loops over tokens."""
    counts, sums = book.counts.tolist(), book.sums.tolist()
    for tokens, indices in zip(batches, assignments, strict=True):
        counts, sums = [decay * n for n in counts], [[decay * x for x in row] for row in sums]
        for token, k in zip(tokens.tolist(), indices.tolist(), strict=True):
            counts[k] += 1 - decay
            sums[k] = [a + (1 - decay) * b for a, b in zip(sums[k], token, strict=True)]
    return Book(torch.tensor(counts, dtype=torch.float64), torch.tensor(sums, dtype=torch.float64))


def test_increments_are_the_moving_average_of_the_pooled_batches() -> None:
    book, decay, steps, sizes = start(), 0.9, 7, (11, 40, 3)
    draws = [[clusters(n, centres=9, width=D, seed=100 * n + t)[0].double() for t in range(steps)] for n in sizes]
    found = [[quantizer(book).assign(tokens.float()) for tokens in batches] for batches in draws]
    begun = [book.scaled(float(book.counts.sum()) * n / sum(sizes)) for n in sizes]
    ended = [moving_average(b, x, k, decay) for b, x, k in zip(begun, draws, found, strict=True)]
    parts = [increment(a, b, decay=decay, steps=steps) for a, b in zip(begun, ended, strict=True)]
    pooled = moving_average(
        book,
        [torch.cat(step) for step in zip(*draws, strict=True)],
        [torch.cat(step) for step in zip(*found, strict=True)],
        decay,
    )
    merged = merge_increments(book, parts, decay, steps)
    torch.testing.assert_close(merged.counts, pooled.counts, rtol=0, atol=1e-9)
    torch.testing.assert_close(merged.sums, pooled.sums, rtol=0, atol=1e-9)
    raw = sum((moving_average(book, x, k, decay).counts for x, k in zip(draws, found, strict=True)), torch.zeros(K))
    assert float((raw - pooled.counts).abs().max()) > 0.5  # the past counted three times


def test_union_joins_books_without_a_common_index_and_the_mean_does_not() -> None:
    tokens = [clusters(400, centres=20, width=16, seed=seed) for seed in (0, 50, 90)]
    parts = [Book(*kmeans(part[0], k, generator=generator(k))) for part, k in zip(tokens, (24, 20, 16), strict=True)]
    joined, pooled = union(parts, 20, generator()), torch.cat(tokens, 1)
    torch.testing.assert_close(joined.counts.sum(), torch.tensor(1200.0, dtype=torch.float64))
    torch.testing.assert_close(joined.sums.sum(0), pooled[0].double().sum(0))
    central = error(Book(*kmeans(pooled[0], 20, generator=generator())), pooled)
    equal = [Book(*kmeans(part[0], 20, generator=generator(i))) for i, part in enumerate(tokens)]
    assert error(joined, pooled) < 1.1 * central
    assert error(union(equal, 20, generator()), pooled) < 0.5 * error(merge_mean(equal, [1.0] * 3, 1e-5), pooled)
    small = union([parts[0], Book(torch.zeros(K).double(), torch.zeros(K, 16).double())], 40, generator())
    assert int((small.counts > 0).sum()) == 24  # no more codes than points


def dying(codes: int, live: int) -> tuple[Book, list[Tensor]]:
    """A book of which all but `live` codes lie opposite to every token, and the tokens of three sites."""
    tokens = [clusters(1500, centres=60, width=24, seed=seed, noise=0.15) + 0.3 for seed in (0, 20, 40)]
    tokens = [F.normalize(part, dim=2) for part in tokens]  # in a cone, as features behind a ReLU are
    vectors = -F.normalize(torch.ones(codes, 24) + 0.3 * torch.randn(codes, 24, generator=generator(5)), dim=1)
    vectors[:live] = torch.cat(tokens, 1)[0, :live]
    return book_of(vectors), tokens


def rounds(book: Book, tokens: list[Tensor], *, count: int, revival: bool) -> tuple[float, float]:
    """Share of dead codes and error after rounds of refresh, with or without revival."""
    idle, draw = torch.zeros(len(book.counts), dtype=torch.int64), generator(1)
    for _ in range(count):
        total = add([quantizer(book).statistics(part) for part in tokens])
        book = merge_refresh(book, total, keep=0.0)
        if revival:
            book, idle, _ = revive(book, total, idle, generator=draw, **REVIVAL)
    sites = {str(i): quantizer(book).statistics(part) for i, part in enumerate(tokens)}
    return health(book, book, sites, share=0.02).dead, error(book, torch.cat(tokens, 1))


def test_eighty_percent_dead_codes_come_back_with_revival_and_only_with_it() -> None:
    book, tokens = dying(codes=50, live=10)
    dead, worse = rounds(book, tokens, count=10, revival=False)
    assert dead > 0.7
    alive, better = rounds(book, tokens, count=10, revival=True)
    assert alive < 0.01
    assert better < 0.6 * worse


def sums(counts: list[float], residuals: list[float]) -> CodeSums:
    n = torch.tensor(counts, dtype=torch.float64)
    return CodeSums(n, torch.eye(len(n), max(D, len(n))).double() * n[:, None], torch.tensor(residuals).double(), n)


def test_revival_waits_splits_the_largest_error_and_keeps_the_mass() -> None:
    book = Book(torch.tensor([50.0, 30.0, 0.2, 20.0]).double(), torch.eye(4, D).double() * 10)
    total = sums([60.0, 39.0, 0.0, 1.0], [2.0, 9.0, 0.0, 50.0])  # code 3 is alive, but too small to give
    idle = torch.zeros(4, dtype=torch.int64)
    same, idle, revived = revive(book, total, idle, generator=generator(), **REVIVAL)
    assert (revived, idle.tolist()) == (0, [0, 0, 1, 0])
    torch.testing.assert_close(same.sums, book.sums)
    new, idle, revived = revive(book, total, idle, generator=generator(), **REVIVAL)
    assert (revived, idle.tolist()) == (1, [0, 0, 0, 0])
    torch.testing.assert_close(new.counts, torch.tensor([50.0, 15.1, 15.1, 20.0]).double())
    touched, others = [1, 2], [0, 3]
    torch.testing.assert_close(new.sums[others], book.sums[others])
    ratio = new.sums[touched] / new.counts[touched, None]
    torch.testing.assert_close(new.vectors(1e-5)[touched], ratio, rtol=0, atol=1e-6)  # e == S / N
    half_radius = math.sqrt(9.0 / 39.0) / 2
    torch.testing.assert_close(ratio[:, 1], torch.full((2,), 1 / math.hypot(1, half_radius)).double())
    torch.testing.assert_close(ratio[0] + ratio[1], 2 * ratio[0, 1] * torch.eye(D).double()[1])  # on either side of e


def test_a_round_revives_no_more_than_its_share_and_the_longest_dead_first() -> None:
    book, total = book_of(torch.eye(8)), sums([50.0, 40.0, 30.0, 20.0, 0.0, 0.0, 0.0, 0.0], [1.0] * 4 + [0.0] * 4)
    idle = torch.tensor([0, 0, 0, 0, 1, 1, 5, 1])
    _, idle, revived = revive(book, total, idle, generator=generator(), **REVIVAL)
    assert revived == 2
    assert idle.tolist() == [0, 0, 0, 0, 0, 2, 0, 2]


def test_a_code_that_one_site_alone_uses_is_rare_not_dead() -> None:
    parts = {"a": sums([50.0, 50.0, 0.0], [1.0] * 3), "b": sums([50.0, 50.0, 9.0], [1.0] * 3)}
    book = Book(torch.ones(3).double(), torch.eye(3, D).double())
    found = health(book, book, parts, share=0.02)
    assert found.dead == 0
    assert found.rare == pytest.approx(1 / 3)
    _, idle, _ = revive(book, add(list(parts.values())), torch.ones(3).long(), generator=generator(), **REVIVAL)
    assert idle.tolist() == [0, 0, 0]  # one round with tokens ends the waiting
    assert found.sites["b"].exclusive == pytest.approx(9 / 109)
    assert found.sites["a"].exclusive == 0


def test_health_is_its_formulas() -> None:
    a, b = sums([6.0, 2.0, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0]), sums([0.0, 4.0, 4.0, 0.0], [0.0, 2.0, 2.0, 0.0])
    parts = {"a": a, "b": b, "none": sums([0.0] * 4, [0.0] * 4)}
    before = Book(torch.ones(4).double(), torch.eye(4, D).double())
    after = Book(torch.tensor([3.0, 1.0, 0.0, 0.0]).double(), torch.eye(4, D).double()[[1, 1, 2, 3]])
    found = health(before, after, parts, share=0.02)
    p, q, pooled = (0.75, 0.25, 0, 0), (0, 0.5, 0.5, 0), (0.375, 0.375, 0.25, 0)
    assert found.perplexity == pytest.approx(math.exp(-sum(x * math.log(x) for x in pooled if x)))
    assert found.dead == 0.25
    assert found.rare == 0.5
    assert found.drift == pytest.approx(0.75 * math.sqrt(2))
    assert found.exclusivity == pytest.approx(0.375 + 0.375 * 0.5 / 0.75 + 0.25)
    for name, usage, error_per_token in (("a", p, 1.5 / 8), ("b", q, 0.5)):
        assert found.sites[name].js == pytest.approx(jensenshannon(usage, pooled) ** 2)
        assert found.sites[name].error == pytest.approx(error_per_token)
    assert found.sites["none"] == SiteHealth(js=0, exclusive=0, error=0, index_alarm=0)
    alike = health(before, before, {"a": a, "b": a}, share=0.02)
    assert alike.exclusivity == 0.5
    assert alike.drift == 0
    assert alike.sites["a"].js == pytest.approx(0, abs=1e-12)


def test_swapped_indices_raise_the_alarm_and_honest_sums_never_do() -> None:
    tokens = [clusters(300, centres=30, width=D, seed=seed, noise=0.5) for seed in range(4)]
    book = book_of(torch.randn(40, D, generator=generator(2)))
    local = quantizer(book)
    honest = {str(i): local.statistics(part) for i, part in enumerate(tokens)}
    assert {site.index_alarm for site in health(book, book, honest, share=0.02).sites.values()} == {0.0}
    a, b = (int(k) for k in honest["2"].counts.argsort(descending=True)[:2])
    order = torch.arange(40)
    order[[a, b]] = order[[b, a]]
    swapped = CodeSums(*(getattr(honest["2"], field)[order] for field in ("counts", "sums", "residuals", "images")))
    found = health(book, book, honest | {"2": swapped}, share=0.02).sites
    assert found["2"].index_alarm == pytest.approx(float((swapped.counts[a] + swapped.counts[b]) / 300))
    assert {found[name].index_alarm for name in "013"} == {0.0}


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 .*need \(K,\) and \(K, D\)"):
        Book(torch.zeros(3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="got 0 parts"):
        add([])
    with pytest.raises(ValueError, match=r"\[\(3, 6\), \(4, 6\)\]"):
        add([sums([1.0] * 3, [0.0] * 3), sums([1.0] * 4, [0.0] * 4)])
    with pytest.raises(ValueError, match="got keep=1"):
        merge_refresh(start(), sums([1.0] * D, [0.0] * D), keep=1)
    with pytest.raises(ValueError, match="without a code in use"):
        union([Book(torch.zeros(3).double(), torch.zeros(3, 2).double())], 2, generator())
