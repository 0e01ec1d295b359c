"""The file `grid.safetensors`: the scales of the quantised linears, next to their dense weights.

It holds `<dotted name>.scales`, fp16 [out, groups], for each quantised linear; bits and group size are in the header.
With them `extract_codes` returns the integers exactly, so that an export needs no second rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mopcompress.errors import DataError

FILE = "grid.safetensors"
_SUFFIX, _WHOLE_ROW = ".scales", "-1"


@dataclass(frozen=True, kw_only=True)
class QuantizationGrid:
    """A symmetric grid: a weight of a linear in `scales` is an integer of `bits` bits times the scale of its group."""

    bits: int
    group_size: int | None  # consecutive inputs that share a scale; None: the whole row
    scales: Mapping[str, Tensor]  # fp16 [out, groups], by the linear's dotted name
    transposed: frozenset[str] = frozenset()  # linears whose weight is [in, out], as GPT-2's Conv1D stores it

    def codes(self, name: str, weight: Float[Tensor, "rows columns"]) -> Int[Tensor, "out in"]:
        """Return the integers of a linear's stored weight. Raises `DataError` when the weight is not on the grid."""
        try:
            return extract_codes(weight.T if name in self.transposed else weight, self.scales[name], bits=self.bits)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error


def write_grid(path: Path, scales: Mapping[str, Tensor], *, bits: int, group_size: int | None) -> None:
    """Write the file; the scales [out, groups] must be numbers that fp16 can hold."""
    tensors = {f"{name}{_SUFFIX}": scale.half().cpu().contiguous() for name, scale in scales.items()}
    size = _WHOLE_ROW if group_size is None else str(group_size)
    save_file(tensors, path, {"format": "pt", "bits": str(bits), "group_size": size})


def read_grid(folder: Path) -> QuantizationGrid | None:
    """Read the grid of a compressed folder; None when it has none. Raises `DataError` when the file is damaged."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            bits, size = int(metadata["bits"]), int(metadata["group_size"])
            scales = {name.removesuffix(_SUFFIX): file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); make the folder again") from error
    for name, scale in scales.items():
        if scale.dtype != torch.float16 or scale.ndim != 2 or not bool((scale > 0).all() and scale.isfinite().all()):
            raise DataError(f"{path}: {name}{_SUFFIX} is no matrix of positive fp16 numbers; make the folder again")
    return QuantizationGrid(bits=bits, group_size=None if size == -1 else size, scales=scales)


def extract_codes(
    weight: Float[Tensor, "out in"], scales: Float[Tensor, "rows groups"], *, bits: int
) -> Int[Tensor, "out in"]:
    """Return the integers of a weight on a grid, as int8; fp16, bf16 and fp32 weights all represent them exactly.

    Raises `DataError` when no codes of `bits` bits give the weight with these scales.
    """
    rows, columns = weight.shape
    if len(scales) != rows or columns % scales.shape[1]:
        raise DataError(f"scales of shape {tuple(scales.shape)} do not fit a weight of {rows} x {columns}")
    spread = scales.float().repeat_interleave(columns // scales.shape[1], dim=1)
    codes = (weight.float() / spread).round()
    limit = 2 ** (bits - 1)
    if not (
        torch.equal((codes * spread).to(weight), weight) and bool((-limit <= codes).logical_and(codes < limit).all())
    ):
        raise DataError(f"a weight does not lie on its grid of {bits} bits: it was changed after it was quantised")
    return codes.to(torch.int8)
