"""Our sparse container: per matrix, the positions and the values of its survivors (weights that are not zero).

A file is safetensors. A matrix `N` that becomes smaller is not stored under its own name but as

    N.bitmask  uint8 [rows, ceil(columns/8)]  one bit per position               | or
    N.gaps     int32 [words]                  gaps, in 3 to 8 bits               | or neither: all positions
    N.values   the survivors, in row order, in the dtype of the matrix           | or
    N.codes    int32 [words]                  the survivors as integers of the grid's bits, + 2^(bits-1)
    N.scales   fp16  [out, groups]            the grid's scales

whichever is smallest, with the rest as JSON in the header's entry `N`. `packing` defines bits and gaps. Every other
tensor is stored unchanged. Nothing is ever rounded: only weights that lie on a grid already are stored as codes.
(Experts whose names in the files differ from those in the network, such as Mixtral's, are stored as values, because
their grid is not found.)
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mopcompress.formats.packing import (
    decode_gaps,
    encode_gaps,
    narrowest_gaps,
    pack_bits,
    pack_mask,
    unpack_bits,
    unpack_mask,
)
from mopcompress.formats.weight_format import (
    WEIGHT,
    EncodedTensor,
    OpenFile,
    WeightFormat,
    dtype_name,
    linear_on_grid,
    store_unchanged,
)
from mopcompress.models.meta_model import MetaModel
from mopcompress.models.quantization_grid import QuantizationGrid
from mopcompress.models.weight_files import SPARSE

PARTS = ("bitmask", "gaps", "values", "codes", "scales")


def fit(grid: QuantizationGrid, meta_model: MetaModel) -> QuantizationGrid:
    """Return the same grid with the names of transposed linears (GPT-2's Conv1D), whose columns share scales."""
    return replace(grid, transposed=meta_model.transposed.intersection(grid.scales))


def encode(name: str, tensor: Tensor, grid: QuantizationGrid | None) -> EncodedTensor:
    """Store a tensor in the smallest of the ways."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return store_unchanged(name, tensor)
    module = linear_on_grid(name, grid)
    if grid is not None and module is not None:
        codes = grid.codes(module, tensor)
        positions, entry = _encode_positions(codes != 0, grid.bits)
        survivors = codes[codes != 0] if positions else codes.flatten()
        values = {
            "codes": pack_bits(survivors[None].short() + 2 ** (grid.bits - 1), grid.bits)[0],
            "scales": grid.scales[module].contiguous(),
        }
        entry["transposed"] = module in grid.transposed
    else:
        matrix = tensor.reshape(-1, tensor.shape[-1])
        mask = _is_survivor(matrix)
        positions, entry = _encode_positions(mask, 8 * tensor.dtype.itemsize)
        if not positions:
            return store_unchanged(name, tensor)
        values = {"values": matrix[mask]}
    entry |= {"shape": list(tensor.shape), "dtype": dtype_name(tensor)}
    tensors = {f"{name}.{suffix}": part for suffix, part in (positions | values).items()}
    return EncodedTensor(tensors, {name: json.dumps(entry)})


def _encode_positions(mask: Bool[Tensor, "rows columns"], value_bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Store the positions of the survivors in the fewest bits; returns the tensor, if any, and entries for the header.

    When storing the zeros costs fewer bits than their positions, there is no tensor and all positions have values.
    """
    packed = pack_mask(mask)
    gap_bits, gaps_size = narrowest_gaps(mask.flatten())
    zeros = mask.numel() - int(mask.sum())
    sizes = {"all": value_bits * zeros, "bitmask": 8 * packed.numel(), "gaps": gaps_size}
    smallest = min(sizes, key=lambda way: sizes[way])
    if smallest == "gaps":
        steps = encode_gaps(mask.flatten(), gap_bits)
        entry = {"places": smallest, "gap_bits": gap_bits, "steps": len(steps)}
        return {"gaps": pack_bits(steps[None], gap_bits)[0]}, entry
    return {"bitmask": packed} if smallest == "bitmask" else {}, {"places": smallest}


def decode(file: OpenFile, bits: int) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of the dense folder."""
    header = file.metadata() or {}
    remaining = set(file.keys())
    for name in sorted(header):
        parts = {part: file.get_tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in remaining}
        if parts:
            remaining -= {f"{name}.{part}" for part in parts}
            yield name, _decode_matrix(json.loads(header[name]), parts, bits)
    for name in sorted(remaining):
        yield name, file.get_tensor(name)


def _decode_matrix(entry: dict[str, Any], parts: dict[str, Tensor], bits: int) -> Tensor:
    *outer, columns = entry["shape"]
    rows = math.prod(outer)
    shape = (columns, rows) if entry.get("transposed") else (rows, columns)
    mask = _decode_positions(entry, parts, shape)
    dtype = getattr(torch, entry["dtype"])
    if "values" in parts:
        matrix = torch.zeros(shape, dtype=dtype)
        matrix[mask] = parts["values"]
        return matrix.view(entry["shape"])
    codes = torch.zeros(shape)
    unsigned = unpack_bits(parts["codes"][None], bits, int(mask.sum()))[0]
    codes[mask] = unsigned.float() - 2 ** (bits - 1)
    spread = parts["scales"].float().repeat_interleave(shape[1] // parts["scales"].shape[1], dim=1)
    matrix = (codes * spread).to(dtype)
    return (matrix.T if entry["transposed"] else matrix).contiguous()


def _decode_positions(
    entry: dict[str, Any], parts: dict[str, Tensor], shape: tuple[int, int]
) -> Bool[Tensor, "rows columns"]:
    if entry["places"] == "all":
        return torch.ones(shape, dtype=torch.bool)
    if entry["places"] == "bitmask":
        return unpack_mask(parts["bitmask"], shape[1])
    steps = unpack_bits(parts["gaps"][None], entry["gap_bits"], entry["steps"])[0]
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[decode_gaps(steps, entry["gap_bits"])] = True
    return mask.view(shape)


def read_scales(file: OpenFile) -> dict[str, Tensor]:
    """Read the scales [out, groups] of the linears that are on a grid."""
    suffix = f"{WEIGHT}.scales"
    return {name.removesuffix(suffix): file.get_tensor(name) for name in file.keys() if name.endswith(suffix)}  # noqa: SIM118


def _is_survivor(matrix: Tensor) -> Bool[Tensor, "rows columns"]:
    """Mark numbers other than +0.0: minus zero survives, so that every bit comes back."""
    raw = matrix.contiguous().view(torch.uint8)
    return raw.view(*matrix.shape, matrix.dtype.itemsize).bool().any(-1)


FORMAT = WeightFormat(
    prefix=SPARSE,
    needs_grid=False,
    fit=fit,
    settings=lambda _grid, _meta_model: {},
    encode=encode,
    decode=decode,
    scales=read_scales,
)
