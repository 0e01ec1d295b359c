"""The functions that make up a format, and the dense format, which leaves every tensor as it is."""

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
    """An open safetensors file."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def metadata(self) -> dict[str, str] | None: ...


@dataclass(frozen=True)
class EncodedTensor:
    """A weight as its format stores it: tensors, and entries of the file's header."""

    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The functions of a format.

    `fit` returns the grid in a form that the format can hold, with the same numbers, or raises `DataError`. `settings`
    returns our keys of `config.json`. `encode` takes a tensor and its name in a dense folder. `decode` takes a file and
    the grid's bits (0 without a grid) and returns the tensors of the dense folder. `scales` returns the scales
    [out, groups] of a file's linears that are on a grid.
    """

    prefix: str  # put before the name of a dense weight file
    needs_grid: bool
    fit: Callable[[QuantizationGrid, MetaModel], QuantizationGrid]
    settings: Callable[[QuantizationGrid, MetaModel], dict[str, Any]]
    encode: Callable[[str, Tensor, QuantizationGrid | None], EncodedTensor]
    decode: Callable[[OpenFile, int], Iterator[tuple[str, Tensor]]]
    scales: Callable[[OpenFile], dict[str, Tensor]]


def store_unchanged(name: str, tensor: Tensor) -> EncodedTensor:
    """Store a tensor as it is."""
    return EncodedTensor({name: tensor.contiguous()}, {})


def linear_on_grid(name: str, grid: QuantizationGrid | None) -> str | None:
    """Return the name of the linear whose weight is called `name`; None when it is not on the grid."""
    module = name.removesuffix(WEIGHT)
    return module if grid is not None and name != module and module in grid.scales else None


def quantized_dtypes(file: OpenFile) -> dict[str, torch.dtype]:
    """Return the dense names and dtypes of a file's quantised weights, which `encode` puts into the header."""
    header = sorted((file.metadata() or {}).items())
    return {name: getattr(torch, dtype) for name, dtype in header if name.endswith(WEIGHT)}


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, for example `float16`."""
    return str(tensor.dtype).removeprefix("torch.")


def check_linears(grid: QuantizationGrid, meta_model: MetaModel, format: str) -> None:
    """Raise `DataError` when a module on the grid is no `nn.Linear`."""
    others = [name for name in grid.scales if name not in meta_model.linears]
    if others:
        raise DataError(
            f"--format {format} holds nn.Linear alone, and {others[0]} is another module; choose --format sparse"
        )


def _decode(file: OpenFile, _bits: int) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(file.keys()):
        yield name, file.get_tensor(name)


DENSE = WeightFormat(
    prefix="",
    needs_grid=False,
    fit=lambda grid, _meta_model: grid,
    settings=lambda _grid, _meta_model: {},
    encode=lambda name, tensor, _grid: store_unchanged(name, tensor),
    decode=_decode,
    scales=lambda _file: {},
)
