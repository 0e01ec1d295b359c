import pytest
import torch

from mopcompress.backends.validation import describe_mismatch, round_scales_to_fp16


def test_a_sparsity_may_be_missed_by_a_hundredth() -> None:
    weight = torch.ones(10, 100)
    weight[:, :50] = 0
    assert describe_mismatch(weight, None, {"sparsity": 0.5}) is None
    assert describe_mismatch(weight, None, {"sparsity": 0.505}) is None
    assert describe_mismatch(weight, None, {"sparsity": 0.52}) == "has 50.00% zeros instead of 52.00%"
    assert describe_mismatch(weight, None, {"sparsity": 0.48}) is not None


def test_a_narrow_matrix_may_miss_a_weight_per_row() -> None:
    weight = torch.ones(5, 20)
    weight[:, :13] = 0
    assert describe_mismatch(weight, None, {"sparsity": 0.7}) is None
    assert describe_mismatch(weight, None, {"sparsity": 0.71}) is not None


def test_every_group_of_a_pattern_counts() -> None:
    weight = torch.ones(3, 8)
    weight[:, [0, 2, 5, 6]] = 0
    assert describe_mismatch(weight, None, {"sparsity": 0.5, "pattern": (2, 4)}) is None
    weight[1, 5], weight[1, 1] = 1, 0
    assert (
        describe_mismatch(weight, None, {"sparsity": 0.5, "pattern": [2, 4]})
        == "has fewer than 2 zeros in 16.67% of its groups of 4"
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [8, None])
def test_weights_off_the_grid_are_found(bits: int, group_size: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 64), generator=generator)
    scales = 0.1 + torch.rand(6, 64 // (group_size or 64), generator=generator)
    options = {"bits": bits, "group_size": group_size}
    spread = scales.repeat_interleave(group_size or 64, 1)
    weight = codes * spread
    assert describe_mismatch(weight, scales, options) is None
    assert "no scales" in describe_mismatch(weight, None, options)
    assert "no scales" in describe_mismatch(weight, scales[:, :0], options)
    assert "not positive" in describe_mismatch(weight, scales * 0, options)
    beyond = weight.clone()
    beyond[0, 0] = 2 ** (bits - 1) * spread[0, 0]
    assert describe_mismatch(beyond, scales, options) == f"has 0.26% of its weights off the grid of {bits} bits"
    between = weight.clone()
    between[5, 63] -= 0.3 * spread[5, 63]
    assert "off the grid" in describe_mismatch(between, scales, options)


def test_scales_are_rounded_to_fp16_and_codes_stay() -> None:
    scales = torch.tensor([[0.1, 1e-9], [3.3, 0.7]])
    codes = torch.tensor([[1, -4, 3, 0], [2, 2, -1, 3]])
    weight, rounded = round_scales_to_fp16(codes * scales.repeat_interleave(2, 1), scales)
    assert torch.equal(rounded, torch.tensor([[0.1, 2.0**-24], [3.3, 0.7]]).half().float())
    assert torch.equal(weight, codes * rounded.repeat_interleave(2, 1))
