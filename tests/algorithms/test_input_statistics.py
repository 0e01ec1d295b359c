import pytest
import torch
from compression_cases import random_layer
from torch.testing import assert_close

from mopcompress.algorithms.gram import InputGram
from mopcompress.algorithms.input_statistics import InputNorms
from mopcompress.errors import NumericalError


@pytest.mark.parametrize("statistic", [InputGram, InputNorms])
def test_batches_of_tokens_do_not_change_the_mean(statistic):
    _, inputs = random_layer()
    at_once, in_parts = statistic(), statistic()
    at_once.update(inputs)
    for part in inputs.split(33):
        in_parts.update(part)
    assert_close(at_once.mean(), in_parts.mean())


def test_norms_are_root_mean_squares():
    _, inputs = random_layer()
    accumulator = InputNorms()
    accumulator.update(inputs)
    assert_close(accumulator.mean(), inputs.norm(dim=0) / len(inputs) ** 0.5)


@pytest.mark.parametrize("statistic", [InputGram, InputNorms])
def test_half_precision_inputs_are_summed_in_single(statistic):
    inputs = random_layer()[1].half()
    accumulator = statistic()
    accumulator.update(inputs)
    exactly = statistic()
    exactly.update(inputs.double())
    assert accumulator.mean().dtype == torch.float32
    assert_close(accumulator.mean().double(), exactly.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("statistic", [InputGram, InputNorms])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_is_named(statistic, bad):
    inputs = random_layer()[1]
    inputs[3, 17] = bad
    with pytest.raises(NumericalError, match=r"1 of 40 layer inputs .* input 17"):
        statistic().update(inputs)


@pytest.mark.parametrize("statistic", [InputGram, InputNorms])
def test_a_statistic_without_tokens_raises(statistic):
    with pytest.raises(NumericalError, match="no calibration token"):
        statistic().mean()
