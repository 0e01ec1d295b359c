import pytest
import torch
from compression_cases import gram_of
from torch.testing import assert_close

from mopcompress.algorithms.dense_targets import DenseActivations, dense_target
from mopcompress.algorithms.input_statistics import input_shift
from mopcompress.errors import NumericalError


def drifted_layer(*, tokens=200, size=12, seed=0):
    """Return a weight, inputs, and the dense inputs that they drifted from."""
    seeded = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=seeded, dtype=torch.float64)
    dense = torch.randn(tokens, size, generator=seeded, dtype=torch.float64) @ mix
    inputs = dense + 0.5 * torch.randn(tokens, size, generator=seeded, dtype=torch.float64) @ mix
    return torch.randn(7, size, generator=seeded, dtype=torch.float64), inputs, dense


def least_squares(weight, inputs, dense, free, ridge):
    """Minimise |w x_dense - v x|² + ridge |v - w|² row by row, over the free weights; the others are zero."""
    best = torch.zeros_like(weight)
    for row in range(len(weight)):
        used = free[row]
        left = torch.cat([inputs[:, used] / len(inputs) ** 0.5, ridge**0.5 * torch.eye(int(used.sum())).double()])
        right = torch.cat([dense @ weight[row] / len(inputs) ** 0.5, ridge**0.5 * weight[row, used]])
        best[row, used] = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return best


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_the_target_is_the_least_squares_fit(zeros, fraction):
    weight, inputs, dense = drifted_layer()
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < zeros] = 0
    gram = gram_of(inputs)
    best = least_squares(weight, inputs, dense, weight != 0, 0.01 * float(gram.diagonal().mean()))
    target = dense_target(
        weight, gram, weight @ input_shift(inputs, dense), fraction=fraction, keep_zeros=True, damping=0.01
    ).weight
    assert_close(target, weight + fraction * (best - weight), rtol=1e-6, atol=1e-6)
    assert torch.equal(target == 0, weight == 0)


def test_without_keeping_zeros_they_take_part():
    weight, inputs, dense = drifted_layer()
    weight[:, 3:] = 0
    gram, everything = gram_of(inputs), torch.ones(weight.shape, dtype=torch.bool)
    best = least_squares(weight, inputs, dense, everything, 0.01 * float(gram.diagonal().mean()))
    target = dense_target(
        weight, gram, weight @ input_shift(inputs, dense), fraction=1.0, keep_zeros=False, damping=0.01
    ).weight
    assert_close(target, best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("keep_zeros", [False, True])
def test_inputs_without_drift_change_nothing(keep_zeros):
    weight, inputs, _ = drifted_layer()
    weight[0, 0] = 0
    gram = gram_of(inputs)
    shift = DenseActivations(inputs.clone(), are_outputs=False).target_shift(weight, inputs)
    assert torch.equal(dense_target(weight, gram, shift, fraction=1.0, keep_zeros=keep_zeros).weight, weight)


def test_an_input_that_never_fires_keeps_its_weights():
    weight, inputs, dense = drifted_layer()
    inputs[:, 5] = 0
    target = dense_target(
        weight, gram_of(inputs), weight @ input_shift(inputs, dense), fraction=1.0, keep_zeros=False, damping=0.01
    ).weight
    assert_close(target[:, 5], weight[:, 5])


def test_the_shift_of_chunks_is_the_shift_of_all_tokens():
    _, inputs, dense = drifted_layer(tokens=9001)
    assert_close(input_shift(inputs, dense), (dense - inputs).T @ inputs / 9001)


def test_dense_inputs_that_are_not_finite_raise():
    _, inputs, dense = drifted_layer()
    dense[3, 4] = torch.inf
    with pytest.raises(NumericalError, match="dense"):
        input_shift(inputs, dense)


def test_few_zeros_stay_and_leave_the_others_alone():
    weight, inputs, dense = drifted_layer()
    wide = torch.cat([weight] * 30)
    wide[0, 0] = 0
    gram, shift = gram_of(inputs), wide @ input_shift(inputs, dense)
    with_zeros, plain = (
        dense_target(wide, gram, shift, fraction=1.0, keep_zeros=keep).weight for keep in (True, False)
    )
    assert plain[0, 0] != 0
    plain[0, 0] = 0
    assert torch.equal(with_zeros, plain)


def test_outputs_and_inputs_give_the_same_shift():
    weight, inputs, dense = drifted_layer()
    by_inputs, by_outputs = (
        DenseActivations(dense, are_outputs=False),
        DenseActivations(dense @ weight.T, are_outputs=True),
    )
    expected = weight @ (dense - inputs).T @ inputs / len(inputs)
    assert_close(by_inputs.target_shift(weight, inputs), expected)
    assert_close(by_outputs.target_shift(weight, inputs), expected)


@pytest.mark.parametrize("are_outputs", [False, True])
def test_the_shift_is_over_the_tokens_of_the_dense_model(are_outputs):
    weight, inputs, dense = drifted_layer()
    first = dense[: len(dense) // 3]
    activations = DenseActivations(first @ weight.T if are_outputs else first, are_outputs=are_outputs)
    expected = weight @ (first - inputs[: len(first)]).T @ inputs[: len(first)] / len(first)
    assert_close(activations.target_shift(weight, inputs), expected)


def test_outputs_without_drift_change_a_few_roundings():
    """In single precision, with an input a thousand times the others, as massive activations are."""
    weight, inputs, _ = drifted_layer(tokens=5000, size=64)
    weight, inputs = weight.float(), inputs.float()
    inputs[:, 5] *= 1000
    gram = gram_of(inputs)
    shift = DenseActivations(inputs @ weight.T, are_outputs=True).target_shift(weight, inputs)
    target = dense_target(weight, gram, shift, fraction=1.0, keep_zeros=False).weight
    assert float((target - weight).norm() / weight.norm()) < 1e-4


def test_dense_outputs_that_are_not_finite_raise():
    weight, inputs, dense = drifted_layer()
    outputs = dense @ weight.T
    outputs[3, 4] = torch.inf
    with pytest.raises(NumericalError, match="dense"):
        DenseActivations(outputs, are_outputs=True).target_shift(weight, inputs)
