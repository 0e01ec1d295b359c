"""Version 1 of the GPTQ checkpoint format, symmetric: AutoGPTQ introduced it, and all its successors read it.

A linear `P` of [out, in] in groups of G inputs and b bits is stored, with unsigned codes and zero z = 2^(b-1), as:

    P.qweight  int32 [in*b/32, out]    codes, packed along the inputs
    P.qzeros   int32 [in/G, out*b/32]  z - 1, packed along the outputs (version 1 stores one less)
    P.scales   fp16  [in/G, out]
    P.g_idx    int32 [in]              the group of each input
    weight = (code - z) * scale, transposed

Loaders on CPUs accept groups of 32, 64 or 128 inputs. A grid whose group size is a multiple of one of these is written
in the largest such groups: a scale is then repeated for the groups that share it.
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
    linear_on_grid,
    quantized_dtypes,
    store_unchanged,
)
from mopcompress.models.meta_model import MetaModel
from mopcompress.models.quantization_grid import QuantizationGrid

GROUPS = (128, 64, 32)
BITS = (2, 3, 4, 8)
WORD = 32
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def fit(grid: QuantizationGrid, meta_model: MetaModel) -> QuantizationGrid:
    """Return the same grid in groups that loaders accept. Raises `DataError` when there are none."""
    check_linears(grid, meta_model, "gptq")
    if grid.bits not in BITS:
        raise DataError(f"--format gptq holds 2, 3, 4 or 8 bits, not {grid.bits}; choose --format compressed-tensors")
    linears = {name: meta_model.linears[name] for name in grid.scales}
    for name, linear in linears.items():
        if linear.out_features * grid.bits % WORD:
            raise DataError(
                f"--format gptq: {linear.out_features} outputs of {name} in {grid.bits} bits do not fill whole words; "
                "choose --format compressed-tensors"
            )
    shared_size = grid.group_size or math.gcd(*(linear.in_features for linear in linears.values()))
    size = next((size for size in GROUPS if shared_size % size == 0), None)
    if size is None:
        raise DataError(
            f"--format gptq holds groups of 32, 64 or 128 inputs, and none of these divides {shared_size}; quantize "
            "with another group_size, or choose --format compressed-tensors"
        )
    scales = {
        name: scale.repeat_interleave(linears[name].in_features // size // scale.shape[1], dim=1)
        for name, scale in grid.scales.items()
    }
    return replace(grid, group_size=size, scales=scales)


def settings(grid: QuantizationGrid, meta_model: MetaModel) -> dict[str, Any]:
    """Return our keys of config.json, which list unquantised linears of the blocks in each loader's own form."""
    in_blocks = [name for name in meta_model.linears if name.startswith(f"{meta_model.blocks}.")]
    unquantized = [name for name in in_blocks if name not in grid.scales]
    subset = {
        "modules_in_block_to_quantize": [sorted(grid.scales)],  # transformers with optimum: suffixes of names
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in unquantized},  # GPTQModel and vLLM: linears to exclude
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
            **(subset if unquantized else {}),
        }
    }


def encode(name: str, tensor: Tensor, grid: QuantizationGrid | None) -> EncodedTensor:
    """Store a quantised weight as four tensors, and any other tensor as it is."""
    module = linear_on_grid(name, grid)
    if grid is None or module is None:
        return store_unchanged(name, tensor)
    scales = grid.scales[module]
    columns, groups = tensor.shape[1], scales.shape[1]
    zero = 2 ** (grid.bits - 1)
    unsigned = grid.codes(module, tensor).short() + zero
    zeros = torch.full((groups, len(tensor)), zero - 1, dtype=torch.uint8)
    parts = {
        "qweight": pack_bits(unsigned, grid.bits).T.contiguous(),
        "qzeros": pack_bits(zeros, grid.bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
    }
    return EncodedTensor({f"{module}.{suffix}": part for suffix, part in parts.items()}, {name: dtype_name(tensor)})


def decode(file: OpenFile, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of the dense folder, by the formula above."""
    names = set(file.keys())
    for name, dtype in quantized_dtypes(file).items():
        part_names = [f"{name.removesuffix(WEIGHT)}.{suffix}" for suffix in PARTS]
        names -= set(part_names)
        weight, zeros, scales, group = (file.get_tensor(part) for part in part_names)
        codes = unpack_bits(weight.T.contiguous(), bits, len(group)).short()
        zeros = unpack_bits(zeros, bits, scales.shape[1]).short() + 1
        group = group.long()
        yield name, ((codes - zeros[group].T) * scales.float()[group].T).to(dtype).contiguous()
    for name in sorted(names):
        yield name, file.get_tensor(name)


def read_scales(file: OpenFile) -> dict[str, Tensor]:
    """Read the scales [out, groups] of the quantised linears."""
    modules = [name.removesuffix(WEIGHT) for name in quantized_dtypes(file)]
    return {module: file.get_tensor(f"{module}.scales").T.contiguous() for module in modules}


FORMAT = WeightFormat(
    prefix="", needs_grid=True, fit=fit, settings=settings, encode=encode, decode=decode, scales=read_scales
)
