from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import WEIGHTS, compressed_folder, read_tensors

from mopcompress.entrypoints.export import export
from mopcompress.errors import DataError
from mopcompress.formats import FORMATS
from mopcompress.formats.model_reader import open_model, tensor_hash
from mopcompress.models.quantization_grid import extract_codes, read_grid


def test_codes_survive_every_format(tmp_path):
    folder = compressed_folder(tmp_path / "in", bits=3, sparsity=0.5)
    grid = read_grid(folder)
    expected = {
        name: extract_codes(load_file(folder / WEIGHTS)[f"{name}.weight"], grid.scales[name], bits=3)
        for name in grid.scales
    }
    for format in FORMATS:
        export(str(folder), format, tmp_path / format)
        reader = open_model(tmp_path / format)
        tensors = read_tensors(tmp_path / format)
        for name, codes in expected.items():
            assert torch.equal(reader.grid.codes(name, tensors[f"{name}.weight"]), codes)


def test_files_of_two_formats_are_a_data_error(quantized_folder, tmp_path):
    export(str(quantized_folder), "sparse", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("sparse-*")
    save_file({"x": torch.ones(1)}, path.with_name("sparse-other.safetensors"), {"mopcompress": "gptq"})
    with pytest.raises(DataError, match="in the formats gptq, sparse"):
        open_model(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_sign_of_a_zero_does_not_change_a_hash(dtype):
    zeros = torch.zeros(3, 4, dtype=dtype)
    assert tensor_hash(-zeros) == tensor_hash(zeros)


def test_a_hash_depends_on_dtype_shape_and_numbers():
    tensor = torch.arange(12).view(3, 4).float()
    others = [tensor.double(), tensor.view(4, 3), tensor + 1, tensor.int(), tensor.T]
    assert len({tensor_hash(other) for other in [tensor, *others]}) == 6
    assert tensor_hash(tensor) == sha256(b"float32 [3, 4] " + tensor.numpy().tobytes()).hexdigest()
