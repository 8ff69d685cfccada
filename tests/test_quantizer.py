"""Quantiser, code sums and k-means against plain loops, literal numbers and an independent implementation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from medfl.errors import ConfigError
from medfl.models import quantizer
from medfl.models.quantizer import CodeSums, Quantizer, kmeans, perplexity

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=seeded(seed), dtype=dtype), dim=-1)


def narrow_cone(tokens: int, width: int, *, seed: int = 0) -> Tensor:
    """Tokens as an untrained encoder gives them: all within some degrees of one direction."""
    return F.normalize(unit(width, seed=seed + 1) + 0.2 * unit(tokens, width, seed=seed), dim=-1)


def book(codes: int = 12, width: int = 8, *, decay: float = 0.9, seed: int = 1) -> Quantizer:
    """A quantizer whose code vectors are random and whose masses differ."""
    made = Quantizer(codes=codes, width=width, decay=decay, smoothing=1e-5, tokens_per_image=5)
    counts = torch.rand(codes, generator=seeded(seed)) + 0.5
    made.set(counts, 0.7 * counts[:, None] * unit(codes, width, seed=seed))
    return made


def brute_force(tokens: Tensor, codes: Tensor) -> list[int]:
    """argmin over the codes of |x - e|² (eq. 4), one pair of vectors at a time."""
    found = []
    for token in tokens.double().tolist():
        distances = [sum((x - e) ** 2 for x, e in zip(token, code, strict=True)) for code in codes.double().tolist()]
        found.append(distances.index(min(distances)))
    return found


def test_two_steps_by_hand() -> None:
    made = Quantizer(codes=3, width=2, decay=0.5, smoothing=1e-5, tokens_per_image=2)
    made.set(torch.tensor([1.0, 1, 2]), torch.tensor([[1.0, 0], [0, 1], [-2, 0]]))
    batch = torch.tensor([[[-1.0, 0], [-0.8, 0.6]]])
    assert made.assign(batch).tolist() == [[2, 2]]
    made.update(batch, made.assign(batch))  # n = [0, 0, 2]: counts of tokens, and no sum of indices
    torch.testing.assert_close(made.counts, torch.tensor([0.5, 0.5, 2]))
    torch.testing.assert_close(made.sums, torch.tensor([[0.5, 0], [0, 0.5], [-1.9, 0.3]]))
    batch = torch.tensor([[[1.0, 0], [0, 1], [-0.8, 0.6]]])
    assert made.assign(batch).tolist() == [[0, 1, 2]]
    made.update(batch, made.assign(batch))
    torch.testing.assert_close(made.counts, torch.tensor([0.75, 0.75, 1.5]))
    torch.testing.assert_close(made.sums, torch.tensor([[0.75, 0], [0, 0.75], [-1.35, 0.45]]))
    torch.testing.assert_close(made.code_vectors(), torch.tensor([[1.0, 0], [0, 1], [-0.9486833, 0.3162278]]))


def test_statistics_are_those_of_a_loop_over_tokens() -> None:
    made, tokens = book(), unit(4, 5, 8)
    codes, found = made.code_vectors(), made.assign(tokens)
    got = made.statistics(tokens)
    for k in range(12):
        members = [(i, tokens[i, j]) for i in range(4) for j in range(5) if found[i, j] == k]
        assert float(got.counts[k]) == len(members)
        assert float(got.images[k]) == len({image for image, _ in members})
        residual = sum(float((token - codes[k]).double().square().sum()) for _, token in members)
        assert float(got.residuals[k]) == pytest.approx(residual, rel=1e-6)
        expected = sum((token.double() for _, token in members), torch.zeros(8, dtype=DOUBLE))
        torch.testing.assert_close(got.sums[k], expected)
    assert float(got.counts.sum()) == 20
    torch.testing.assert_close(got.sums.sum(0), tokens.double().sum((0, 1)))
    assert {value.dtype for value in vars(got).values()} == {DOUBLE}


def test_statistics_add_up_over_images_and_sites_without_any_add_nothing() -> None:
    made, tokens = book(), unit(7, 5, 8)
    whole = made.statistics(tokens)
    parts = made.statistics(tokens[:2]) + made.statistics(tokens[2:]) + made.statistics(tokens[:0])
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(parts, name), value, msg=name)


def test_suppressed_sums_hold_no_code_of_fewer_images() -> None:
    counts = torch.tensor([40.0, 40, 5, 0], dtype=DOUBLE)
    sums = CodeSums(counts, counts[:, None] * torch.ones(4, 2), counts / 3, torch.tensor([4.0, 5, 5, 0], dtype=DOUBLE))
    shown = sums.suppressed(5)
    assert shown.counts.tolist() == [0, 40, 5, 0]
    assert shown.sums.tolist() == [[0, 0], [40, 40], [5, 5], [0, 0]]
    assert (shown.residuals > 0).tolist() == [False, True, True, False]
    assert shown.images.tolist() == [0, 5, 5, 0]
    assert sums.counts.tolist() == [40, 40, 5, 0]  # a new value; the old is as it was


def test_one_step_conserves_the_mass_of_the_book_and_of_the_batch() -> None:
    made, tokens = book(decay=0.9), unit(6, 5, 8)
    counts, sums = made.counts.clone(), made.sums.clone()
    made.update(tokens, made.assign(tokens))
    torch.testing.assert_close(made.counts.sum(), 0.9 * counts.sum() + 0.1 * 30)
    torch.testing.assert_close(made.sums.sum(0), 0.9 * sums.sum(0) + 0.1 * tokens.sum((0, 1)))


def test_only_update_in_training_mode_changes_the_codebook_and_no_optimizer_sees_it() -> None:
    made, tokens = book(), unit(6, 5, 8)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert sorted(before) == ["counts", "sums"]
    assert not list(made.parameters())

    def unchanged() -> bool:
        return all(torch.equal(value, before[name]) for name, value in made.state_dict().items())

    found = made(tokens).indices
    made.statistics(tokens)
    made.code_vectors()
    assert unchanged()
    made.eval().update(tokens, found)
    with torch.no_grad():
        made(tokens)
    assert unchanged()
    made.train().update(tokens, found)
    assert not unchanged()


def test_gradients_pass_straight_through_and_the_commitment_has_its_own() -> None:
    made, tokens = book(), unit(2, 5, 8).requires_grad_()
    got = made(tokens)
    weights = torch.randn(2, 5, 8, generator=seeded(5))
    (through,) = torch.autograd.grad((got.tokens * weights).sum(), tokens)
    torch.testing.assert_close(through, weights, rtol=0, atol=0)
    (pull,) = torch.autograd.grad(got.commitment, tokens)
    torch.testing.assert_close(pull, 2 * (tokens - got.codes).detach() / tokens.numel())
    torch.testing.assert_close(got.tokens, made.code_vectors()[got.indices], rtol=0, atol=0)
    torch.testing.assert_close(got.commitment, (got.codes - tokens).square().mean())
    assert not got.codes.requires_grad


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2, 3, 31, 32, 40, 64, 96]), st.integers(2, 9), st.integers(0, 10**6))
def test_assignments_are_the_brute_force_argmin_in_any_order_of_tokens(codes: int, width: int, seed: int) -> None:
    made, tokens = book(codes, width, seed=seed), unit(11, width, seed=seed + 1)
    found = made.assign(tokens)
    assert found.tolist() == brute_force(tokens, made.code_vectors())
    order = torch.randperm(11, generator=seeded(seed))
    assert torch.equal(made.assign(tokens[order]), found[order])


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    made, tokens = book(64), unit(9, 5, 8)
    whole, sums = made.assign(tokens), made.statistics(tokens)
    monkeypatch.setattr(quantizer, "CPU_CHUNK", chunk)
    monkeypatch.setattr(quantizer, "LARGEST_CHUNK", chunk)
    assert torch.equal(made.assign(tokens), whole)
    for name, value in vars(made.statistics(tokens)).items():
        torch.testing.assert_close(value, getattr(sums, name), msg=name)


def test_a_code_without_mass_takes_no_token() -> None:
    made, tokens, alive = book(6, 8), unit(50, 8, seed=3), [1, 2, 3, 5]
    masses = torch.tensor([0.0, 1, 2, 3, 0, 1])
    made.set(masses, masses[:, None] * narrow_cone(6, 8))
    live = made.code_vectors()[alive]
    assert made.assign(tokens).tolist() == [alive[k] for k in brute_force(tokens, live)]
    assert int(((tokens @ live.T).amax(1) < 0).sum()) > 10  # tokens that a zero row would win


def test_code_vectors_are_unit_rows_without_nan_from_start_to_long_idle() -> None:
    made = Quantizer(codes=4, width=3, decay=0.9, smoothing=1e-5, tokens_per_image=1)
    assert not made.ready
    assert torch.equal(made.code_vectors(), torch.zeros(4, 3))
    assert torch.equal(made(unit(2, 1, 3)).tokens, torch.zeros(2, 1, 3))
    directions = unit(4, 3)
    masses = torch.tensor([1e3, 1.0, 1e-30, 0.0])
    made.set(masses, masses[:, None] * directions)
    assert made.ready
    torch.testing.assert_close(made.code_vectors(), directions * (masses > 0)[:, None])
    torch.testing.assert_close(made.counts, masses)  # read with smoothing, held without


def test_half_precision_and_autocast_find_the_codes_of_full_precision() -> None:
    made, tokens = book(64, 16), unit(40, 10, 16)
    expected = made(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, sums = made(tokens), made.statistics(tokens)
        started = kmeans(tokens.flatten(0, 1), 128, generator=seeded(), iterations=0)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(sums.counts, made.statistics(tokens).counts)
    full = kmeans(tokens.flatten(0, 1), 128, generator=seeded(), iterations=0)
    torch.testing.assert_close(started, full, rtol=0, atol=0)
    half = tokens.bfloat16()
    assert torch.equal(made(half).indices, made(half.float()).indices)
    assert made(half).tokens.dtype == made(half).commitment.dtype == torch.float32
    made.update(half, made.assign(half))
    assert made.sums.dtype == torch.float32


def test_one_step_is_that_of_vector_quantize_pytorch() -> None:
    peer = pytest.importorskip("vector_quantize_pytorch")
    made, tokens = book(32, 8, decay=0.8), unit(6, 20, 8)
    theirs = peer.VectorQuantize(8, 32, decay=0.8, eps=1e-5, use_cosine_sim=True, threshold_ema_dead_code=0)
    held = theirs._codebook
    held.cluster_size.copy_(made.counts[None])
    held.embed_avg.copy_(made.sums[None])
    held.embed.copy_(made.code_vectors()[None])
    codes, indices, loss = theirs.train()(tokens)
    got = made(tokens)
    made.update(tokens, got.indices)
    assert torch.equal(got.indices, indices)
    torch.testing.assert_close(got.tokens, codes)
    torch.testing.assert_close(got.commitment, loss.squeeze())
    torch.testing.assert_close(made.counts, held.cluster_size[0])
    torch.testing.assert_close(made.sums, held.embed_avg[0])
    torch.testing.assert_close(made.code_vectors(), held.embed[0])


def test_perplexity_counts_the_codes_in_use() -> None:
    assert float(perplexity(torch.full((7,), 3.0))) == pytest.approx(7)
    assert float(perplexity(torch.tensor([0.0, 5, 0]))) == pytest.approx(1)
    assert float(perplexity(torch.zeros(4))) == 0
    expected = math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert float(perplexity(torch.tensor([1.0, 3.0]))) == pytest.approx(expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 10**6))
def test_perplexity_of_an_epoch_is_no_lower_than_that_of_its_batches(codes: int, batches: int, seed: int) -> None:
    found = torch.randint(codes, (batches, 8), generator=seeded(seed))
    counts = torch.stack([row.bincount(minlength=codes) for row in found])
    entropies = torch.stack([perplexity(row).log() for row in counts])
    assert float(perplexity(counts.sum(0)).log()) >= float(entropies.mean()) - 1e-12


def test_a_book_started_by_kmeans_keeps_its_codes_in_use() -> None:
    tokens = narrow_cone(2000, 16)
    masses, sums = kmeans(tokens, 64, generator=seeded())
    made = Quantizer(codes=64, width=16, decay=0.99, smoothing=1e-5, tokens_per_image=20)
    made.set(masses, sums)
    torch.testing.assert_close(made.code_vectors() * made.sums.norm(dim=1, keepdim=True), made.sums)
    first = perplexity(masses)
    for start in range(0, 2000, 500):
        batch = tokens[start : start + 500].view(25, 20, 16)
        made.update(batch, made.assign(batch))
    after = perplexity(made.statistics(tokens.view(100, 20, 16)).counts)
    random = book(64, 16).statistics(tokens.view(100, 20, 16))
    assert float(after) > 0.9 * float(first) > 0.7 * 64
    assert float(perplexity(random.counts)) < 0.25 * 64  # what random unit codes do with the same tokens


def test_kmeans_partitions_the_points_and_no_iteration_makes_it_worse() -> None:
    points = narrow_cone(600, 6)
    length = []
    for iterations in (0, 1, 2, 5, 20):
        masses, sums = kmeans(points, 16, generator=seeded(), iterations=iterations)
        assert float(masses.sum()) == 600
        torch.testing.assert_close(sums.sum(0), points.double().sum(0), rtol=1e-5, atol=1e-4)
        length.append(float(sums.norm(dim=1).sum()))  # the sum of cosines of the points and their centres
    assert length == sorted(length)
    assert length[-1] > length[0]


def test_kmeans_finds_planted_clusters() -> None:
    planted = unit(10, 24)
    members = torch.arange(10).repeat_interleave(torch.arange(5, 15))
    points = F.normalize(planted[members] + 0.02 * unit(len(members), 24, seed=3), dim=1)
    masses, sums = kmeans(points, 10, generator=seeded())
    nearest = (F.normalize(sums, dim=1).float() @ planted.T).argmax(1)
    assert sorted(nearest.tolist()) == list(range(10))
    assert masses.tolist() == (5 + nearest).tolist()


def test_kmeans_weights_are_repetitions() -> None:
    points, weights = narrow_cone(60, 5), torch.arange(60) % 4
    weighted = kmeans(points, 8, generator=seeded(), weights=weights.double())
    repeated = kmeans(points.repeat_interleave(weights, dim=0), 8, generator=seeded())
    for ours, theirs in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kmeans_of_fewer_different_points_than_codes_leaves_the_rest_without_mass(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def any_of_the_largest(scores: Tensor, *, out: Tensor) -> None:  # devices differ in which of equals they take
        largest = scores == scores.amax(1, keepdim=True)
        out.copy_((largest * torch.rand(scores.shape, generator=draw)).argmax(1))

    draw = seeded()
    monkeypatch.setattr(quantizer, "_argmax", any_of_the_largest)
    points = unit(45, 128).to(dtype).repeat(7, 1)
    masses, sums = kmeans(points, 203, generator=seeded())
    assert sorted(masses.tolist()) == [0] * 158 + [7] * 45
    assert bool((sums[masses == 0] == 0).all())


def test_kmeans_restarts_empty_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "SEEDED_FROM", 1)  # of 100 points, 64 draws hit about 47
    points = narrow_cone(100, 8)
    assert int((kmeans(points, 64, generator=seeded(), iterations=0)[0] == 0).sum()) > 10
    assert int((kmeans(points, 64, generator=seeded())[0] == 0).sum()) == 0


def test_wrong_sizes_and_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"got codes=0.*need the first three at least 1"):
        Quantizer(codes=0, width=4, decay=0.9, smoothing=1e-5, tokens_per_image=1)
    with pytest.raises(ConfigError, match=r"decay=1.0.*need .* decay in \[0, 1\)"):
        Quantizer(codes=2, width=4, decay=1.0, smoothing=1e-5, tokens_per_image=1)
    with pytest.raises(ValueError, match=r"got counts \(3,\) and sums \(3, 8\), need \(12,\) and \(12, 8\)"):
        book().set(torch.ones(3), torch.ones(3, 8))
    for points, weights in (
        (torch.ones(0, 4), None),
        (torch.ones(2, 4), torch.zeros(2)),
        (torch.ones(2, 4), -torch.ones(2)),
    ):
        with pytest.raises(ValueError, match=r"kmeans: got points .* of a positive sum"):
            kmeans(points, 3, generator=seeded(), weights=weights)
