"""Matrices on a grid, and files in memory, for the tests of formats."""

from collections.abc import Sequence

import torch

from mopcompress.formats.weight_format import EncodedTensor
from mopcompress.models.quantization_grid import QuantizationGrid


class MemoryFile:
    """The tensors and the header of a safetensors file, in memory."""

    def __init__(self, encoded: EncodedTensor) -> None:
        self.tensors, self.header = dict(encoded.tensors), dict(encoded.header)

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def metadata(self) -> dict[str, str]:
        return self.header


def bit_field(words: Sequence[int], index: int, bits: int) -> int:
    """Return number `index` of `bits` bits from words of 32 bits that form one long number, the first word lowest."""
    number = sum((word & 0xFFFFFFFF) << (32 * position) for position, word in enumerate(words))
    return (number >> (index * bits)) & (2**bits - 1)


def matrix_on_grid(
    bits: int,
    *,
    rows: int = 32,
    columns: int = 64,
    group_size: int = 32,
    sparsity: float = 0.0,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, QuantizationGrid]:
    """Return random codes, scales and weight of a linear "a", and its grid."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (rows, columns), generator=generator).to(torch.int8)
    codes *= torch.rand(rows, columns, generator=generator) >= sparsity
    scales = (torch.rand(rows, columns // group_size, generator=generator) + 0.1).half()
    weight = (codes * scales.float().repeat_interleave(group_size, dim=1)).to(dtype)
    return codes, scales, weight, QuantizationGrid(bits=bits, group_size=group_size, scales={"a": scales})
