"""A model folder in any of our formats, tensor by tensor as it would be in a dense folder.

Each weight file says in its header how it is laid out, so that nothing else is needed to read it.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.formats import LAYOUTS
from mopcompress.formats.weight_format import OpenFile, dtype_name
from mopcompress.models.quantization_grid import QuantizationGrid, read_grid
from mopcompress.models.weight_files import SPARSE, weight_files

FORMAT, BITS, GROUP_SIZE = "mopcompress", "bits", "group_size"  # entries of a file's header
_WHOLE_ROW = "-1"


@dataclass(frozen=True, kw_only=True)
class ModelReader:
    """The weights of a folder; `grid` is that of the quantised ones, wherever its scales are kept."""

    format: str
    files: tuple[Path, ...]
    grid: QuantizationGrid | None

    @property
    def bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    def dense_name(self, path: Path) -> str:
        """What a weight file is called in a dense folder."""
        return path.name.removeprefix(LAYOUTS[self.format].prefix)

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """The dense tensors of one file, by name. Raises `DataError` when it is damaged."""
        with opened(path) as file:
            yield from LAYOUTS[self.format].decode(file, self.grid.bits if self.grid else 0)


def open_model(folder: Path) -> ModelReader:
    """See how a folder's weights are stored. Raises `DataError` for a damaged one, `InputNotFoundError` for none."""
    files = tuple(sorted(folder.glob(f"{SPARSE}*.safetensors")) or weight_files(folder))
    if not files:
        raise InputNotFoundError(f"model {folder}: no weight files there; name a Hugging Face folder, or an export")
    headers = [header_of(path) for path in files]
    formats = {header.get(FORMAT, "dense") for header in headers}
    if len(formats) > 1 or formats - LAYOUTS.keys():
        raise DataError(f"model {folder}: its files are in the formats {', '.join(sorted(formats))}; export it again")
    (format,) = formats
    if format == "dense":
        return ModelReader(format=format, files=files, grid=read_grid(folder))
    return ModelReader(format=format, files=files, grid=_grid(format, files, headers[0]))


def _grid(format: str, files: tuple[Path, ...], header: dict[str, str]) -> QuantizationGrid | None:
    if BITS not in header:
        return None
    scales: dict[str, Tensor] = {}
    for path in files:
        with opened(path) as file:
            scales |= LAYOUTS[format].scales(file)
    size = header[GROUP_SIZE]
    return QuantizationGrid(bits=int(header[BITS]), group_size=None if size == _WHOLE_ROW else int(size), scales=scales)


@dataclass
class ByteCounts:
    """Bytes of the tensors that a format stores otherwise than a dense folder does, there and here."""

    dense: int = 0
    stored: int = 0

    def facts(self) -> dict[str, int]:
        """For a manifest."""
        return {"matrices_dense_bytes": self.dense, "matrices_bytes": self.stored}


def write_file(
    path: Path, tensors: Iterable[tuple[str, Tensor]], format: str, grid: QuantizationGrid | None, sizes: ByteCounts
) -> list[str]:
    """Write one weight file from dense tensors and add to `sizes`; returns the names of what is stored.

    Memory: one dense tensor, and all of the file as it is stored.
    """
    stored: dict[str, Tensor] = {}
    header = _header(format, grid)
    for name, tensor in tensors:
        encoded = LAYOUTS[format].encode(name, tensor, grid)
        stored |= encoded.tensors
        header |= encoded.header
        if encoded.header:
            sizes.dense += tensor.nbytes
            sizes.stored += sum(one.nbytes for one in encoded.tensors.values())
    save_file(stored, path, header)
    return sorted(stored)


def _header(format: str, grid: QuantizationGrid | None) -> dict[str, str]:
    """What a weight file says of all its tensors. A dense one has nothing of ours."""
    header = {"format": "pt"}
    if format == "dense":
        return header
    if grid is not None:
        size = _WHOLE_ROW if grid.group_size is None else str(grid.group_size)
        header |= {BITS: str(grid.bits), GROUP_SIZE: size}
    return header | {FORMAT: format}


def tensor_hashes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A hash of each tensor: its dtype, shape and numbers. The sign of a zero is no part of them."""
    return {name: tensor_hash(tensor) for name, tensor in tensors}


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256, hexadecimal."""
    numbers = tensor + 0 if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor
    about = f"{dtype_name(tensor)} {list(tensor.shape)} ".encode()
    return hashlib.sha256(about + numbers.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def header_of(path: Path) -> dict[str, str]:
    """The header of a file. Raises `DataError` when it is damaged."""
    with opened(path) as file:
        return file.metadata() or {}


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """A safetensors file; whatever is wrong with what it holds is a `DataError` that names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{path} is damaged ({reason}); make the folder again") from error
