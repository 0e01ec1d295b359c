"""Claims that hold for several methods of `METHODS`."""

import pytest
import torch
from compression_cases import TIGHT, gram_of, random_layer
from reference import (
    lowest_by_sorting,
)
from torch.testing import assert_close

from mopcompress.algorithms import METHODS
from mopcompress.algorithms.magnitude import magnitude
from mopcompress.algorithms.sparsegpt import sparsegpt
from mopcompress.algorithms.wanda import wanda
from mopcompress.errors import DataError


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_given_weight_is_left_alone(layout):
    weight, inputs = random_layer()
    if layout == "columns":
        weight = weight.T.contiguous().T
    copy = weight.clone()
    for method in METHODS.values():
        options = {"bits": 3, "group_size": 8} if method is METHODS["gptq"] else {"sparsity": 0.5}
        solved = method.solve(weight, method.statistic(inputs), **options)
        assert not torch.equal(solved.weight, copy)
    assert torch.equal(weight, copy)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_each_stacked_matrix_can_have_its_own_sparsity(method):
    weight, inputs = random_layer(rows=9)
    statistic = METHODS[method].statistic(inputs)
    parts = weight.split([4, 5])
    together = METHODS[method].solve_together(parts, statistic, sparsity=[0.3, 0.6])
    for part, solved, number in zip(parts, together, (0.3, 0.6), strict=True):
        assert_close(solved.weight, METHODS[method].solve(part, statistic, sparsity=number).weight, **TIGHT)


@pytest.mark.parametrize("method", METHODS)
def test_matrices_solved_together_are_solved_as_if_alone(method):
    weight, inputs = random_layer(rows=9)
    weight[:4] *= 10
    options = {"bits": 3, "group_size": 8} if method == "gptq" else {"sparsity": 0.5}
    statistic = METHODS[method].statistic(inputs)
    together = METHODS[method].solve_together(list(weight.split([4, 5])), statistic, **options)
    for part, solved in zip(weight.split([4, 5]), together, strict=True):
        assert_close(solved.weight, METHODS[method].solve(part, statistic, **options).weight, **TIGHT)


def test_a_pattern_with_another_sparsity_raises():
    weight, inputs = random_layer()
    for solve, statistic in ((sparsegpt, gram_of(inputs)), (wanda, inputs.norm(dim=0)), (magnitude, None)):
        with pytest.raises(DataError, match="3:8 pattern removes"):
            solve(weight, statistic, sparsity=0.5, pattern=(3, 8))
        with pytest.raises(DataError, match="40 is no multiple of 16"):
            solve(weight, statistic, sparsity=0.5, pattern=(8, 16))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_patterns_remove_the_lowest_of_each_group(method):
    weight, inputs = random_layer()
    scores = weight.abs() * (inputs.norm(dim=0) if method == "wanda" else 1.0)
    pruned = METHODS[method].solve(weight, METHODS[method].statistic(inputs), sparsity=0.5, pattern=(2, 4)).weight
    removed = torch.tensor([lowest_by_sorting(group, 2) for group in scores.reshape(-1, 4).tolist()]).reshape(6, 40)
    assert torch.equal(pruned, weight.where(~removed, 0.0))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_at_sparsity_zero_nothing_changes(method):
    weight, inputs = random_layer()
    solved = METHODS[method].solve(weight, METHODS[method].statistic(inputs), sparsity=0.0)
    assert torch.equal(solved.weight, weight)
