"""The GPTQ format against its documented formula."""

import json

import pytest
import torch
from tiny_formats import bit_field, matrix_on_grid

from mopcompress.entrypoints.export import export
from mopcompress.errors import DataError
from mopcompress.formats import gptq
from mopcompress.models.meta_model import MetaModel
from mopcompress.models.quantization_grid import QuantizationGrid


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_its_formula(bits):
    codes, scales, weight, grid = matrix_on_grid(bits)
    parts = gptq.encode("a.weight", weight, grid).tensors
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        "a.qweight": (torch.int32, (64 * bits // 32, 32)),
        "a.qzeros": (torch.int32, (2, 32 * bits // 32)),
        "a.scales": (torch.float16, (2, 32)),
        "a.g_idx": (torch.int32, (64,)),
    }
    zero = 2 ** (bits - 1)
    assert parts["a.g_idx"].tolist() == [0] * 32 + [1] * 32
    for row in range(32):
        for column in range(64):
            group = column // 32
            code = bit_field(parts["a.qweight"][:, row].tolist(), column, bits)
            stored_zero = bit_field(parts["a.qzeros"][group].tolist(), row, bits)
            assert stored_zero == zero - 1  # version 1 stores one less
            assert code - (stored_zero + 1) == codes[row, column]
    assert torch.equal(parts["a.scales"], scales.T)


@pytest.mark.parametrize(
    ("group_size", "columns", "expected"),
    [(None, 384, 128), (384, 384, 128), (192, 384, 64), (128, 384, 128), (96, 384, 32), (32, 384, 32), (None, 96, 32)],
)
def test_the_largest_group_that_loaders_accept_is_used(group_size, columns, expected):
    linears = {"up": torch.nn.Linear(columns, 768), "down": torch.nn.Linear(768, 384)}
    scales = {
        name: torch.rand(linear.out_features, linear.in_features // (group_size or linear.in_features)).half()
        for name, linear in linears.items()
    }
    meta_model = MetaModel(linears=linears, transposed=frozenset(), blocks="blocks")
    fitted = gptq.fit(QuantizationGrid(bits=4, group_size=group_size, scales=scales), meta_model)
    assert fitted.group_size == expected
    for name, scale in scales.items():
        expected_scale = scale.repeat_interleave(linears[name].in_features // scale.shape[1], dim=1)
        assert torch.equal(fitted.scales[name].repeat_interleave(expected, dim=1), expected_scale)


def test_groups_that_no_loader_accepts_are_a_data_error():
    linears = {"up": torch.nn.Linear(64, 96)}
    meta_model = MetaModel(linears=linears, transposed=frozenset(), blocks="blocks")
    with pytest.raises(DataError, match="none of these divides 16"):
        gptq.fit(QuantizationGrid(bits=4, group_size=16, scales={"up": torch.ones(96, 4).half()}), meta_model)
    linears["up"] = torch.nn.Linear(64, 20)
    with pytest.raises(DataError, match="20 outputs of up in 3 bits do not fill whole words"):
        gptq.fit(QuantizationGrid(bits=3, group_size=32, scales={"up": torch.ones(20, 2).half()}), meta_model)


def test_a_whole_model_needs_no_list_of_modules(quantized_folder, tmp_path):
    export(str(quantized_folder), "gptq", tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings.keys().isdisjoint({"dynamic", "modules_in_block_to_quantize"})
    assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (4, 32, True, False)
