"""DiSSECT: its losses from the equations, what SERF reads, where gradients go, and what each switch does."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medfl.errors import ConfigError
from medfl.evaluation.collapse import rankme
from medfl.methods.base import Method, Role
from medfl.methods.byol import BYOL, momentum_at
from medfl.methods.dissect import DiSSECT, codes_for
from medfl.methods.tokens import TokenSample
from medfl.models.quantizer import kmeans
from medfl.models.serf import MODES, Scale, Serf, fused, retrieve
from tests.test_encoders import encoder
from tests.test_methods import Unreadable

Rows = list[list[float]]
LAYERS = {"fine": 1, "medium": 2, "coarse": 3}


def dissect(**changes: Any) -> DiSSECT:
    """DiSSECT on a thin encoder for 16^2 images, with codes drawn from its own first tokens, unless changed."""
    ready = changes.pop("ready", True)
    arguments: dict[str, Any] = {
        "encoder": encoder(), "hidden": 16, "width": 8, "norm": "batch", "momentum": 0.996, "target": "both",
        "scales": ["fine", "medium", "coarse"], "fusion": "fixed", "vq_proj": "frozen_orthogonal", "codes": 12,
        "images": 100, "decay": 0.99, "smoothing": 1e-5, "beta": 0.25, "commitment": 1.0, "serf": "tokens",
        "serf_head": "fixed", "serf_residual": False,
    }  # fmt: skip
    method = DiSSECT(**(arguments | changes)).train()
    if ready:
        start_codebooks(method, torch.randn(12, 1, *[16] * method.encoder.describe()["spatial_dims"]))
    return method


def start_codebooks(method: Method, images: Tensor) -> None:
    """k-means of the tokens that the method shows, with the mass of one batch."""
    draw = torch.Generator().manual_seed(0)
    with TokenSample(method, most=64, generator=draw) as sample:
        method.observe(images, 0.0)
    for name, tokens in sample.tokens().items():
        book = method.codebooks()[name]
        book.set(*kmeans(tokens.flatten(0, -2), len(book.counts), generator=draw))


def pair(images: int = 4, dims: int = 2) -> list[Tensor]:
    return [torch.randn(images, 1, *[16] * dims) for _ in range(2)]


def train(method: Method, steps: int) -> list[float]:
    """Totals of a few optimizer steps on fixed views."""
    views = torch.randn(steps, 2, 6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    optimizer, totals = torch.optim.AdamW(method.trainable(), lr=1e-3), []
    for step in range(steps):
        optimizer.zero_grad()
        total = method(list(views[step]), step / steps)["total"]
        torch.autograd.backward(total)
        optimizer.step()
        method.after_step((step + 1) / steps)
        totals.append(float(total.detach()))
    return totals


def reached(method: Method) -> set[str]:
    """Components with a gradient that is not zero."""
    names = {n for n, p in method.named_parameters() if p.grad is not None and bool(p.grad.any())}
    return {".".join(name.split(".")[:3]) if name.startswith("scales") else name.split(".")[0] for name in names}


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(row: list[float]) -> list[float]:
    return [x / math.hypot(*row) for x in row]


def levelled(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
    return [(x - mean) / deviation for x in row]


def weighted(weights: list[float], rows: Rows) -> list[float]:
    return [sum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i in range(len(rows[0]))]


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [power / sum(powers) for power in powers]


def attention(z: list[float], tokens: Rows) -> list[float]:
    """r = Σ aₙ tₙ with a = softmax(<LN z, LN tₙ> / √D)."""
    logits = [dot(levelled(z), levelled(token)) / math.sqrt(len(z)) for token in tokens]
    return weighted(softmax(logits), tokens)


def quantized(method: DiSSECT, name: str, cells: Rows) -> tuple[Rows, float]:
    """Codes of the cells (N, C) of one image, and the sum of squared distances to them; eqs. (4)-(5)."""
    scale = method.scales[name]
    assert isinstance(scale, Scale)
    filters = scale.projection.weight.flatten(1).tolist()
    codes = [unit(row) for row in scale.quantizer.sums.tolist() if any(row)]
    found, lost = [], 0.0
    for cell in cells:
        token = unit([dot(one, cell) for one in filters])
        distances = [sum((a - b) ** 2 for a, b in zip(token, code, strict=True)) for code in codes]
        found.append(codes[distances.index(min(distances))])
        lost += min(distances)
    return found, lost


def on_medium_grid(rows: Rows, side: int, grid: int) -> Rows:
    """Cells (side², D) on a grid where one side divides the other: block means, or repeated."""
    if side < grid:
        return [rows[(i * side // grid) * side + j * side // grid] for i in range(grid) for j in range(grid)]
    block = side // grid
    offsets = [(a, b) for a in range(block) for b in range(block)]
    return [
        weighted([1 / block**2] * block**2, [rows[(i * block + a) * side + j * block + b] for a, b in offsets])
        for i in range(grid)
        for j in range(grid)
    ]


def reference(method: DiSSECT, views: list[Tensor]) -> dict[str, float]:
    """All terms; only the networks themselves are taken from the method."""
    images = torch.cat(views)
    p, (z, maps) = method.predictions(images).tolist(), method.target_branch(images)
    read, lost = [], dict.fromkeys(LAYERS, 0.0)
    for image in range(len(images)):
        fused_rows = []
        for name, layer in LAYERS.items():
            rows, loss = quantized(method, name, maps[layer][image].flatten(1).T.tolist())
            lost[name] += loss
            fused_rows.append(on_medium_grid(rows, maps[layer].shape[2], maps[2].shape[2]))
        tokens = [weighted([1 / 3] * 3, list(cells)) for cells in zip(*fused_rows, strict=True)]
        read.append(attention(z[image].tolist(), tokens))
    s = method.serf.head(torch.tensor(read, dtype=z.dtype)).tolist()
    half = len(views[0])
    terms = {
        name: sum(2 - 2 * dot(unit(p[i]), unit(t[i - half])) for i in range(len(p))) / len(p)
        for name, t in (("continuous", z.tolist()), ("discrete", s))
    }
    sizes = {name: len(images) * maps[layer][0, 0].numel() * len(z[0]) for name, layer in LAYERS.items()}
    return terms | {"commitment": method.beta * sum(lost[name] / sizes[name] for name in LAYERS)}


def test_all_terms_are_those_of_the_equations() -> None:
    method, views = dissect(commitment=0.5).double(), [view.double() for view in pair(3)]
    got, expected = method(views, 0.0, Unreadable()), reference(method, views)
    for name, value in expected.items():
        assert float(got[name].detach()) == pytest.approx(value, rel=1e-6), name
    align = (got["continuous"] + got["discrete"]) / 2
    torch.testing.assert_close(got["total"], align + 0.5 * got["commitment"])
    monitors = {"std", "perplexity_fine", "perplexity_medium", "perplexity_coarse"}
    assert got.keys() == expected.keys() | monitors | {"total"}
    assert [name for name, value in got.items() if value.requires_grad] == ["total"]


def test_the_batch_perplexity_is_that_of_the_codes_it_used() -> None:
    method, views = dissect(), pair()
    got = method(views, 0.0)
    for book, _, indices in method._seen:
        shares = torch.bincount(indices.flatten(), minlength=len(book.counts)).double() / indices.numel()
        entropy = -sum(share * math.log(share) for share in shares.tolist() if share > 0)
        name = {64: "fine", 16: "medium", 4: "coarse"}[indices.shape[1]]
        assert float(got[f"perplexity_{name}"]) == pytest.approx(math.exp(entropy), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_the_views_does_not_matter(mode: str) -> None:
    method, views = dissect(serf=mode).double(), [view.double() for view in pair()]
    torch.testing.assert_close(method(views, 0.0), method(views[::-1], 0.0))


def serf_inputs(tokens: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6, dtype=torch.float64), torch.randn(3, tokens, 6, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["tokens", "scales"])
def test_attention_is_the_equation(mode: str) -> None:
    z, tokens = serf_inputs()
    expected = [attention(a, b) for a, b in zip(z.tolist(), tokens.tolist(), strict=True)]
    torch.testing.assert_close(retrieve(z, tokens, mode=mode), torch.tensor(expected, dtype=torch.float64))


def test_the_other_modes_are_their_equations() -> None:
    z, tokens = serf_inputs()
    q = [weighted([1 / 9] * 9, rows) for rows in tokens.tolist()]
    channel = [
        [dot(softmax([a * b / math.sqrt(6) for b in row]), row) for a in query]
        for query, row in zip(z.tolist(), q, strict=True)
    ]
    expected = {"pooled": q, "channel": channel, "concat": [a + b for a, b in zip(q, z.tolist(), strict=True)]}
    for mode, rows in expected.items():
        torch.testing.assert_close(retrieve(z, tokens, mode=mode), torch.tensor(rows, dtype=torch.float64))


def test_attention_over_one_token_is_pooling() -> None:
    z, tokens = serf_inputs(1)
    torch.testing.assert_close(retrieve(z, tokens, mode="tokens"), retrieve(z, tokens, mode="pooled"))


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_depends_on_the_order_of_the_tokens_or_on_other_images(mode: str) -> None:
    z, tokens = serf_inputs()
    read = retrieve(z, tokens, mode=mode)
    torch.testing.assert_close(retrieve(z, tokens[:, torch.randperm(9)], mode=mode), read)
    z[1:], tokens[1:] = torch.randn(2, 6), torch.randn(2, 9, 6)
    torch.testing.assert_close(retrieve(z, tokens, mode=mode)[0], read[0])


@pytest.mark.parametrize(("mode", "reads_z", "reads_channels"),
                         [("tokens", True, True), ("pooled", False, True), ("channel", True, False)])  # fmt: skip
def test_what_a_mode_is_blind_to(mode: str, reads_z: bool, reads_channels: bool) -> None:
    z, tokens = serf_inputs()
    read = retrieve(z, tokens, mode=mode)
    assert torch.allclose(retrieve(z.flip(0), tokens, mode=mode), read) != reads_z
    permuted = retrieve(z, tokens[..., torch.tensor([5, 0, 1, 2, 3, 4])], mode=mode)
    assert torch.allclose(permuted, read) != reads_channels


def test_the_residual_adds_the_levelled_embedding() -> None:
    z, tokens = serf_inputs()
    with_residual, without = (
        Serf(mode="tokens", width=6, hidden=None, norm="batch", residual=residual)(z, tokens)
        for residual in (True, False)
    )
    torch.testing.assert_close(with_residual - without, torch.tensor([levelled(row) for row in z.tolist()]).double())


@pytest.mark.parametrize(("side", "grid"), [(7, 4), (4, 4), (3, 2)])
def test_finer_maps_are_averaged_over_the_cells_of_the_grid(side: int, grid: int) -> None:
    maps = torch.randn(2, 3, side, side, dtype=torch.float64)
    got = fused([maps], torch.ones(1), torch.Size([grid, grid]))
    for i in range(grid):
        for j in range(grid):
            rows, columns = (range(a * side // grid, -(-(a + 1) * side // grid)) for a in (i, j))
            mean = sum(maps[:, :, a, b] for a in rows for b in columns) / (len(rows) * len(columns))
            torch.testing.assert_close(got[:, i * grid + j], mean)


def test_coarser_maps_are_repeated_and_maps_weighted() -> None:
    coarse, medium = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 4, 4, 4)
    got = fused([coarse, medium], torch.tensor([0.25, 0.75]), torch.Size([4, 4, 4]))
    expected = 0.75 * medium + 0.25 * coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("dims", "tokens"), [(2, (49, 16, 4)), (3, (343, 64, 8))])
def test_odd_maps_of_28_voxels_fuse_in_2d_and_3d(dims: int, tokens: tuple[int, ...]) -> None:
    net = encoder(base_width=4, spatial_dims=dims, image_size=28, stem="small")
    method = dissect(encoder=net, codes="auto", images=90, ready=False)
    books = list(method.codebooks().values())
    assert tuple(book.tokens_per_image for book in books) == tokens
    assert tuple(len(book.counts) for book in books) == tuple(codes_for(n, 90) for n in tokens)
    start_codebooks(method, torch.randn(2, 1, *[28] * dims))
    losses = method([torch.randn(2, 1, *[28] * dims) for _ in range(2)], 0.0)
    assert tuple(indices.shape for *_, indices in method._seen) == tuple((4, n) for n in tokens)
    torch.autograd.backward(losses["total"])
    assert all(value.isfinite() for value in losses.values())


def test_full_size_parts_have_the_published_widths() -> None:
    with torch.device("meta"):
        net = encoder(blocks=[2, 2, 2, 2], base_width=64, se_ratio=None, in_channels=3, image_size=224)
        method = dissect(encoder=net, hidden=2048, width=128, codes=2048, vq_proj="trained", ready=False)

    def millions(name: str) -> float:
        module = method.get_submodule(name)
        return sum(p.numel() for p in module.parameters()) / 1e6

    sizes = {name: millions(name) for name in ("encoder", "projector", "predictor", "serf", "scales")}
    published = {"encoder": 11.2, "projector": 1.31, "predictor": 0.53, "serf": 0.53, "scales": 0.115}
    assert sizes == pytest.approx(published, rel=0.01)
    assert {name: tuple(b.sums.shape) for name, b in method.codebooks().items()} == {
        f"scales.{name}.quantizer": (2048, 128) for name in LAYERS
    }
    assert [book.tokens_per_image for book in method.codebooks().values()] == [784, 196, 49]


@pytest.mark.parametrize(
    ("tokens", "images", "codes"), [(1, 60, 2), (1, 119, 2), (1, 120, 4), (8, 1000, 256), (784, 10**6, 2048)]
)
def test_automatic_codebooks_are_as_large_as_an_epoch_can_fill(tokens: int, images: int, codes: int) -> None:
    assert codes_for(tokens, images) == codes
    assert codes == min(2048, 2 ** math.floor(math.log2(tokens * images / 30)))


@pytest.mark.parametrize("fusion", ["fixed", "entropy"])
def test_fusion_weights(fusion: str) -> None:
    method = dissect(fusion=fusion)
    usages = [[4.0] * 4, [1.0] * 2, [9.0]]  # entropies ln 4, ln 2, 0: softmax 4 : 2 : 1
    for book, usage in zip(method.codebooks().values(), usages, strict=True):
        book.counts.zero_()[: len(usage)] = torch.tensor(usage)
    weights = [4 / 7, 2 / 7, 1 / 7] if fusion == "entropy" else [1 / 3] * 3
    torch.testing.assert_close(method._fusion_weights().tolist(), weights)


def test_single_scales_have_one_codebook_of_the_whole_weight() -> None:
    for name in LAYERS:
        method = dissect(scales=[name], fusion="entropy")
        assert list(method.codebooks()) == [f"scales.{name}.quantizer"]
        assert method._fusion_weights().tolist() == [1.0]
        assert method(pair(), 0.0)["discrete"].isfinite()


ONLINE = {"encoder", "projector", "predictor"}
CONVOLUTIONS = {f"scales.{name}.projection" for name in LAYERS}


@pytest.mark.parametrize(
    ("changes", "also"),
    [
        ({}, set()),
        ({"vq_proj": "trained"}, CONVOLUTIONS),
        ({"vq_proj": "trained", "commitment": 0.0}, set()),
        ({"vq_proj": "trained", "target": "discrete"}, CONVOLUTIONS),
        ({"serf_head": "trained"}, {"serf"}),
        ({"serf_head": "trained", "vq_proj": "trained", "serf": "concat", "commitment": 0.0}, {"serf"}),
        ({"serf_head": "identity", "serf_residual": True}, set()),
    ],
)
def test_gradients_go_where_they_should(changes: dict[str, Any], also: set[str]) -> None:
    method = dissect(**changes)
    torch.autograd.backward(method(pair(), 0.0)["total"])
    assert reached(method) == ONLINE | also
    still = [p for n, p in method.named_parameters() if n.startswith("target_")]
    assert all(p.grad is None for p in still)


def test_the_convolutions_learn_from_the_commitment_alone() -> None:
    slopes = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        method = dissect(vq_proj="trained", commitment=weight, serf_head="trained")
        torch.autograd.backward(method(pair(), 0.0)["total"])
        slopes.append([method.get_parameter(f"{name}.weight").grad for name in sorted(CONVOLUTIONS)])
    for one, three in zip(*slopes, strict=True):
        assert one is not None
        torch.testing.assert_close(3 * one, three)


@pytest.mark.parametrize(
    ("changes", "projection", "head"),
    [
        ({}, Role.FIXED, Role.FIXED),
        ({"vq_proj": "trained"}, Role.PARAMETER, Role.FIXED),
        ({"serf_head": "trained"}, Role.FIXED, Role.PARAMETER),
    ],
)
def test_every_tensor_has_the_role_of_its_part(changes: dict[str, Any], projection: Role, head: Role) -> None:
    method = dissect(**changes)
    expected = dict.fromkeys(ONLINE, Role.PARAMETER) | dict.fromkeys(method.targets, Role.TARGET) | {"serf": head}
    for name, tensor in method.state_dict().items():
        role, leaf = method.claim_of(name).role, name.rpartition(".")[2]
        if name.startswith("scales"):
            assert role is (Role.CODEBOOK if leaf in ("counts", "sums") else projection), name
        elif leaf == "num_batches_tracked":
            assert role is Role.LOCAL, name
        elif leaf in ("running_mean", "running_var"):
            assert (role, name.split(".")[0] in ONLINE) == (Role.NORM_MOMENTS, True), name
        else:
            assert role is expected[name.split(".")[0]], name
        assert tensor.isfinite().all()
    stepped = {id(p) for p in method.trainable()}
    fixed = method.tensors(Role.FIXED)
    assert not [n for n, p in method.named_parameters() if n in fixed and id(p) in stepped]


def test_the_frozen_convolutions_are_orthonormal_and_the_fixed_parts_come_from_the_seed() -> None:
    parts = []
    for _ in range(2):
        torch.manual_seed(7)
        parts.append(dissect(ready=False).tensors(Role.FIXED))
    torch.testing.assert_close(parts[0], parts[1], rtol=0, atol=0)
    for name, tensor in parts[0].items():
        if name.startswith("scales"):
            rows = tensor.flatten(1)  # (8, C) with C >= 16
            torch.testing.assert_close(rows @ rows.T, torch.eye(8))


def test_after_a_step_the_target_moved_by_the_formula_and_the_codebooks_by_one_average() -> None:
    method, views = dissect(decay=0.9), pair()
    with torch.no_grad():
        for parameter in method.trainable():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    method(views, 0.0)
    maps = method.target_branch(torch.cat(views))[1]
    counted = {}
    for name, layer in LAYERS.items():
        book = f"scales.{name}.quantizer"
        tokens = method.get_submodule(f"scales.{name}").tokens(maps[layer]).flatten(0, 1)
        found = method.codebooks()[book].assign(tokens)
        for part in ("counts", "sums"):
            counted[f"{book}.{part}"] = 0.9 * before[f"{book}.{part}"]
        for token, code in zip(tokens, found.tolist(), strict=True):
            counted[f"{book}.counts"][code] += 0.1
            counted[f"{book}.sums"][code] += 0.1 * token
    method.after_step(0.4)
    m = momentum_at(0.4, start=0.996)
    for name, tensor in method.state_dict().items():
        expected = counted.get(name, before[name])
        if method.claim_of(name).role is Role.TARGET:
            expected = m * before[name] + (1 - m) * before[name.removeprefix("target_")]
        if method.claim_of(name).role not in (Role.NORM_MOMENTS, Role.LOCAL):  # the forward itself moves these
            torch.testing.assert_close(tensor, expected, msg=name)


@pytest.mark.parametrize("case", ["stepped already", "evaluation", "no gradient", "observed"])
def test_codebooks_move_only_by_a_training_forward_and_once(case: str) -> None:
    method = dissect()
    if case == "stepped already":
        method(pair(), 0.0)
        method.after_step(0.1)
    elif case == "evaluation":
        method.eval()(pair(), 0.0)
    elif case == "no gradient":
        with torch.no_grad():
            method(pair(), 0.0)
    else:
        method.observe(pair()[0], 0.0)
    before = {name: tensor.clone() for name, tensor in method.tensors(Role.CODEBOOK).items()}
    method.train().after_step(0.2)
    torch.testing.assert_close(method.tensors(Role.CODEBOOK), before, rtol=0, atol=0)


def test_the_refresh_pass_shows_each_codebook_the_tokens_of_the_target() -> None:
    method, images = dissect(), pair()[0]
    with torch.no_grad():  # so that the two networks differ
        for parameter in method.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with TokenSample(method, most=1000, generator=torch.Generator()) as sample:
        features = method.observe(images, 0.0)
    torch.testing.assert_close(features, method.encoder(images).detach())
    maps = method.target_branch(images)[1]
    for name, layer in LAYERS.items():
        own = method.get_submodule(f"scales.{name}").tokens(maps[layer])
        shown = sample.tokens()[f"scales.{name}.quantizer"].reshape(own.shape)
        torch.testing.assert_close(shown.sum(1), own.sum(1), rtol=1e-4, atol=1e-4)  # the sample is in another order
        torch.testing.assert_close(own.norm(dim=2), torch.ones(own.shape[:2]))


def test_codebooks_without_mass_do_not_break_a_step() -> None:
    method = dissect(ready=False)
    assert not any(book.ready for book in method.codebooks().values())
    assert all(math.isfinite(total) for total in train(method, 2))
    assert all(tensor.isfinite().all() for tensor in method.state_dict().values())


@pytest.mark.parametrize(
    "changes", [{"target": "continuous"}, {"serf": "none", "commitment": 0.0}, {"serf": "none", "codes": "auto"}]
)
def test_with_the_continuous_target_alone_it_is_byol_bit_for_bit(changes: dict[str, Any]) -> None:
    def byol() -> BYOL:
        return BYOL(encoder=encoder(), hidden=16, width=8, norm="batch", momentum=0.996).train()

    runs = []
    for build in (byol, lambda: dissect(ready=False, **changes)):
        torch.manual_seed(3)
        method = build()
        runs.append((train(method, 3), method.state_dict(), torch.get_rng_state()))
        assert method(pair(), 0.0).keys() == {"total", "continuous", "std"}
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_its_own_parts_leave_byols_as_drawn() -> None:
    torch.manual_seed(3)
    plain = dissect(target="continuous", ready=False).state_dict()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    full = dissect(ready=False).state_dict()
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close({name: full[name] for name in plain}, plain, rtol=0, atol=0)
    assert {name.split(".")[0] for name in full.keys() - plain.keys()} == {"scales", "serf"}


@pytest.mark.parametrize("target", ["both", "discrete", "continuous"])
def test_the_total_is_the_mean_over_the_targets(target: str) -> None:
    got = dissect(target=target, commitment=0.0)(pair(), 0.0)
    halves = [got[name] for name in ("continuous", "discrete") if target in ("both", name)]
    torch.testing.assert_close(got["total"], torch.stack(halves).mean())
    assert len({"continuous", "discrete"} & got.keys()) == len(halves)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_training_gives_finite_losses(mode: str, dims: int) -> None:
    method = dissect(encoder=encoder(base_width=4, spatial_dims=dims), serf=mode, vq_proj="trained")
    views = pair(2, dims)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = method(views, 0.0)
    torch.autograd.backward(got["total"])
    assert got["total"].dtype == torch.float32
    assert all(value.isfinite() for value in got.values())
    assert all(tokens.dtype == torch.float32 for _, tokens, _ in method._seen)
    for parameter in method.trainable():
        assert parameter.grad is not None
        # torch on CPUs leaves entries of the bfloat16 weight gradient of Conv3d unset where maps have 2^3 voxels
        assert parameter.grad.isfinite().all() or (dims, parameter.dim()) == (3, 5)


def test_a_hundred_steps_do_not_collapse() -> None:
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(64, 1, 4, 4), size=(16, 16), mode="bicubic")
    method = dissect(encoder=encoder(base_width=4), hidden=64, width=16, codes=16, momentum=0.98, ready=False)
    start_codebooks(method, images)
    optimizer = torch.optim.AdamW(method.trainable(), lr=1e-3)
    for step in range(100):
        chosen = images[torch.randperm(64)[:16]]
        losses = method([chosen + 0.2 * torch.randn_like(chosen) for _ in range(2)], step / 100)
        optimizer.zero_grad()
        torch.autograd.backward(losses["total"])
        optimizer.step()
        method.after_step((step + 1) / 100)
    means = {name: float(value.detach()) for name, value in losses.items()}
    assert means["total"] < 1.5  # from 2, unrelated predictions
    assert means["std"] > 0.2
    assert not method.remarks(means)
    assert all(means[f"perplexity_{name}"] > 0.1 * 16 for name in LAYERS)
    assert rankme(method.observe(images, 1.0)) > 0.05 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "s"}, "method.target: got 's', need one of both, continuous, discrete"),
        ({"serf": "batch"}, "method.serf: got 'batch', need one of tokens, pooled, channel, scales, concat, none"),
        ({"serf_head": "frozen"}, "method.serf_head: got 'frozen', need one of fixed, trained, identity"),
        ({"vq_proj": "fixed"}, "method.vq_proj: got 'fixed', need one of trained, frozen_orthogonal"),
        ({"fusion": "learned"}, "method.fusion: got 'learned', need one of fixed, entropy"),
        ({"target": "discrete", "serf": "none"}, "target=discrete with method.serf=none: no target is left"),
        ({"serf": "concat", "serf_head": "identity"}, "serf=concat gives .* needs a head and takes no residual"),
        ({"serf": "concat", "serf_residual": True}, "Set method.serf_head=fixed and method.serf_residual=false"),
        ({"scales": []}, r"method.scales: got \[\], need one or more of fine, medium, coarse"),
        ({"scales": ["fine", "fine"]}, "each once"),
        ({"scales": ["median"]}, r"method.scales: got \['median'\]"),
        ({"codes": [4, 4]}, r"method.codes: got \[4, 4\], need a number, a list with one for each of"),
        ({"codes": "many"}, "method.codes: got 'many'"),
        ({"codes": 0}, "got codes=0"),
        ({"codes": "auto", "images": 3}, "images=3 with 16 tokens each, too few for two codes"),
        ({"commitment": -1.0}, r"method.beta=0.25, method.commitment=-1.0: need both 0 or more"),
        ({"momentum": 2.0}, "method.momentum: got 2.0"),
    ],
)
def test_switches_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dissect(ready=False, **changes)
