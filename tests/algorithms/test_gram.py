import pytest
import torch
from compression_cases import random_layer
from torch.testing import assert_close

from mopcompress.algorithms.gram import InputGram


@pytest.mark.parametrize("size", [1, 7, 8, 13, 40])
def test_the_gram_matrix_is_the_mean_outer_product(size):
    _, inputs = random_layer(size=size)
    accumulator = InputGram()
    accumulator.update(inputs)
    expected = torch.stack([torch.outer(x, x) for x in inputs]).mean(0)
    assert_close(accumulator.mean(), expected)
    assert torch.equal(accumulator.mean(), accumulator.mean().T)
