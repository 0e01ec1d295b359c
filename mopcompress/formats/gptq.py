"""GPTQ, version 1 of its checkpoint format, symmetric: what AutoGPTQ wrote and everything that came after it reads.

A linear `P` of [out, in] in groups of G inputs and b bits is, with unsigned codes and the zero z = 2^(b-1):

    P.qweight  int32 [in*b/32, out]    codes, packed along the inputs
    P.qzeros   int32 [in/G, out*b/32]  z - 1, packed along the outputs (version 1 stores one less)
    P.scales   fp16  [in/G, out]
    P.g_idx    int32 [in]              the group of each input
    weight = (code - z) * scale, transposed

Loaders on CPUs take groups of 32, 64 or 128 inputs. Any grid whose groups those divide is written in the largest of
them that does: the same scale several times over.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mopcompress import __version__
from mopcompress.errors import DataError
from mopcompress.formats.packing import pack_bits, unpack_bits
from mopcompress.formats.weight_format import (
    WEIGHT,
    EncodedTensor,
    OpenFile,
    WeightFormat,
    check_linears,
    dtype_name,
    on_grid,
    plain,
    quantized,
)
from mopcompress.models.meta_model import MetaModel
from mopcompress.models.quantization_grid import QuantizationGrid

GROUPS = (128, 64, 32)
BITS = (2, 3, 4, 8)
WORD = 32
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def fit(grid: QuantizationGrid, skeleton: MetaModel) -> QuantizationGrid:
    """The same grid in groups that loaders take."""
    check_linears(grid, skeleton, "gptq")
    if grid.bits not in BITS:
        raise DataError(f"--format gptq holds 2, 3, 4 or 8 bits, not {grid.bits}; choose --format compressed-tensors")
    linears = {name: skeleton.linears[name] for name in grid.scales}
    for name, linear in linears.items():
        if linear.out_features * grid.bits % WORD:
            raise DataError(
                f"--format gptq: {linear.out_features} outputs of {name} in {grid.bits} bits do not fill whole words; "
                "choose --format compressed-tensors"
            )
    shared = grid.group_size or math.gcd(*(linear.in_features for linear in linears.values()))
    size = next((size for size in GROUPS if shared % size == 0), None)
    if size is None:
        raise DataError(
            f"--format gptq holds groups of 32, 64 or 128 inputs, and none of these divides {shared}; quantize with "
            "another group_size, or choose --format compressed-tensors"
        )
    scales = {
        name: scale.repeat_interleave(linears[name].in_features // size // scale.shape[1], dim=1)
        for name, scale in grid.scales.items()
    }
    return replace(grid, group_size=size, scales=scales)


def settings(grid: QuantizationGrid, skeleton: MetaModel) -> dict[str, Any]:
    """Our keys of config.json; linears of the blocks that are not quantised are named to each loader in its way."""
    in_blocks = [name for name in skeleton.linears if name.startswith(f"{skeleton.blocks}.")]
    left_out = [name for name in in_blocks if name not in grid.scales]
    subset = {
        "modules_in_block_to_quantize": [sorted(grid.scales)],  # transformers with optimum: suffixes of names
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in left_out},  # GPTQModel and vLLM: what not to touch
    }
    return {
        "quantization_config": {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "damp_percent": 0.01,
            "desc_act": False,
            "sym": True,
            "true_sequential": True,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": False,
            "meta": {"quantizer": [f"mopcompress:{__version__}"]},
            **(subset if left_out else {}),
        }
    }


def encode(name: str, tensor: Tensor, grid: QuantizationGrid | None) -> EncodedTensor:
    """A quantised weight as four tensors; any other tensor as it is."""
    module = on_grid(name, grid)
    if grid is None or module is None:
        return plain(name, tensor)
    scales = grid.scales[module]
    columns, groups = tensor.shape[1], scales.shape[1]
    zero = 2 ** (grid.bits - 1)
    unsigned = grid.codes(module, tensor).short() + zero
    zeros = torch.full((groups, len(tensor)), zero - 1, dtype=torch.uint8)
    stored = {
        "qweight": pack_bits(unsigned, grid.bits).T.contiguous(),
        "qzeros": pack_bits(zeros, grid.bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }
    return EncodedTensor({f"{module}.{part}": one for part, one in stored.items()}, {name: dtype_name(tensor)})


def decode(file: OpenFile, bits: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the dense folder, by the formula above."""
    names = set(file.keys())
    for name, dtype in quantized(file).items():
        stored = [f"{name.removesuffix(WEIGHT)}.{part}" for part in PARTS]
        names -= set(stored)
        weight, zeros, scales, group = (file.get_tensor(part) for part in stored)
        codes = unpack_bits(weight.T.contiguous(), bits, len(group)).short()
        zeros = unpack_bits(zeros, bits, scales.shape[1]).short() + 1
        group = group.long()
        yield name, ((codes - zeros[group].T) * scales.float()[group].T).to(dtype).contiguous()
    for name in sorted(names):
        yield name, file.get_tensor(name)


def scales_of(file: OpenFile) -> dict[str, Tensor]:
    """Scales [out, groups] of the quantised linears."""
    modules = [name.removesuffix(WEIGHT) for name in quantized(file)]
    return {module: file.get_tensor(f"{module}.scales").T.contiguous() for module in modules}


FORMAT = WeightFormat(
    prefix="", needs_grid=True, fit=fit, settings=settings, encode=encode, decode=decode, scales=scales_of
)
