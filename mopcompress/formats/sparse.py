"""Our sparse container: for each matrix where its survivors are, and the survivors.

A file is safetensors. A matrix `N` that is smaller so is not there by its own name but as

    N.bitmask  uint8 [rows, ceil(columns/8)]  a bit a place                      | or
    N.gaps     int32 [words]                  distances, in 3 to 8 bits          | or neither: all places
    N.values   the survivors, in row order, in the dtype they had                | or
    N.codes    int32 [words]                  the same as integers of the grid's bits, + 2^(bits-1)
    N.scales   fp16  [out, groups]            the grid's scales

whichever is smallest, and the header's entry `N` says the rest as JSON. `packing` defines bits and gaps. Every other
tensor is there as it was. Nothing is ever rounded: codes are only for weights that lie on a grid already. (Experts that
the files call otherwise than the network, as Mixtral's, are stored as values: their grid is not found.)
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
    gaps_of,
    narrowest_gaps,
    pack_bits,
    pack_mask,
    places_of,
    unpack_bits,
    unpack_mask,
)
from mopcompress.formats.weight_format import WEIGHT, EncodedTensor, OpenFile, WeightFormat, dtype_name, on_grid, plain
from mopcompress.models.meta_model import MetaModel
from mopcompress.models.quantization_grid import QuantizationGrid
from mopcompress.models.weight_files import SPARSE

PARTS = ("bitmask", "gaps", "values", "codes", "scales")


def fit(grid: QuantizationGrid, skeleton: MetaModel) -> QuantizationGrid:
    """Any grid can be held; GPT-2's Conv1D is noted, whose scales go with its columns."""
    return replace(grid, transposed=skeleton.transposed.intersection(grid.scales))


def encode(name: str, tensor: Tensor, grid: QuantizationGrid | None) -> EncodedTensor:
    """The smallest of the ways to store a tensor."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return plain(name, tensor)
    module = on_grid(name, grid)
    if grid is not None and module is not None:
        codes = grid.codes(module, tensor)
        places, facts = _places(codes != 0, grid.bits)
        kept = codes[codes != 0] if places else codes.flatten()
        values = {
            "codes": pack_bits(kept[None].short() + 2 ** (grid.bits - 1), grid.bits)[0],
            "scales": grid.scales[module].contiguous(),
        }
        facts["transposed"] = module in grid.transposed
    else:
        matrix = tensor.reshape(-1, tensor.shape[-1])
        survives = _has_a_bit(matrix)
        places, facts = _places(survives, 8 * tensor.dtype.itemsize)
        if not places:
            return plain(name, tensor)
        values = {"values": matrix[survives]}
    facts |= {"shape": list(tensor.shape), "dtype": dtype_name(tensor)}
    parts = {f"{name}.{part}": one for part, one in (places | values).items()}
    return EncodedTensor(parts, {name: json.dumps(facts)})


def _places(survives: Bool[Tensor, "rows columns"], value_bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Where the survivors are, in the fewest bits, and what to know of it; all places when the zeros cost fewer."""
    packed = pack_mask(survives)
    gap_bits, gaps_size = narrowest_gaps(survives.flatten())
    zeros = survives.numel() - int(survives.sum())
    sizes = {"all": value_bits * zeros, "bitmask": 8 * packed.numel(), "gaps": gaps_size}
    way = min(sizes, key=lambda way: sizes[way])
    if way == "gaps":
        steps = gaps_of(survives.flatten(), gap_bits)
        facts = {"places": way, "gap_bits": gap_bits, "steps": len(steps)}
        return {"gaps": pack_bits(steps[None], gap_bits)[0]}, facts
    return {"bitmask": packed} if way == "bitmask" else {}, {"places": way}


def decode(file: OpenFile, bits: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the dense folder."""
    header = file.metadata() or {}
    left = set(file.keys())
    for name in sorted(header):
        parts = {part: file.get_tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in left}
        if parts:
            left -= {f"{name}.{part}" for part in parts}
            yield name, _decoded(json.loads(header[name]), parts, bits)
    for name in sorted(left):
        yield name, file.get_tensor(name)


def _decoded(facts: dict[str, Any], parts: dict[str, Tensor], bits: int) -> Tensor:
    *outer, columns = facts["shape"]
    rows = math.prod(outer)
    shape = (columns, rows) if facts.get("transposed") else (rows, columns)
    survives = _survivors(facts, parts, shape)
    dtype = getattr(torch, facts["dtype"])
    if "values" in parts:
        matrix = torch.zeros(shape, dtype=dtype)
        matrix[survives] = parts["values"]
        return matrix.view(facts["shape"])
    codes = torch.zeros(shape)
    unsigned = unpack_bits(parts["codes"][None], bits, int(survives.sum()))[0]
    codes[survives] = unsigned.float() - 2 ** (bits - 1)
    spread = parts["scales"].float().repeat_interleave(shape[1] // parts["scales"].shape[1], dim=1)
    matrix = (codes * spread).to(dtype)
    return (matrix.T if facts["transposed"] else matrix).contiguous()


def _survivors(facts: dict[str, Any], parts: dict[str, Tensor], shape: tuple[int, int]) -> Bool[Tensor, "rows columns"]:
    if facts["places"] == "all":
        return torch.ones(shape, dtype=torch.bool)
    if facts["places"] == "bitmask":
        return unpack_mask(parts["bitmask"], shape[1])
    steps = unpack_bits(parts["gaps"][None], facts["gap_bits"], facts["steps"])[0]
    survives = torch.zeros(math.prod(shape), dtype=torch.bool)
    survives[places_of(steps, facts["gap_bits"])] = True
    return survives.view(shape)


def scales_of(file: OpenFile) -> dict[str, Tensor]:
    """Scales [out, groups] of the linears that are on a grid."""
    suffix = f"{WEIGHT}.scales"
    return {name.removesuffix(suffix): file.get_tensor(name) for name in file.keys() if name.endswith(suffix)}  # noqa: SIM118


def _has_a_bit(matrix: Tensor) -> Bool[Tensor, "rows columns"]:
    """Where a number is not +0.0: minus zero survives, so that every bit comes back."""
    raw = matrix.contiguous().view(torch.uint8)
    return raw.view(*matrix.shape, matrix.dtype.itemsize).bool().any(-1)


FORMAT = WeightFormat(
    prefix=SPARSE,
    needs_grid=False,
    fit=fit,
    settings=lambda _grid, _skeleton: {},
    encode=encode,
    decode=decode,
    scales=scales_of,
)
