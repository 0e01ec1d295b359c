from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mopcompress.algorithms.sparsity_allocation import (
    CURVE_POINTS,
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


def random_profiles(blocks=6, seed=0):
    """Return the profiles of two linears per block; later blocks have larger outliers and cheaper weights."""
    seeded = torch.Generator().manual_seed(seed)
    profiles = {}
    for block in range(blocks):
        weights = {
            f"{block}.q": torch.randn(8, 12, generator=seeded) ** (1 + 2 * (block % 3)),
            f"{block}.up": torch.randn(30, 12, generator=seeded) / (block + 1),
        }
        norms = {name: torch.rand(12, generator=seeded) + 0.1 for name in weights}
        profiles |= profile_block(weights, norms, block=block, multiple=3.0)
    return profiles


def removed(sparsities, profiles):
    """Count the removed weights as the solvers do."""
    return sum(round(number * profiles[name].weights) for name, number in sparsities.items())


ALLOCATIONS = {
    "uniform": uniform,
    "owl": lambda profiles, sparsity: owl(profiles, sparsity, spread=0.08),
    "ramp": lambda profiles, sparsity: ramp(profiles, sparsity, rise=0.2),
    "equal_marginal_error": lambda profiles, sparsity: equal_marginal_error(profiles, sparsity, spread=0.15),
}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.137, 0.5, 0.85, 0.99])
def test_the_global_count_is_exact(allocation, sparsity):
    profiles = random_profiles()
    sparsities = ALLOCATIONS[allocation](profiles, sparsity)
    assert removed(sparsities, profiles) == round(sparsity * sum(profile.weights for profile in profiles.values()))
    assert all(0 <= number <= 1 for number in sparsities.values())


@given(
    sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=12),
    numbers=st.lists(st.floats(-2, 2), min_size=12, max_size=12),
    sparsity=st.floats(0, HIGHEST),
)
def test_any_sparsities_become_an_exact_count(sizes, numbers, sparsity):
    profiles = {str(i): LayerProfile(i, size, 0.0, torch.ones(CURVE_POINTS)) for i, size in enumerate(sizes)}
    sparsities = match_total(dict(zip(profiles, numbers, strict=False)), profiles, sparsity)
    assert abs(removed(sparsities, profiles) - sparsity * sum(sizes)) <= 0.5 + 1e-6


def test_uniform_is_uniform():
    profiles = random_profiles()
    sparsities = uniform(profiles, 0.5)
    assert all(abs(number - 0.5) * profiles[name].weights <= 1 for name, number in sparsities.items())


def test_a_ramp_rises_evenly_with_depth():
    sparsities = ramp(random_profiles(), 0.5, rise=0.2)
    depths = [sparsities[f"{block}.up"] for block in range(6)]
    assert depths[-1] - depths[0] == pytest.approx(0.2, abs=0.01)
    assert all(later - earlier == pytest.approx(0.04, abs=0.01) for earlier, later in pairwise(depths))


def test_owl_prunes_blocks_with_outliers_less():
    profiles = random_profiles()
    sparsities = owl(profiles, 0.6, spread=0.08)
    order = sorted(profiles, key=lambda name: profiles[name].outliers)
    assert sparsities[order[0]] - sparsities[order[-1]] == pytest.approx(0.16, abs=0.01)
    assert sparsities[order[0]] > 0.6 > sparsities[order[-1]]


def test_outliers_are_counted_as_they_are_defined():
    weights = {"a": torch.tensor([[1.0, -1.0], [1.0, 20.0]]), "b": torch.tensor([[-30.0, 0.5]])}
    norms = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 1.0])}
    scores = [1.0, 2.0, 1.0, 40.0, 30.0, 0.5]
    expected = sum(score > 3 * sum(scores) / 6 for score in scores) / 6
    assert profile_block(weights, norms, block=0, multiple=3.0)["b"].outliers == expected


def test_at_equal_marginal_error_the_last_weights_cost_the_same():
    profiles = random_profiles()
    sparsities = equal_marginal_error(profiles, 0.5, spread=1.0)
    ranks = {name: round(number * CURVE_POINTS) for name, number in sparsities.items()}
    below = [float(profile.costs[max(0, ranks[name] - 4)]) for name, profile in profiles.items()]
    above = [float(profile.costs[min(CURVE_POINTS - 1, ranks[name] + 4)]) for name, profile in profiles.items()]
    assert max(below) <= min(above)
    assert max(sparsities.values()) - min(sparsities.values()) > 0.05


def test_equal_marginal_error_costs_less_than_uniform():
    profiles = random_profiles()

    def cost(sparsities):
        return sum(
            float(profile.costs[: round(sparsities[name] * CURVE_POINTS)].sum()) * profile.weights
            for name, profile in profiles.items()
        )

    assert cost(equal_marginal_error(profiles, 0.5, spread=1.0)) < cost(uniform(profiles, 0.5))


def test_the_spread_bounds_equal_marginal_error():
    sparsities = equal_marginal_error(random_profiles(), 0.5, spread=0.05)
    assert all(abs(number - 0.5) < 0.12 for number in sparsities.values())


def test_a_sparsity_above_the_highest_raises():
    with pytest.raises(DataError, match="no linear may lose more"):
        uniform(random_profiles(), 0.999)
