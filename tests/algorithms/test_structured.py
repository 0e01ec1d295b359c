import numpy as np
import pytest
import torch
from compression_cases import gram_of, random_layer
from reference import fit_columns
from torch.testing import assert_close

from mopcompress.algorithms.structured import prune_input_groups
from mopcompress.errors import DataError

DAMPING = 0.01


def remove_slowly(weight, inputs, groups, remove):
    """Remove the group whose loss, after a refit of all others, leaves the least error; then the next."""
    width = weight.shape[1] // groups
    remaining = list(range(groups))
    for _ in range(remove):
        errors = []
        for group in remaining:
            columns = [g * width + k for g in remaining if g != group for k in range(width)]
            errors.append(fit_columns(weight, inputs, columns)[1])
        remaining.pop(int(np.argmin(errors)))
    return [g * width + k for g in remaining for k in range(width)]


@pytest.mark.parametrize(("groups", "remove"), [(40, 1), (40, 17), (40, 39), (8, 3), (8, 7), (2, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_removed_groups_leave_the_least_error_after_the_refit(groups, remove, seed):
    weight, inputs = random_layer(seed=seed)
    reduced = prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove, damping=DAMPING)
    assert reduced.columns.tolist() == remove_slowly(weight, inputs, groups, remove)


@pytest.mark.parametrize("score", ["error", "norm"])
@pytest.mark.parametrize(("groups", "remove"), [(40, 10), (40, 30), (10, 3), (5, 4)])
@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_remaining_columns_are_the_least_squares_fit(score, groups, remove, damping):
    weight, inputs = random_layer()
    reduced = prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove, score=score, damping=damping)
    expected, _ = fit_columns(weight, inputs, reduced.columns.tolist(), damping=damping)
    assert_close(reduced.weight, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("groups", "remove"), [(40, 11), (8, 3)])
def test_score_norm_removes_the_groups_of_least_energy(groups, remove):
    weight, inputs = random_layer()
    width = 40 // groups
    energies = [float((weight[:, [j]] * inputs[:, j]).square().sum()) for j in range(40)]
    totals = [sum(energies[g * width : (g + 1) * width]) for g in range(groups)]
    removed = sorted(range(groups), key=lambda g: totals[g])[:remove]
    reduced = prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove, score="norm")
    assert reduced.columns[::width].div(width, rounding_mode="floor").tolist() == sorted(
        set(range(groups)) - set(removed)
    )


def test_centred_inputs_give_the_fit_with_an_intercept():
    weight, inputs = random_layer()
    inputs = inputs + torch.linspace(-2, 2, 40, dtype=inputs.dtype)
    mean = inputs.mean(0)
    reduced = prune_input_groups(weight, gram_of(inputs - mean), groups=40, remove=15, damping=1e-9)
    intercept = weight @ mean - reduced.weight @ mean[reduced.columns]
    columns = np.concatenate([inputs.numpy()[:, reduced.columns.tolist()], np.ones((len(inputs), 1))], axis=1)
    expected = np.linalg.lstsq(columns, (inputs @ weight.T).numpy(), rcond=None)[0].T
    assert_close(torch.cat([reduced.weight, intercept[:, None]], 1), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["error", "norm"])
@pytest.mark.parametrize(("groups", "remove"), [(40, 7), (8, 3), (4, 1)])
def test_counts_are_exact_and_groups_stay_whole(score, groups, remove):
    weight, inputs = random_layer()
    reduced = prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove, score=score)
    width = 40 // groups
    assert reduced.weight.shape == (6, (groups - remove) * width)
    columns = reduced.columns.view(-1, width)
    assert torch.equal(columns, columns[:, :1] + torch.arange(width))
    assert bool((columns[:, 0] % width == 0).all())
    assert reduced.columns.tolist() == sorted(set(reduced.columns.tolist()))


@pytest.mark.parametrize("score", ["error", "norm"])
def test_nothing_removed_is_the_weight_itself(score):
    weight, inputs = random_layer()
    reduced = prune_input_groups(weight, gram_of(inputs), groups=40, remove=0, score=score)
    assert torch.equal(reduced.weight, weight)
    assert reduced.columns.tolist() == list(range(40))


@pytest.mark.parametrize(("groups", "width"), [(20, 1), (5, 4)])
def test_one_of_two_twins_is_removed_without_a_loss(groups, width):
    """Every group exists twice; costs that are computed once, at the start, would find both of a pair worthless."""
    weight, inputs = random_layer(size=20)
    order = torch.randperm(2 * groups, generator=torch.Generator().manual_seed(3))
    twice = torch.arange(20).view(groups, width).repeat(2, 1)[order].flatten()
    doubled = weight[:, twice] * torch.linspace(0.5, 1.5, 40, dtype=weight.dtype)
    reduced = prune_input_groups(doubled, gram_of(inputs[:, twice]), groups=2 * groups, remove=groups, damping=1e-10)
    assert sorted(twice[reduced.columns].tolist()) == list(range(20))
    assert_close(
        inputs[:, twice[reduced.columns]] @ reduced.weight.T, inputs[:, twice] @ doubled.T, rtol=1e-5, atol=1e-5
    )


def test_inputs_that_never_fire_go_first():
    weight, inputs = random_layer()
    inputs[:, [3, 30]] = 0
    weight[:, [3, 30]] = 100
    reduced = prune_input_groups(weight, gram_of(inputs), groups=40, remove=2)
    assert sorted(set(range(40)) - set(reduced.columns.tolist())) == [3, 30]
    assert torch.equal(reduced.weight, weight[:, reduced.columns])


def test_single_precision_is_enough():
    weight, inputs = random_layer(rows=12, size=120)
    exact = prune_input_groups(weight, gram_of(inputs), groups=120, remove=60)
    rough = prune_input_groups(weight.float(), gram_of(inputs).float(), groups=120, remove=60)
    assert torch.equal(rough.columns, exact.columns)
    assert_close(rough.weight.double(), exact.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("groups", "remove"), [(40, 40), (40, -1), (7, 1), (8, 9)])
def test_impossible_counts_raise(groups, remove):
    weight, inputs = random_layer()
    with pytest.raises(DataError, match="cannot"):
        prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove)
