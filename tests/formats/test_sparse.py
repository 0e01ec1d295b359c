"""The sparse container against its documented definition."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_folders import WEIGHTS, assert_same_tensors, compressed_folder, read_tensors
from tiny_formats import MemoryFile, bit_field, matrix_on_grid

from mopcompress.entrypoints.export import export
from mopcompress.formats import sparse


def decode_by_definition(parts, entry, bits):
    """Decode by the definition, position by position."""
    rows, columns = entry["shape"]
    if entry["places"] == "bitmask":
        positions = [
            row * columns + column
            for row in range(rows)
            for column in range(columns)
            if parts["a.weight.bitmask"][row, column // 8] >> (column % 8) & 1
        ]
    elif entry["places"] == "gaps":
        escape, position, positions = 2 ** entry["gap_bits"] - 1, 0, []
        for index in range(entry["steps"]):
            step = bit_field(parts["a.weight.gaps"].tolist(), index, entry["gap_bits"])
            position += step
            if step != escape:
                positions.append(position)
                position += 1
    else:
        positions = list(range(rows * columns))
    weight = torch.zeros(rows * columns, dtype=getattr(torch, entry["dtype"]))
    for index, position in enumerate(positions):
        if "a.weight.values" in parts:
            weight[position] = parts["a.weight.values"][index]
        else:
            code = bit_field(parts["a.weight.codes"].tolist(), index, bits) - 2 ** (bits - 1)
            scales = parts["a.weight.scales"]
            group = position % columns * scales.shape[1] // columns
            weight[position] = code * scales[position // columns, group].float()
    return weight.view(rows, columns)


@pytest.mark.parametrize(
    ("sparsity", "on_grid", "places"),
    [
        (0.02, True, "all"),
        (0.5, True, "bitmask"),
        (0.95, True, "gaps"),
        (0.5, False, "bitmask"),
        (0.95, False, "gaps"),
    ],
)
@pytest.mark.parametrize("bits", [3, 4])
def test_the_container_is_its_definition(sparsity, on_grid, places, bits):
    _, _, weight, grid = matrix_on_grid(bits, sparsity=sparsity, columns=96)
    encoded = sparse.encode("a.weight", weight, grid if on_grid else None)
    entry = json.loads(encoded.header["a.weight"])
    assert entry["places"] == places
    assert torch.equal(decode_by_definition(encoded.tensors, entry, bits), weight)
    assert_same_tensors(dict(sparse.decode(MemoryFile(encoded), bits)), {"a.weight": weight})


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("on_grid", [True, False])
def test_the_container_takes_the_fewest_bytes(sparsity, on_grid):
    codes, scales, weight, grid = matrix_on_grid(4, rows=64, columns=256, sparsity=sparsity)
    encoded = sparse.encode("a.weight", weight, grid if on_grid else None)
    size = sum(part.nbytes for part in encoded.tensors.values())
    survivors = int((codes != 0).sum())
    value = 0.5 if on_grid else 2.0
    fixed = scales.nbytes if on_grid else 0
    all_positions, bitmask = weight.numel() * value, weight.numel() / 8 + survivors * value
    gaps_of_8_bits = survivors * (1 + value)
    assert size - fixed <= min(all_positions, bitmask, gaps_of_8_bits) + 8  # a word may be partly empty


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_survivors_keep_every_bit(dtype):
    weight = torch.zeros(16, 96, dtype=dtype)
    weight[3, 4], weight[5, 6], weight[7, 8] = torch.finfo(dtype).tiny / 2, -0.0, torch.finfo(dtype).max
    encoded = sparse.encode("a.weight", weight, None)
    assert encoded.tensors["a.weight.values"].numel() == 3
    (decoded,) = (tensor for _, tensor in sparse.decode(MemoryFile(encoded), 0))
    assert torch.equal(decoded.view(torch.uint8), weight.view(torch.uint8))


def test_a_stack_of_matrices_comes_back():
    weight = torch.zeros(3, 8, 64).half()
    weight[1, 2, 3] = weight[2, 7, 63] = 1.5
    encoded = sparse.encode("experts", weight, None)
    assert_same_tensors(dict(sparse.decode(MemoryFile(encoded), 0)), {"experts": weight})


@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral", "qwen3"])
@pytest.mark.parametrize("bits", [4, None])
def test_the_container_holds_every_family(family, bits, tmp_path):
    folder = compressed_folder(tmp_path / "in", family=family, bits=bits, group_size=16, sparsity=0.7)
    export(str(folder), "sparse", tmp_path / "out")
    assert_same_tensors(read_tensors(tmp_path / "out"), load_file(folder / WEIGHTS))
    if bits:
        with safe_open(next((tmp_path / "out").glob("sparse-*")), framework="pt") as file:
            assert any(name.endswith(".codes") for name in file.keys())  # noqa: SIM118


def test_a_pruned_folder_is_never_rounded(pruned_folder, tmp_path):
    export(str(pruned_folder), "sparse", tmp_path / "out")
    with safe_open(next((tmp_path / "out").glob("sparse-*")), framework="pt") as file:
        assert not [name for name in file.keys() if name.endswith(".codes")]  # noqa: SIM118
