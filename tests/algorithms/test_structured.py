import numpy as np
import pytest
import torch
from algorithms.test_solvers import gram_of, problem
from torch.testing import assert_close

from mopcompress.algorithms.structured import prune_input_groups
from mopcompress.errors import DataError

DAMPING = 0.01


def rows_of(inputs, damping):
    """Inputs whose plain Gram matrix is the damped one: the ridge as further observations."""
    ridge = damping * gram_of(inputs).diagonal().mean()
    return torch.cat([inputs / len(inputs) ** 0.5, ridge.sqrt() * torch.eye(inputs.shape[1], dtype=inputs.dtype)])


def least_squares(weight, inputs, kept, *, damping=DAMPING):
    """The kept columns and their squared error, by numpy's lstsq on the inputs themselves."""
    rows = rows_of(inputs, damping).numpy()
    wanted = rows @ weight.numpy().T
    solved = np.linalg.lstsq(rows[:, kept], wanted, rcond=None)[0]
    return torch.from_numpy(solved.T), float(((wanted - rows[:, kept] @ solved) ** 2).sum())


def remove_slowly(weight, inputs, groups, remove):
    """Try every group that is left, refit all others, and let the one go that leaves the least error; and so on."""
    width = weight.shape[1] // groups
    left = list(range(groups))
    for _ in range(remove):
        errors = []
        for group in left:
            columns = [g * width + k for g in left if g != group for k in range(width)]
            errors.append(least_squares(weight, inputs, columns)[1])
        left.pop(int(np.argmin(errors)))
    return [g * width + k for g in left for k in range(width)]


@pytest.mark.parametrize(("groups", "remove"), [(40, 1), (40, 17), (40, 39), (8, 3), (8, 7), (2, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_goes_is_what_leaves_the_least_error_after_refitting_all_others(groups, remove, seed):
    weight, inputs = problem(seed=seed)
    found = prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove, damping=DAMPING)
    assert found.kept.tolist() == remove_slowly(weight, inputs, groups, remove)


@pytest.mark.parametrize("score", ["error", "norm"])
@pytest.mark.parametrize(("groups", "remove"), [(40, 10), (40, 30), (10, 3), (5, 4)])
@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_what_stays_is_the_least_squares_fit(score, groups, remove, damping):
    weight, inputs = problem()
    found = prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove, score=score, damping=damping)
    expected, _ = least_squares(weight, inputs, found.kept.tolist(), damping=damping)
    assert_close(found.weight, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("groups", "remove"), [(40, 11), (8, 3)])
def test_by_norm_those_go_that_say_least_on_average(groups, remove):
    weight, inputs = problem()
    width = 40 // groups
    said = [float((weight[:, [j]] * inputs[:, j]).square().sum()) for j in range(40)]
    totals = [sum(said[g * width : (g + 1) * width]) for g in range(groups)]
    gone = sorted(range(groups), key=lambda g: totals[g])[:remove]
    found = prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove, score="norm")
    assert found.kept[::width].div(width, rounding_mode="floor").tolist() == sorted(set(range(groups)) - set(gone))


def test_centred_inputs_give_the_fit_with_an_intercept():
    weight, inputs = problem()
    inputs = inputs + torch.linspace(-2, 2, 40, dtype=inputs.dtype)
    mean = inputs.mean(0)
    found = prune_input_groups(weight, gram_of(inputs - mean), groups=40, remove=15, damping=1e-9)
    intercept = weight @ mean - found.weight @ mean[found.kept]
    columns = np.concatenate([inputs.numpy()[:, found.kept.tolist()], np.ones((len(inputs), 1))], axis=1)
    expected = np.linalg.lstsq(columns, (inputs @ weight.T).numpy(), rcond=None)[0].T
    assert_close(torch.cat([found.weight, intercept[:, None]], 1), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("score", ["error", "norm"])
@pytest.mark.parametrize(("groups", "remove"), [(40, 7), (8, 3), (4, 1)])
def test_counts_are_exact_and_groups_stay_whole(score, groups, remove):
    weight, inputs = problem()
    found = prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove, score=score)
    width = 40 // groups
    assert found.weight.shape == (6, (groups - remove) * width)
    kept = found.kept.view(-1, width)
    assert torch.equal(kept, kept[:, :1] + torch.arange(width))
    assert bool((kept[:, 0] % width == 0).all())
    assert found.kept.tolist() == sorted(set(found.kept.tolist()))


@pytest.mark.parametrize("score", ["error", "norm"])
def test_nothing_removed_is_the_weight_itself(score):
    weight, inputs = problem()
    found = prune_input_groups(weight, gram_of(inputs), groups=40, remove=0, score=score)
    assert torch.equal(found.weight, weight)
    assert found.kept.tolist() == list(range(40))


@pytest.mark.parametrize(("groups", "width"), [(20, 1), (5, 4)])
def test_of_twins_one_goes_and_nothing_is_lost(groups, width):
    """Each group stands twice; an order made once, at the start, would see that both of a pair are worth nothing."""
    weight, inputs = problem(size=20)
    order = torch.randperm(2 * groups, generator=torch.Generator().manual_seed(3))
    twice = torch.arange(20).view(groups, width).repeat(2, 1)[order].flatten()
    doubled = weight[:, twice] * torch.linspace(0.5, 1.5, 40, dtype=weight.dtype)
    found = prune_input_groups(doubled, gram_of(inputs[:, twice]), groups=2 * groups, remove=groups, damping=1e-10)
    assert sorted(twice[found.kept].tolist()) == list(range(20))
    assert_close(inputs[:, twice[found.kept]] @ found.weight.T, inputs[:, twice] @ doubled.T, rtol=1e-5, atol=1e-5)


def test_inputs_that_never_fire_go_first_whatever_their_weight():
    weight, inputs = problem()
    inputs[:, [3, 30]] = 0
    weight[:, [3, 30]] = 100
    found = prune_input_groups(weight, gram_of(inputs), groups=40, remove=2)
    assert sorted(set(range(40)) - set(found.kept.tolist())) == [3, 30]
    assert torch.equal(found.weight, weight[:, found.kept])


def test_single_precision_is_enough():
    weight, inputs = problem(rows=12, size=120)
    exact = prune_input_groups(weight, gram_of(inputs), groups=120, remove=60)
    rough = prune_input_groups(weight.float(), gram_of(inputs).float(), groups=120, remove=60)
    assert torch.equal(rough.kept, exact.kept)
    assert_close(rough.weight.double(), exact.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("groups", "remove"), [(40, 40), (40, -1), (7, 1), (8, 9)])
def test_impossible_counts_are_refused(groups, remove):
    weight, inputs = problem()
    with pytest.raises(DataError, match="cannot"):
        prune_input_groups(weight, gram_of(inputs), groups=groups, remove=remove)
