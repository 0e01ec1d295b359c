"""The low-rank repair against its definition, in float64."""

import pytest
import torch
from reference import eora_slowly
from torch.testing import assert_close

from mopcompress.algorithms.eora import eora
from mopcompress.errors import NumericalError

SHAPES = [(12, 20), (20, 12), (16, 16)]


def compressed_layer(rows, columns, *, directions=None, seed=0):
    """Return a weight, its pruned form, and the Gram matrix of inputs in that many directions (None: in all)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = normal(rows, columns)
    span = normal(directions or columns, columns) * torch.logspace(0, -1.5, columns, dtype=torch.float64)
    inputs = normal(200, len(span)) @ span
    return weight, weight * (weight.abs() > 0.7), inputs.T @ inputs / 200


def error_of(missing, gram):
    return float(torch.trace(missing @ gram @ missing.T))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_the_product_is_that_of_the_definition(shape, rank):
    weight, compressed, gram = compressed_layer(*shape)
    up, down = eora(weight, compressed, gram, rank=rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    assert_close(up @ down, eora_slowly(weight, compressed, gram, rank), rtol=1e-8, atol=1e-8)


def test_a_direction_of_huge_inputs_does_not_hide_the_others():
    """Attention sinks have such inputs: the repair of float32 matrices is as good as that of float64 ones."""
    weight, compressed, gram = compressed_layer(24, 40)
    direction = torch.randn(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sink = gram + 1e7 * torch.outer(direction, direction)
    errors = {}
    for dtype in (torch.float32, torch.float64):
        up, down = eora(weight.to(dtype), compressed.to(dtype), sink.to(dtype), rank=6)
        assert up.dtype == down.dtype == dtype
        errors[dtype] = error_of(weight - compressed - (up @ down).double(), gram)
    assert errors[torch.float32] < 1.05 * errors[torch.float64]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", [None, 5])
def test_no_other_matrix_of_its_rank_does_better(shape, directions):
    weight, compressed, gram = compressed_layer(*shape, directions=directions)
    up, down = eora(weight, compressed, gram, rank=3)
    least = error_of(weight - compressed - up @ down, gram)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            other_up = up + size * torch.randn(up.shape, generator=generator, dtype=torch.float64)
            other_down = down + size * torch.randn(down.shape, generator=generator, dtype=torch.float64)
            assert error_of(weight - compressed - other_up @ other_down, gram) >= least


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", [None, 5])
def test_the_error_is_the_energy_of_the_other_directions(shape, directions):
    weight, compressed, gram = compressed_layer(*shape, directions=directions)
    values, vectors = torch.linalg.eigh(gram)
    sizes = torch.linalg.svdvals((weight - compressed) @ vectors @ values.clamp_min(0).sqrt().diag())
    for rank in (0, 2, 7):
        up, down = eora(weight, compressed, gram, rank=rank)
        error = error_of(weight - compressed - up @ down, gram)
        assert error == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_full_rank_gives_the_weight_back(shape, dtype):
    weight, compressed, gram = (matrix.to(dtype) for matrix in compressed_layer(*shape))
    up, down = eora(weight, compressed, gram, rank=min(shape))
    assert_close(compressed + up @ down, weight, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_weights_need_no_repair(shape):
    weight, compressed, gram = compressed_layer(*shape)
    up, down = eora(weight, weight, gram, rank=3)
    assert not up.any()
    assert not down.any()
    assert not (torch.matmul(*eora(weight, compressed, gram, rank=0))).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("directions", [1, 5])
def test_inputs_without_energy_give_finite_factors(shape, directions):
    weight, compressed, gram = compressed_layer(*shape, directions=directions)
    gram[:, 2] = gram[2] = 0  # an input that never fires
    for rank in (directions, min(shape)):
        up, down = eora(weight, compressed, gram, rank=rank)
        assert bool(up.isfinite().all() and down.isfinite().all())
        error = error_of(weight - compressed, gram)
        remaining = abs(error_of(weight - compressed - up @ down, gram))
        assert remaining < 1e-9 * error  # the inputs have no other directions


def test_a_gram_matrix_of_zeros_gives_finite_factors():
    weight, compressed, gram = compressed_layer(12, 20)
    up, down = eora(weight, compressed, torch.zeros_like(gram), rank=3)
    assert bool(up.isfinite().all() and down.isfinite().all())


def test_both_factors_have_equal_norms():
    up, down = eora(*compressed_layer(12, 20), rank=4)
    assert_close(up.norm(dim=0), down.norm(dim=1))


def test_a_bad_gram_matrix_and_a_bad_rank_raise():
    weight, compressed, gram = compressed_layer(12, 20)
    with pytest.raises(NumericalError, match="not finite"):
        eora(weight, compressed, gram * torch.nan, rank=2)
    with pytest.raises(ValueError, match="rank 13 of a matrix of 12 x 20"):
        eora(weight, compressed, gram, rank=13)
