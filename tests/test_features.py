"""Sums of unit features over the sites: the figures of the pooled rows, and no separability where sites are equal."""

import pytest
import torch
from torch import Tensor

from medfl.evaluation.collapse import rankme, sums, symmetric, triangle
from medfl.features import PRECISION, Pool, coding_rate
from medfl.gate import Update
from medfl.layout import Layout
from medfl.methods.base import Claim, Role
from medfl.methods.medcss_losses import coding_rate as of_rows

WIDTH = 5


def rows(seed: int, count: int, shift: float = 0.0) -> Tensor:
    drawn = torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn + shift, dim=1)


def told_of(sites: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    shapes = {"count": (1,), "sum": (WIDTH,), "gram": (WIDTH * (WIDTH + 1) // 2,)}
    layout = Layout.of((f"features.{k}", Claim(Role.STATISTICS), shape, "float64") for k, shape in shapes.items())
    pool = Pool(layout)
    for site, features in sites.items():
        count, total, gram = sums(features)
        named = {"count": torch.tensor([count], dtype=torch.float64), "sum": total, "gram": triangle(gram)}
        flat = layout.pack({f"features.{name}": tensor for name, tensor in named.items()})
        assert pool.add(Update(site, flat, len(features), {}, 0.0)).flat == {}
    return {(site, name): value for site, name, value in pool.told()}


def test_sums_of_sites_tell_what_the_pooled_rows_tell() -> None:
    sites = {"a": rows(1, 40), "b": rows(2, 11, shift=0.5)}
    found, pooled = told_of(sites), torch.cat(list(sites.values()))
    for (site, features), alpha in zip({**sites, "": pooled}.items(), [WIDTH / PRECISION] * 3, strict=True):
        assert found[site, "features/coding_rate"] == pytest.approx(float(of_rows(features, alpha=alpha)), rel=1e-9)
        assert coding_rate(*sums(features)) == pytest.approx(float(of_rows(features, alpha=alpha)), rel=1e-9)
    assert found["", "features/rankme"] == pytest.approx(rankme(pooled), rel=1e-6)


def test_a_symmetric_matrix_travels_as_its_triangle() -> None:
    for width in (1, 2, 7, 512):
        drawn = torch.randn(width, width, dtype=torch.float64)
        matrix = drawn + drawn.T
        assert len(triangle(matrix)) == width * (width + 1) // 2
        assert torch.equal(symmetric(triangle(matrix)), matrix)


def test_separability_is_nothing_for_equal_sites_and_grows_with_their_distance() -> None:
    same = told_of({"a": rows(1, 40), "b": rows(1, 40)})["", "features/site_separability"]
    near = told_of({"a": rows(1, 40), "b": rows(1, 40, shift=0.3)})["", "features/site_separability"]
    far = told_of({"a": rows(1, 40), "b": rows(1, 40, shift=3.0)})["", "features/site_separability"]
    assert same == pytest.approx(0, abs=1e-9)
    assert 0.01 < near < far
