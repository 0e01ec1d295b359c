import sys

import pytest
import torch
from compression_cases import gram_of, random_layer
from reference import alps_slowly, damped, layer_error
from torch.testing import assert_close

from mopcompress.algorithms.alps import alps
from mopcompress.algorithms.masks import lowest_overall
from mopcompress.algorithms.sparsegpt import sparsegpt
from mopcompress.errors import DataError, NumericalError


@pytest.fixture
def exact_thresholds(monkeypatch):
    monkeypatch.setattr(sys.modules["mopcompress.algorithms.alps"], "_SAMPLING", 1)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.85])
@pytest.mark.usefixtures("exact_thresholds")
def test_alps_is_its_definition(sparsity):
    weight, inputs = random_layer()
    gram = gram_of(inputs)
    count = round(sparsity * weight.numel())
    schedule = {"first": 0.2, "every": 4, "growth": 1.7, "relaxation": 1.4}
    slow = alps_slowly(weight, damped(gram, 0.01), count, steps=9, **schedule)
    solved = alps(weight, gram, sparsity=sparsity, steps=9, refit_steps=200).weight
    assert_close(solved, slow)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.95, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_exact(sparsity, dtype):
    weight, inputs = random_layer(dtype=dtype)
    solved = alps(weight, gram_of(inputs), sparsity=sparsity).weight
    assert int((solved == 0).sum()) == round(sparsity * weight.numel())
    assert solved.dtype == dtype


def test_at_sparsity_zero_the_weight_is_unchanged():
    weight, inputs = random_layer()
    assert torch.equal(alps(weight, gram_of(inputs), sparsity=0.0).weight, weight)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 2), (3, 5)])
def test_patterns_hold(pattern):
    weight, inputs = random_layer()
    n, m = pattern
    solved = alps(weight, gram_of(inputs), sparsity=n / m, pattern=pattern).weight
    assert bool(((solved == 0).reshape(-1, m).sum(1) == n).all())


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_layer_error_is_below_that_of_sparsegpt(sparsity, seed):
    """This is no theorem, but holds by a wide margin on correlated inputs."""
    weight, inputs = random_layer(rows=24, size=96, seed=seed)
    gram = gram_of(inputs)
    by_alps, by_sparsegpt = (solve(weight, gram, sparsity=sparsity).weight for solve in (alps, sparsegpt))
    assert layer_error(weight, by_alps, gram) < 0.9 * layer_error(weight, by_sparsegpt, gram)


def test_only_the_direction_of_the_gram_matrix_counts():
    weight, inputs = random_layer()
    gram = gram_of(inputs)
    assert_close(alps(weight, gram, sparsity=0.6).weight, alps(weight, 4 * gram, sparsity=0.6).weight)


@pytest.mark.usefixtures("exact_thresholds")
@pytest.mark.parametrize("sparsity", [0.6, [0.6, 0.3]])
def test_stacked_matrices_are_pruned_as_if_alone(sparsity):
    weight, inputs = random_layer(rows=10)
    gram = gram_of(inputs)
    stacked = alps(weight, gram, sparsity=sparsity, row_groups=[4, 6]).weight
    sparsities = sparsity if isinstance(sparsity, list) else [sparsity] * 2
    for rows, number in zip((slice(0, 4), slice(4, 10)), sparsities, strict=True):
        assert_close(stacked[rows], alps(weight[rows], gram, sparsity=number).weight)


@pytest.mark.parametrize("zeros", [0.2, 0.7])
def test_preserved_zeros_stay_and_count(zeros):
    weight, inputs = random_layer()
    weight = weight.masked_fill(lowest_overall(weight.abs(), zeros), 0.0)
    solved = alps(weight, gram_of(inputs), sparsity=0.5, keep_zeros=True).weight
    assert bool((solved[weight == 0] == 0).all())
    assert int((solved == 0).sum()) == round(max(zeros, 0.5) * weight.numel())


def test_preserved_zeros_stay_under_a_pattern():
    weight, inputs = random_layer()
    weight[0, 8:11] = 0  # more zeros than the pattern requires
    solved = alps(weight, gram_of(inputs), sparsity=0.5, pattern=(2, 4), keep_zeros=True).weight
    zeros = (solved == 0).reshape(6, -1, 4).sum(-1)
    assert zeros[0, 2] == 3
    assert zeros.sum() == 2 * 60 + 1


def test_weights_of_an_input_that_never_fires_go_first():
    weight, inputs = random_layer()
    inputs[:, 3] = 0
    solved = alps(weight, gram_of(inputs), sparsity=0.5).weight
    assert bool((solved[:, 3] == 0).all())


def test_a_layer_that_never_fires_is_pruned_all_the_same():
    weight, inputs = random_layer()
    solved = alps(weight, torch.zeros_like(gram_of(inputs)), sparsity=0.5).weight
    assert bool(solved.isfinite().all())
    assert int((solved == 0).sum()) == weight.numel() // 2


def test_the_given_weight_is_left_alone():
    weight, inputs = random_layer()
    gram = gram_of(inputs)
    copies = weight.clone(), gram.clone()
    alps(weight, gram, sparsity=0.5)
    assert torch.equal(weight, copies[0])
    assert torch.equal(gram, copies[1])


def test_a_wrong_pattern_and_a_bad_gram_matrix_raise():
    weight, inputs = random_layer()
    with pytest.raises(DataError, match=r"2:4 pattern removes 0\.5"):
        alps(weight, gram_of(inputs), sparsity=0.7, pattern=(2, 4))
    with pytest.raises(NumericalError, match="not finite"):
        alps(weight, gram_of(inputs) * torch.nan, sparsity=0.5)
