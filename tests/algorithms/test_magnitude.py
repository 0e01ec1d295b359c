import pytest
import torch
from compression_cases import random_layer
from reference import (
    lowest_by_sorting,
)

from mopcompress.algorithms.magnitude import global_threshold_sparsities, magnitude


def test_magnitude_removes_the_smallest_of_the_matrix():
    weight, _ = random_layer()
    pruned = magnitude(weight, None, sparsity=0.29).weight
    removed = torch.tensor(lowest_by_sorting(weight.abs().flatten().tolist(), round(0.29 * 240))).reshape(6, 40)
    assert torch.equal(pruned, weight.where(~removed, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.29, 0.5, 0.95])
def test_one_threshold_removes_the_smallest_of_all_matrices(sparsity, dtype):
    seeded = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 40), "b": (33, 5), "c": (1, 64)}
    weights = {
        name: (scale * torch.randn(shape, generator=seeded)).half().to(dtype)  # of few bits: some tie
        for scale, (name, shape) in enumerate(shapes.items(), start=1)
    }
    together = torch.cat([weight.flatten() for weight in weights.values()])
    removed = torch.zeros(len(together), dtype=torch.bool)
    removed[together.abs().argsort(stable=True)[: round(sparsity * len(together))]] = True
    sparsities = global_threshold_sparsities(weights.items, sparsity)
    for expected, (name, weight) in zip(
        removed.split([weight.numel() for weight in weights.values()]), weights.items(), strict=True
    ):
        mask = magnitude(weight, None, sparsity=sparsities[name]).weight == 0
        assert torch.equal(mask, expected.reshape(weight.shape) | (weight == 0))


def test_ties_at_the_threshold_go_in_earlier_matrices():
    ones = torch.ones(3, 4)
    assert global_threshold_sparsities({"a": ones, "b": -ones, "c": 2 * ones}.items, 0.5) == {
        "a": 1.0,
        "b": 0.5,
        "c": 0.0,
    }
    assert global_threshold_sparsities({"a": torch.zeros(2, 2), "b": ones}.items, 0.25) == {"a": 1.0, "b": 0.0}
