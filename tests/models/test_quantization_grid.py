import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mopcompress.algorithms.gptq import gptq
from mopcompress.errors import DataError, RefusedError
from mopcompress.models.quantization_grid import FILE, codes_of, read_grid, write_grid
from mopcompress.models.weight_files import weight_files


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
    one = solved(bits, group_size)
    assert torch.equal(codes_of(one.weight.to(dtype), one.scales.half(), bits=bits), one.codes)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_weight_that_is_rounded_to_zero_has_no_sign(bits):
    one = solved(bits, 32)
    zeros = one.weight[one.codes == 0]
    assert len(zeros)
    assert not torch.signbit(zeros).any()


def test_codes_at_both_ends_and_below_the_normal_range_of_fp16_come_back():
    codes = torch.arange(-128, 128, dtype=torch.int8).expand(3, 256)
    scales = torch.tensor([[2.0**-24], [2.0**-15], [500.0]]).half()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(codes_of((codes * scales.float()).to(dtype), scales, bits=8), codes)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight, scale: weight[3, 4].add_(0.25 * scale[3, 0]),  # between two codes
        lambda weight, scale: weight[3, 4].copy_(8 * scale[3, 0]),  # one beyond the last code
        lambda weight, scale: weight[3, 4].copy_(-9 * scale[3, 0]),
        lambda weight, scale: weight[3, 4].fill_(torch.nan),
    ],
)
def test_a_weight_off_its_grid_is_refused(change):
    one = solved(4, 32)
    weight = one.weight.clone()
    change(weight, one.scales)
    with pytest.raises(DataError, match="does not lie on its grid of 4 bits"):
        codes_of(weight, one.scales.half(), bits=4)


@pytest.mark.parametrize("shape", [(23, 2), (24, 3)])
def test_scales_that_do_not_fit_are_refused(shape):
    with pytest.raises(DataError, match="do not fit"):
        codes_of(solved(4, 32).weight, torch.ones(shape).half(), bits=4)


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


# --- which files hold weights


def write_index(folder, *names):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))


def test_weight_files_are_the_one_file_or_the_shards_of_the_index(tmp_path):
    for name in ("grid.safetensors", "consolidated.safetensors", "b.safetensors", "a.safetensors"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == []
    write_index(tmp_path, "b.safetensors", "a.safetensors", "b.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "deep/a.safetensors", "a.bin"])
def test_an_index_never_leads_elsewhere(name, tmp_path):
    write_index(tmp_path, name)
    with pytest.raises(RefusedError, match="no safetensors file beside it"):
        weight_files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_a_data_error(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match="no index of weights"):
        weight_files(tmp_path)


def test_a_missing_shard_is_a_data_error(tmp_path):
    write_index(tmp_path, "a.safetensors")
    with pytest.raises(DataError, match=r"a\.safetensors, which is not there"):
        weight_files(tmp_path)
