import math

import pytest
import torch
from tiny_formats import bit_field, matrix_on_grid

from mopcompress.formats import compressed_tensors


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [64, 96])
def test_compressed_tensors_is_its_formula(bits, columns):
    codes, scales, weight, grid = matrix_on_grid(bits, rows=5, columns=columns)
    parts = compressed_tensors.encode("a.weight", weight, grid).tensors
    assert parts["a.weight_packed"].dtype == torch.int32
    assert parts["a.weight_packed"].shape == (5, math.ceil(columns * bits / 32))
    assert parts["a.weight_shape"].dtype == torch.int64
    assert parts["a.weight_shape"].tolist() == [5, columns]
    assert torch.equal(parts["a.weight_scale"], scales)
    for row in range(5):
        numbers = [bit_field(parts["a.weight_packed"][row].tolist(), column, bits) for column in range(columns)]
        assert [number - 2 ** (bits - 1) for number in numbers] == codes[row].tolist()
