import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mopcompress.algorithms.gptq import gptq
from mopcompress.errors import DataError
from mopcompress.models.quantization_grid import FILE, extract_codes, read_grid, write_grid


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solved(bits, group_size, seed=0):
    inputs = draw(200, 64, seed=seed + 1)
    return gptq(draw(24, 64, seed=seed), inputs.T @ inputs / 200, bits=bits, group_size=group_size)


@pytest.mark.parametrize("group_size", [32, None])
def test_a_grid_is_read_as_it_was_written(group_size, tmp_path):
    scales = {"model.layers.0.q": solved(3, group_size).scales, "model.layers.0.k": solved(3, group_size, 5).scales}
    write_grid(tmp_path / FILE, scales, bits=3, group_size=group_size)
    grid = read_grid(tmp_path)
    assert (grid.bits, grid.group_size, grid.scales.keys()) == (3, group_size, scales.keys())
    for name, scale in scales.items():
        assert grid.scales[name].dtype == torch.float16
        assert torch.equal(grid.scales[name].float(), scale)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert set(file.keys()) == {f"{name}.scales" for name in scales}
        assert file.metadata() == {"format": "pt", "bits": "3", "group_size": str(group_size or -1)}


def test_a_folder_without_a_grid_has_none(tmp_path):
    assert read_grid(tmp_path) is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_codes_come_back_from_stored_weights(bits, group_size, dtype):
    solution = solved(bits, group_size)
    codes = extract_codes(solution.weight.to(dtype), solution.scales.half(), bits=bits)
    assert torch.equal(codes, solution.codes)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_weight_rounded_to_zero_has_no_sign(bits):
    solution = solved(bits, 32)
    zeros = solution.weight[solution.codes == 0]
    assert len(zeros)
    assert not torch.signbit(zeros).any()


def test_extreme_codes_and_subnormal_scales_come_back():
    codes = torch.arange(-128, 128, dtype=torch.int8).expand(3, 256)
    scales = torch.tensor([[2.0**-24], [2.0**-15], [500.0]]).half()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(extract_codes((codes * scales.float()).to(dtype), scales, bits=8), codes)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight, scale: weight[3, 4].add_(0.25 * scale[3, 0]),  # between two codes
        lambda weight, scale: weight[3, 4].copy_(8 * scale[3, 0]),  # one beyond the last code
        lambda weight, scale: weight[3, 4].copy_(-9 * scale[3, 0]),
        lambda weight, scale: weight[3, 4].fill_(torch.nan),
    ],
)
def test_a_weight_off_its_grid_is_a_data_error(change):
    solution = solved(4, 32)
    weight = solution.weight.clone()
    change(weight, solution.scales)
    with pytest.raises(DataError, match="does not lie on its grid of 4 bits"):
        extract_codes(weight, solution.scales.half(), bits=4)


@pytest.mark.parametrize("shape", [(23, 2), (24, 3)])
def test_scales_that_do_not_fit_are_a_data_error(shape):
    with pytest.raises(DataError, match="do not fit"):
        extract_codes(solved(4, 32).weight, torch.ones(shape).half(), bits=4)


@pytest.mark.parametrize(
    "content",
    [
        lambda path: path.write_bytes(b"rubbish"),
        lambda path: save_file({"a.scales": torch.ones(2, 2).half()}, path, {"bits": "4"}),
        lambda path: save_file({"a.scales": torch.ones(2, 2).half()}, path, {"bits": "four", "group_size": "32"}),
        lambda path: save_file({"a.scales": torch.ones(2, 2)}, path, {"bits": "4", "group_size": "32"}),
        lambda path: save_file({"a.scales": torch.ones(2).half()}, path, {"bits": "4", "group_size": "32"}),
        lambda path: save_file({"a.scales": torch.zeros(2, 2).half()}, path, {"bits": "4", "group_size": "32"}),
        lambda path: save_file(
            {"a.scales": torch.full((2, 2), torch.inf).half()}, path, {"bits": "4", "group_size": "1"}
        ),
    ],
)
def test_a_damaged_grid_is_a_data_error(content, tmp_path):
    content(tmp_path / FILE)
    with pytest.raises(DataError, match="make the folder again"):
        read_grid(tmp_path)
