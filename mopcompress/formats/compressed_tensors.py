"""compressed-tensors' `pack-quantized`, symmetric: what llm-compressor writes and vLLM and transformers read.

A linear `P` of [out, in] in b bits is, with signed codes:

    P.weight_packed  int32 [out, ceil(in*b/32)]  code + 2^(b-1), packed along the inputs
    P.weight_scale   fp16  [out, groups]         one group is the strategy `channel`
    P.weight_shape   int64 [2]                   out, in
    weight = code * scale

Its asymmetric variant does not load in stock transformers, so there is none here.
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
    on_grid,
    plain,
    quantized,
)
from mopcompress.models.meta_model import MetaModel
from mopcompress.models.quantization_grid import QuantizationGrid

PARTS = ("weight_packed", "weight_scale", "weight_shape")


def fit(grid: QuantizationGrid, skeleton: MetaModel) -> QuantizationGrid:
    """Any grid of linears can be held."""
    check_linears(grid, skeleton, "compressed-tensors")
    return grid


def settings(grid: QuantizationGrid, skeleton: MetaModel) -> dict[str, Any]:
    """Our keys of config.json; every linear that is not quantised, whatever the reason, is on the ignore list."""
    weights = {"num_bits": grid.bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= (
        {"strategy": "channel"} if grid.group_size is None else {"strategy": "group", "group_size": grid.group_size}
    )
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [name for name in skeleton.linears if name not in grid.scales],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "producer": f"mopcompress {__version__}",
        }
    }


def encode(name: str, tensor: Tensor, grid: QuantizationGrid | None) -> EncodedTensor:
    """A quantised weight as three tensors; any other tensor as it is."""
    module = on_grid(name, grid)
    if grid is None or module is None:
        return plain(name, tensor)
    unsigned = grid.codes(module, tensor).short() + 2 ** (grid.bits - 1)
    stored = (pack_bits(unsigned, grid.bits), grid.scales[module].contiguous(), torch.tensor(tensor.shape))
    tensors = {f"{module}.{part}": one for part, one in zip(PARTS, stored, strict=True)}
    return EncodedTensor(tensors, {name: dtype_name(tensor)})


def decode(file: OpenFile, bits: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the dense folder, by the formula above."""
    names = set(file.keys())
    for name, dtype in quantized(file).items():
        stored = [f"{name.removesuffix(WEIGHT)}.{part}" for part in PARTS]
        names -= set(stored)
        packed, scales, shape = (file.get_tensor(part) for part in stored)
        _rows, columns = shape.tolist()
        codes = unpack_bits(packed, bits, columns).short() - 2 ** (bits - 1)
        spread = scales.float().repeat_interleave(columns // scales.shape[1], dim=1)
        yield name, (codes * spread).to(dtype)
    for name in sorted(names):
        yield name, file.get_tensor(name)


def scales_of(file: OpenFile) -> dict[str, Tensor]:
    """Scales [out, groups] of the quantised linears."""
    modules = [name.removesuffix(WEIGHT) for name in quantized(file)]
    return {module: file.get_tensor(f"{module}.weight_scale") for module in modules}


FORMAT = WeightFormat(
    prefix="", needs_grid=True, fit=fit, settings=settings, encode=encode, decode=decode, scales=scales_of
)
