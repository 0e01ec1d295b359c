import pytest
import torch
from compression_cases import TIGHT, gram_of, random_layer
from reference import (
    cost_of_zero,
    damped,
    fix_by_least_squares,
    gptq_slowly,
    layer_error,
    lowest_by_sorting,
    scale_slowly,
)
from torch.testing import assert_close

from mopcompress.algorithms.gptq import _snap_to_grid, gptq
from mopcompress.algorithms.magnitude import magnitude
from mopcompress.errors import DataError


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, 20), (4, 40), (8, 5)])
def test_gptq_is_its_definition(bits, group, act_order):
    weight, inputs = random_layer()
    gram = gram_of(inputs)
    fast = gptq(weight, gram, bits=bits, group_size=group, act_order=act_order)
    slow = gptq_slowly(weight, damped(gram, 0.01), gram.diagonal(), bits=bits, group=group, act_order=act_order)
    assert_close(fast.weight, slow, **TIGHT)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_the_block_size_of_gptq_does_not_matter(block, act_order):
    weight, inputs = random_layer()
    gram = gram_of(inputs)
    blocked, default = (
        gptq(weight, gram, bits=3, group_size=8, block_size=size, act_order=act_order) for size in (block, 40)
    )
    assert torch.equal(blocked.codes, default.codes)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_weight_is_exactly_codes_times_scales(bits, dtype, act_order):
    weight, inputs = random_layer(dtype=dtype)
    solved = gptq(weight, gram_of(inputs), bits=bits, group_size=8, act_order=act_order)
    assert solved.codes.dtype == torch.int8
    assert solved.scales.shape == (6, 5)
    assert int(solved.codes.min()) >= -(2 ** (bits - 1))
    assert int(solved.codes.max()) <= 2 ** (bits - 1) - 1
    assert torch.equal(solved.weight, solved.codes.to(dtype) * solved.scales.repeat_interleave(8, 1))
    assert torch.equal(solved.scales, solved.scales.half().to(dtype))
    assert not solved.weight[solved.weight == 0].signbit().any()


def test_float_residue_is_removed():
    rounded = torch.tensor([[3.0, -8.0, 0.0, 1.0]]) * 0.25 * (1 - 1e-6)
    solved = _snap_to_grid(rounded, torch.tensor([[0.25]]), 0)
    assert solved.codes.tolist() == [[3, -8, 0, 1]]
    assert solved.weight.tolist() == [[0.75, -2.0, 0.0, 0.25]]


def test_more_bits_lose_less():
    weight, inputs = random_layer()
    gram = gram_of(inputs)
    errors = [layer_error(weight, gptq(weight, gram, bits=bits, group_size=8).weight, gram) for bits in (2, 4, 8)]
    assert errors[0] > 8 * errors[1]
    assert errors[1] > 8 * errors[2]
    assert errors[2] < 1e-4 * layer_error(weight, 0 * weight, gram)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_preserves_zeros(act_order):
    weight, inputs = random_layer()
    gram = gram_of(inputs)
    weight = magnitude(weight, None, sparsity=0.5).weight
    options = {"bits": 4, "group_size": 8, "act_order": act_order}
    quantized = gptq(weight, gram, keep_zeros=True, **options)
    assert (quantized.weight[weight == 0] == 0).all()
    slow = gptq_slowly(
        weight, damped(gram, 0.01), gram.diagonal(), bits=4, group=8, act_order=act_order, keep_zeros=True
    )
    assert_close(quantized.weight, slow, **TIGHT)
    assert (gptq(weight, gram, **options).weight[weight == 0] != 0).any()


def prune_and_round_slowly(weight, gram, importance, *, sparsity, bits, group):
    """Apply SparseGPT's mask and GPTQ's rounding to one group of columns after the other."""

    def solve_panel(first, columns):
        costs = torch.stack([cost_of_zero(gram, first + k, columns[:, k]) for k in range(group)], 1)
        ends = [round(sparsity * len(weight) * end) for end in (first, first + group)]
        mask = torch.tensor(lowest_by_sorting(costs.flatten().tolist(), ends[1] - ends[0])).reshape(costs.shape)
        remaining = columns.masked_fill(mask, 0.0)
        group_importance = importance[first : first + group].tolist()
        scales = torch.tensor(
            [scale_slowly(row, group_importance, bits) for row in remaining.tolist()], dtype=weight.dtype
        )

        def solve_column(j, column):
            codes = (column / scales).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            return torch.where(mask[:, j - first], 0.0, codes * scales)

        return solve_column

    return fix_by_least_squares(weight, gram, group, solve_panel)


def test_pruning_and_rounding_in_one_sweep_is_its_definition():
    weight, inputs = random_layer()
    gram = gram_of(inputs)
    joint = gptq(weight, gram, bits=4, group_size=8, sparsity=0.5)
    slow = prune_and_round_slowly(weight, damped(gram, 0.01), gram.diagonal(), sparsity=0.5, bits=4, group=8)
    assert_close(joint.weight, slow, **TIGHT)
    assert int((joint.weight == 0).sum()) >= weight.numel() // 2  # rounding makes more
    assert torch.equal(joint.codes == 0, joint.weight == 0)


def test_a_pattern_holds_after_rounding_in_the_same_sweep():
    weight, inputs = random_layer()
    joint = gptq(weight, gram_of(inputs), bits=4, group_size=8, sparsity=0.5, pattern=(2, 4))
    assert bool(((joint.weight == 0).reshape(-1, 4).sum(1) >= 2).all())


def test_pruning_with_act_order_raises():
    weight, inputs = random_layer()
    with pytest.raises(DataError, match="act_order"):
        gptq(weight, gram_of(inputs), bits=4, group_size=8, sparsity=0.5, act_order=True)


def test_gptq_zeroes_weights_of_an_input_that_never_fires():
    weight, inputs = random_layer()
    weight[:, 11] = 100.0  # would also spoil the scale of its group
    inputs[:, 11] = 0
    solved = gptq(weight, gram_of(inputs), bits=4, group_size=8)
    assert (solved.weight[:, 11] == 0).all()
    assert solved.scales.max() < 1


def test_without_a_group_size_a_row_is_a_group():
    weight, inputs = random_layer()
    whole, grouped = (gptq(weight, gram_of(inputs), bits=4, group_size=size) for size in (None, 40))
    assert whole.scales.shape == (6, 1)
    assert torch.equal(whole.weight, grouped.weight)


def test_a_group_of_zeros_is_zero():
    _, inputs = random_layer()
    solved = gptq(torch.zeros(6, 40, dtype=torch.float64), gram_of(inputs), bits=4, group_size=8)
    assert (solved.codes == 0).all()
    assert (solved.scales > 0).all()


@pytest.mark.parametrize(
    ("size", "group", "advice"),
    [(96, 64, "choose group_size 32$"), (128, 48, "choose group_size 32 or 64 or 128$"), (40, 32, "leave this layer")],
)
def test_an_error_about_groups_names_those_that_fit(size, group, advice):
    with pytest.raises(DataError, match=f"{size} inputs cannot be cut into groups of {group}; {advice}"):
        gptq(torch.ones(2, size), torch.eye(size), bits=4, group_size=group)


@pytest.mark.parametrize("bits", [1, 9])
def test_impossible_bits_raise(bits):
    with pytest.raises(DataError, match=f"cannot quantise to {bits} bits"):
        gptq(torch.ones(2, 32), torch.eye(32), bits=bits, group_size=32)
