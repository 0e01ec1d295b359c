"""What every format says of itself, and the dense one, which has nothing to say."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mopcompress.errors import DataError
from mopcompress.models.meta_model import MetaModel
from mopcompress.models.quantization_grid import QuantizationGrid

WEIGHT = ".weight"


@runtime_checkable
class OpenFile(Protocol):
    """A safetensors file that is open."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def metadata(self) -> dict[str, str] | None: ...


@dataclass(frozen=True)
class EncodedTensor:
    """One weight as its format stores it: tensors, and entries of the file's header."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """One format.

    `fit` gives the grid as the format can hold it, which is the same numbers, or raises `DataError` saying what cannot
    be held. `settings` are our keys of `config.json`. `encode` takes a tensor by its name in a dense folder; `decode`
    gives a file's tensors as they are in a dense folder (taking the grid's bits, 0 without a grid), and `scales` the
    scales [out, groups] of its linears that are on a grid.
    """

    prefix: str  # what stands before the name of a dense weight file
    needs_grid: bool
    fit: Callable[[QuantizationGrid, MetaModel], QuantizationGrid]
    settings: Callable[[QuantizationGrid, MetaModel], dict[str, Any]]
    encode: Callable[[str, Tensor, QuantizationGrid | None], EncodedTensor]
    decode: Callable[[OpenFile, int], Iterator[tuple[str, Tensor]]]
    scales: Callable[[OpenFile], dict[str, Tensor]]


def plain(name: str, tensor: Tensor) -> EncodedTensor:
    """A tensor that stays as it is."""
    return EncodedTensor({name: tensor.contiguous()}, {})


def on_grid(name: str, grid: QuantizationGrid | None) -> str | None:
    """The linear whose weight the tensor `name` is, if it lies on the grid."""
    module = name.removesuffix(WEIGHT)
    return module if grid is not None and name != module and module in grid.scales else None


def quantized(file: OpenFile) -> dict[str, torch.dtype]:
    """The dense names and dtypes of a file's quantised weights, as `encode` notes them in the header."""
    header = sorted((file.metadata() or {}).items())
    return {name: getattr(torch, dtype) for name, dtype in header if name.endswith(WEIGHT)}


def dtype_name(tensor: Tensor) -> str:
    """`float16`, for example."""
    return str(tensor.dtype).removeprefix("torch.")


def check_linears(grid: QuantizationGrid, skeleton: MetaModel, format: str) -> None:
    """Raise `DataError` when something is on the grid that is no `nn.Linear`."""
    other = [name for name in grid.scales if name not in skeleton.linears]
    if other:
        raise DataError(f"--format {format} holds nn.Linear alone, and {other[0]} is none; choose --format sparse")


def _decode(file: OpenFile, _bits: int) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(file.keys()):
        yield name, file.get_tensor(name)


DENSE = WeightFormat(
    prefix="",
    needs_grid=False,
    fit=lambda grid, _skeleton: grid,
    settings=lambda _grid, _skeleton: {},
    encode=lambda name, tensor, _grid: plain(name, tensor),
    decode=_decode,
    scales=lambda _file: {},
)
