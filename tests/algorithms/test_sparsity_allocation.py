from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mopcompress.algorithms.sparsity_allocation import (
    GRID,
    HIGHEST,
    LayerProfile,
    equal_marginal_error,
    match_total,
    owl,
    profile_block,
    ramp,
    uniform,
)
from mopcompress.errors import DataError


def surveyed(blocks=6, seed=0):
    """Two linears a block; later blocks have larger outliers and cheaper weights."""
    seeded = torch.Generator().manual_seed(seed)
    surveys = {}
    for block in range(blocks):
        weights = {
            f"{block}.q": torch.randn(8, 12, generator=seeded) ** (1 + 2 * (block % 3)),
            f"{block}.up": torch.randn(30, 12, generator=seeded) / (block + 1),
        }
        norms = {name: torch.rand(12, generator=seeded) + 0.1 for name in weights}
        surveys |= profile_block(weights, norms, block=block, multiple=3.0)
    return surveys


def removed(shares, surveys):
    """Counted as the solvers count."""
    return sum(round(share * surveys[name].weights) for name, share in shares.items())


PROFILES = {
    "uniform": uniform,
    "owl": lambda surveys, sparsity: owl(surveys, sparsity, spread=0.08),
    "ramp": lambda surveys, sparsity: ramp(surveys, sparsity, rise=0.2),
    "equal_cost": lambda surveys, sparsity: equal_marginal_error(surveys, sparsity, spread=0.15),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("sparsity", [0.0, 0.137, 0.5, 0.85, 0.99])
def test_the_global_count_is_exact(profile, sparsity):
    surveys = surveyed()
    shares = PROFILES[profile](surveys, sparsity)
    assert removed(shares, surveys) == round(sparsity * sum(one.weights for one in surveys.values()))
    assert all(0 <= share <= 1 for share in shares.values())


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=12),
    wishes=st.lists(st.floats(-2, 2), min_size=12, max_size=12),
    sparsity=st.floats(0, HIGHEST),
)
def test_any_wish_becomes_an_exact_count(sizes, wishes, sparsity):
    surveys = {str(i): LayerProfile(i, size, 0.0, torch.ones(GRID)) for i, size in enumerate(sizes)}
    shares = match_total(dict(zip(surveys, wishes, strict=False)), surveys, sparsity)
    assert abs(removed(shares, surveys) - sparsity * sum(sizes)) <= 0.5 + 1e-6


def test_uniform_is_uniform():
    surveys = surveyed()
    shares = uniform(surveys, 0.5)
    assert all(abs(share - 0.5) * surveys[name].weights <= 1 for name, share in shares.items())


def test_a_ramp_rises_evenly_with_depth():
    shares = ramp(surveyed(), 0.5, rise=0.2)
    depths = [shares[f"{block}.up"] for block in range(6)]
    assert depths[-1] - depths[0] == pytest.approx(0.2, abs=0.01)
    assert all(later - earlier == pytest.approx(0.04, abs=0.01) for earlier, later in pairwise(depths))


def test_owl_spares_the_blocks_with_outliers():
    surveys = surveyed()
    shares = owl(surveys, 0.6, spread=0.08)
    order = sorted(surveys, key=lambda name: surveys[name].outliers)
    assert shares[order[0]] - shares[order[-1]] == pytest.approx(0.16, abs=0.01)
    assert shares[order[0]] > 0.6 > shares[order[-1]]


def test_outliers_are_counted_as_they_are_defined():
    weights = {"a": torch.tensor([[1.0, -1.0], [1.0, 20.0]]), "b": torch.tensor([[-30.0, 0.5]])}
    norms = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 1.0])}
    scores = [1.0, 2.0, 1.0, 40.0, 30.0, 0.5]
    expected = sum(score > 3 * sum(scores) / 6 for score in scores) / 6
    assert profile_block(weights, norms, block=0, multiple=3.0)["b"].outliers == expected


def test_at_equal_cost_the_last_weights_cost_the_same():
    surveys = surveyed()
    shares = equal_marginal_error(surveys, 0.5, spread=1.0)
    places = {name: round(share * GRID) for name, share in shares.items()}
    below = [float(one.costs[max(0, places[name] - 4)]) for name, one in surveys.items()]
    above = [float(one.costs[min(GRID - 1, places[name] + 4)]) for name, one in surveys.items()]
    assert max(below) <= min(above)
    assert max(shares.values()) - min(shares.values()) > 0.05


def test_equal_cost_beats_uniform_in_the_cost_that_it_counts():
    surveys = surveyed()

    def cost(shares):
        return sum(float(one.costs[: round(shares[name] * GRID)].sum()) * one.weights for name, one in surveys.items())

    assert cost(equal_marginal_error(surveys, 0.5, spread=1.0)) < cost(uniform(surveys, 0.5))


def test_the_spread_bounds_what_equal_cost_may_do():
    shares = equal_marginal_error(surveyed(), 0.5, spread=0.05)
    assert all(abs(share - 0.5) < 0.12 for share in shares.values())


def test_more_than_can_go_is_refused():
    with pytest.raises(DataError, match="no linear may lose more"):
        uniform(surveyed(), 0.999)
