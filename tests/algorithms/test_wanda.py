import torch
from compression_cases import random_layer
from reference import (
    lowest_by_sorting,
)
from torch.testing import assert_close

from mopcompress.algorithms import METHODS
from mopcompress.algorithms.magnitude import magnitude
from mopcompress.algorithms.wanda import wanda


def test_wanda_removes_the_smallest_products_of_each_row():
    weight, inputs = random_layer()
    pruned = wanda(weight, METHODS["wanda"].statistic(inputs), sparsity=0.29).weight
    scores = weight.abs() * inputs.norm(dim=0)  # the paper's norm is the mean's root times sqrt(tokens)
    removed = torch.tensor([lowest_by_sorting(row, round(0.29 * 40)) for row in scores.tolist()])
    assert torch.equal(pruned, weight.where(~removed, 0.0))


def test_wanda_with_equal_norms_is_magnitude_by_row():
    weight, _ = random_layer()
    pruned = wanda(weight, torch.full((40,), 3.0, dtype=torch.float64), sparsity=0.5).weight
    assert_close(pruned, torch.cat([magnitude(row[None], None, sparsity=0.5).weight for row in weight]))
