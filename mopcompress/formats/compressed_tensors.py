"""The symmetric `pack-quantized` format of compressed-tensors: llm-compressor writes it, vLLM and transformers read it.

A linear `P` of [out, in] in b bits is stored, with signed codes, as:

    P.weight_packed  int32 [out, ceil(in*b/32)]  code + 2^(b-1), packed along the inputs
    P.weight_scale   fp16  [out, groups]         one group is the strategy `channel`
    P.weight_shape   int64 [2]                   out, in
    weight = code * scale

Its asymmetric variant does not load in stock transformers, so it is not supported here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mopcompress import __version__
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

PARTS = ("weight_packed", "weight_scale", "weight_shape")


def fit(grid: QuantizationGrid, meta_model: MetaModel) -> QuantizationGrid:
    """Return the grid itself: any grid of `nn.Linear` can be held. Raises `DataError` for other modules."""
    check_linears(grid, meta_model, "compressed-tensors")
    return grid


def settings(grid: QuantizationGrid, meta_model: MetaModel) -> dict[str, Any]:
    """Return our keys of config.json; every linear that is not quantised is on the ignore list."""
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= (
        {"strategy": "channel"} if grid.group_size is None else {"strategy": "group", "group_size": grid.group_size}
    )
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [name for name in meta_model.linears if name not in grid.scales],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "producer": f"mopcompress {__version__}",
        }
    }


def encode(name: str, tensor: Tensor, grid: QuantizationGrid | None) -> EncodedTensor:
    """Store a quantised weight as three tensors, and any other tensor as it is."""
    module = linear_on_grid(name, grid)
    if grid is None or module is None:
        return store_unchanged(name, tensor)
    unsigned = grid.codes(module, tensor).short() + 2 ** (grid.bits - 1)
    parts = (pack_bits(unsigned, grid.bits), grid.scales[module].contiguous(), torch.tensor(tensor.shape))
    tensors = {f"{module}.{suffix}": part for suffix, part in zip(PARTS, parts, strict=True)}
    return EncodedTensor(tensors, {name: dtype_name(tensor)})


def decode(file: OpenFile, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of the dense folder, by the formula above."""
    names = set(file.keys())
    for name, dtype in quantized_dtypes(file).items():
        part_names = [f"{name.removesuffix(WEIGHT)}.{suffix}" for suffix in PARTS]
        names -= set(part_names)
        packed, scales, shape = (file.get_tensor(part) for part in part_names)
        _rows, columns = shape.tolist()
        codes = unpack_bits(packed, bits, columns).short() - 2 ** (bits - 1)
        spread = scales.float().repeat_interleave(columns // scales.shape[1], dim=1)
        yield name, (codes * spread).to(dtype)
    for name in sorted(names):
        yield name, file.get_tensor(name)


def read_scales(file: OpenFile) -> dict[str, Tensor]:
    """Read the scales [out, groups] of the quantised linears."""
    modules = [name.removesuffix(WEIGHT) for name in quantized_dtypes(file)]
    return {module: file.get_tensor(f"{module}.weight_scale") for module in modules}


FORMAT = WeightFormat(
    prefix="", needs_grid=True, fit=fit, settings=settings, encode=encode, decode=decode, scales=read_scales
)
