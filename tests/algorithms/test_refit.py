import pytest
import torch
from compression_cases import gram_of, random_layer
from reference import damped, layer_error, masked_least_squares
from torch.testing import assert_close

from mopcompress.algorithms.masks import lowest_overall
from mopcompress.algorithms.refit import refit


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_many_steps_are_the_masked_least_squares(sparsity):
    weight, inputs = random_layer()
    gram = damped(gram_of(inputs), 0.01)
    removed = lowest_overall(weight.abs(), sparsity)
    solution = refit(weight, gram, removed, weight, steps=200)
    assert_close(solution, masked_least_squares(weight, gram, removed))
    assert bool((solution[removed] == 0).all())


def test_every_step_lowers_the_error():
    weight, inputs = random_layer()
    gram = damped(gram_of(inputs), 0.01)
    removed = lowest_overall(weight.abs(), 0.6)
    errors = [layer_error(weight, refit(weight, gram, removed, weight, steps=n), gram) for n in range(8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_ten_steps_are_enough():
    weight, inputs = random_layer(size=64)
    gram = damped(gram_of(inputs), 0.01)
    removed = lowest_overall(weight.abs(), 0.6)
    best = layer_error(weight, masked_least_squares(weight, gram, removed), gram)
    assert layer_error(weight, refit(weight, gram, removed, weight, steps=10), gram) < 1.02 * best


def test_without_a_mask_the_weight_is_found_and_stays():
    weight, inputs = random_layer()
    nothing = torch.zeros_like(weight, dtype=torch.bool)
    gram = gram_of(inputs)
    assert torch.equal(refit(weight, gram, nothing, weight, steps=5), weight)
    assert_close(refit(weight, gram, nothing, torch.zeros_like(weight), steps=200), weight)


def test_no_step_applies_the_mask_only():
    weight, inputs = random_layer()
    removed = lowest_overall(weight.abs(), 0.5)
    assert torch.equal(refit(weight, gram_of(inputs), removed, weight, steps=0), weight.masked_fill(removed, 0.0))


def test_a_solved_row_does_not_disturb_the_others():
    weight, inputs = random_layer()
    gram = damped(gram_of(inputs), 0.01)
    removed = lowest_overall(weight.abs(), 0.5)
    removed[0], removed[1] = True, False
    solution = refit(weight, gram, removed, weight, steps=30)
    assert bool(solution.isfinite().all())
    assert torch.equal(solution[1], weight[1])
    assert_close(solution[2:], refit(weight[2:], gram, removed[2:], weight[2:], steps=30))
