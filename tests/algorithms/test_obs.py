import pytest
import torch
from compression_cases import TIGHT, gram_of, random_layer
from reference import (
    damped,
    fix_by_least_squares,
)
from torch.testing import assert_close

from mopcompress.algorithms.gptq import gptq
from mopcompress.algorithms.obs import inverse_factor, sweep
from mopcompress.algorithms.sparsegpt import sparsegpt
from mopcompress.errors import NumericalError


@pytest.mark.parametrize("size", [1, 40, 129, 300])
def test_the_factor_is_the_cholesky_factor_of_the_inverse(size):
    gram = gram_of(random_layer(size=size)[1])
    factor = inverse_factor(gram, damping=0.01)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01)), upper=True)
    assert_close(factor.upper, expected, **TIGHT)
    assert factor.escalations == 0


def test_an_input_that_never_fires_does_not_touch_the_others():
    _, inputs = random_layer()
    live = [j for j in range(40) if j not in (5, 39)]
    inputs[:, [5, 39]] = 0
    upper = inverse_factor(gram_of(inputs), damping=0.01).upper
    alone = inverse_factor(gram_of(inputs[:, live]), damping=0.01).upper
    assert_close(upper[live][:, live], alone, **TIGHT)


def test_an_input_that_never_fires_needs_no_damping():
    _, inputs = random_layer()
    inputs[:, 5] = 0
    assert inverse_factor(gram_of(inputs), damping=0.0).escalations == 0


def test_a_layer_that_never_fires_has_a_factor():
    assert inverse_factor(torch.zeros(4, 4), damping=0.01).upper.isfinite().all()


def test_too_few_tokens_escalate_the_damping():
    gram = gram_of(torch.randn(5, 40, generator=torch.Generator().manual_seed(0)))
    assert inverse_factor(gram, damping=0.01).escalations == 0
    factor = inverse_factor(gram, damping=0.0)
    assert factor.escalations == 1
    assert_close(factor.upper, inverse_factor(gram, damping=1e-4).upper)
    assert sparsegpt(torch.ones(3, 40), gram, sparsity=0.5, damping=0.0).escalations == 1
    assert gptq(torch.ones(3, 40), gram, bits=4, group_size=8, damping=0.0).escalations == 1


def test_a_pivot_of_rounding_noise_is_no_pivot():
    for short_of_one, escalations in ((2.0**-23, 1), (2.0**-15, 0)):  # LAPACK finds both positive definite
        gram = torch.eye(2) + (1 - short_of_one) * (1 - torch.eye(2))
        assert inverse_factor(gram, damping=0.0).escalations == escalations


def test_each_escalation_is_tenfold():
    gram = torch.eye(10, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 1.05  # an eigenvalue of -0.05: positive definite once damping exceeds 0.05
    factor = inverse_factor(gram, damping=0.002)
    assert factor.escalations == 2
    assert_close(factor.upper, inverse_factor(gram, damping=0.2).upper)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (
            [[1.0, 500.0], [500.0, 1.0]],
            "2x2 .* not positive definite with damping 0.01, nor after raising it tenfold 4",
        ),
        ([[1.0, 0.0], [torch.nan, 1.0]], "not finite"),
        ([[1.0, 0.5], [0.0, 1.0]], "not symmetric"),
    ],
)
def test_a_matrix_that_is_no_gram_matrix_raises(gram, message):
    with pytest.raises(NumericalError, match=message):
        inverse_factor(torch.tensor(gram), damping=0.01)


@pytest.mark.parametrize("panel", [1, 4, 7, 40, 64])
@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_batching_does_not_change_the_least_squares_sweep(panel, block):
    weight, inputs = random_layer()
    gram = gram_of(inputs)

    def solve_panel(first, columns):
        level = columns.abs().mean()  # depends on the panel, so that a stale panel shows

        def write_loss(index, column, error):
            error.copy_(column - (column * 3 / level).round() * level / 3)

        return write_loss

    def begin(first, columns):
        level = columns.abs().mean()
        return lambda index, column: (column * 3 / level).round() * level / 3

    factor = inverse_factor(gram, damping=0.01)
    swept = sweep(weight, factor, solve_panel, panel_columns=panel, block_columns=block)
    assert_close(swept, fix_by_least_squares(weight, damped(gram, 0.01), panel, begin), **TIGHT)


def test_feedback_that_overflows_is_reported():
    weight, inputs = random_layer(dtype=torch.float32)
    with pytest.raises(NumericalError, match="overflowed"):
        gptq(weight.masked_fill(weight > 2, torch.inf), gram_of(inputs), bits=3, group_size=8)
