import torch
from tiny_formats import matrix_on_grid

from mopcompress.formats import FORMATS
from mopcompress.formats.weight_format import store_unchanged


def test_other_tensors_are_stored_unchanged():
    grid = matrix_on_grid(4)[3]
    for weight_format in FORMATS.values():
        for tensor in (torch.zeros(100).half(), torch.zeros(50, 50, dtype=torch.int64), torch.ones(50, 50).half()):
            for name in ("norm.weight", "a.bias", "a"):
                assert weight_format.encode(name, tensor, grid) == store_unchanged(name, tensor)
