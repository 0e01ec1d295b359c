"""A model folder in any of our formats, read and written tensor by tensor as a dense folder.

The header of each weight file names the file's format, so that nothing else is needed to read it.
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
from mopcompress.formats import FORMATS
from mopcompress.formats.weight_format import OpenFile, dtype_name
from mopcompress.models.quantization_grid import QuantizationGrid, read_grid
from mopcompress.models.weight_files import SPARSE, weight_files

FORMAT, BITS, GROUP_SIZE = "mopcompress", "bits", "group_size"  # entries of a file's header
_WHOLE_ROW = "-1"


@dataclass(frozen=True, kw_only=True)
class ModelReader:
    """The weights of a folder, and the grid of the quantised ones, wherever its scales are stored."""

    format: str
    files: tuple[Path, ...]
    grid: QuantizationGrid | None

    @property
    def bytes(self) -> int:
        """The bytes of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    def dense_name(self, path: Path) -> str:
        """Return the name of a weight file in a dense folder."""
        return path.name.removeprefix(FORMATS[self.format].prefix)

    def tensors(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Return the names and dense tensors of a file. Raises `DataError` when it is damaged."""
        with open_safetensors(path) as file:
            yield from FORMATS[self.format].decode(file, self.grid.bits if self.grid else 0)


def open_model(folder: Path) -> ModelReader:
    """Find the format of a folder's weights.

    Raises `InputNotFoundError` for a folder without weights, and `DataError` when a file is damaged or files are in
    different formats.
    """
    files = tuple(sorted(folder.glob(f"{SPARSE}*.safetensors")) or weight_files(folder))
    if not files:
        raise InputNotFoundError(f"model {folder} has no weight files; name a Hugging Face folder, or an export")
    headers = [read_header(path) for path in files]
    formats = {header.get(FORMAT, "dense") for header in headers}
    if len(formats) > 1 or formats - FORMATS.keys():
        raise DataError(f"model {folder}: its files are in the formats {', '.join(sorted(formats))}; export it again")
    (format,) = formats
    if format == "dense":
        return ModelReader(format=format, files=files, grid=read_grid(folder))
    return ModelReader(format=format, files=files, grid=_read_scales(format, files, headers[0]))


def _read_scales(format: str, files: tuple[Path, ...], header: dict[str, str]) -> QuantizationGrid | None:
    if BITS not in header:
        return None
    scales: dict[str, Tensor] = {}
    for path in files:
        with open_safetensors(path) as file:
            scales |= FORMATS[format].scales(file)
    size = header[GROUP_SIZE]
    return QuantizationGrid(bits=int(header[BITS]), group_size=None if size == _WHOLE_ROW else int(size), scales=scales)


@dataclass
class ByteCounts:
    """Bytes of the tensors that a format encodes: in a dense folder, and as stored."""

    dense: int = 0
    stored: int = 0

    def facts(self) -> dict[str, int]:
        """Return the counts under their names in a manifest."""
        return {"matrices_dense_bytes": self.dense, "matrices_bytes": self.stored}


def write_file(
    path: Path, tensors: Iterable[tuple[str, Tensor]], format: str, grid: QuantizationGrid | None, sizes: ByteCounts
) -> list[str]:
    """Write a weight file from dense tensors, add to `sizes`, and return the sorted names of the stored tensors.

    Memory: a single dense tensor, and the whole file as it is stored.
    """
    stored: dict[str, Tensor] = {}
    header = _header(format, grid)
    for name, tensor in tensors:
        encoded = FORMATS[format].encode(name, tensor, grid)
        stored |= encoded.tensors
        header |= encoded.header
        if encoded.header:
            sizes.dense += tensor.nbytes
            sizes.stored += sum(part.nbytes for part in encoded.tensors.values())
    save_file(stored, path, header)
    return sorted(stored)


def _header(format: str, grid: QuantizationGrid | None) -> dict[str, str]:
    """Return the entries of a file's header about all its tensors; a dense file has none of ours."""
    header = {"format": "pt"}
    if format == "dense":
        return header
    if grid is not None:
        size = _WHOLE_ROW if grid.group_size is None else str(grid.group_size)
        header |= {BITS: str(grid.bits), GROUP_SIZE: size}
    return header | {FORMAT: format}


def tensor_hashes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return the `tensor_hash` of each tensor, by name."""
    return {name: tensor_hash(tensor) for name, tensor in tensors}


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and numbers, hexadecimal; the sign of a zero does not count."""
    numbers = tensor + 0 if tensor.is_floating_point() and tensor.dtype.itemsize > 1 else tensor
    prefix = f"{dtype_name(tensor)} {list(tensor.shape)} ".encode()
    return hashlib.sha256(prefix + numbers.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def read_header(path: Path) -> dict[str, str]:
    """Read the header of a file. Raises `DataError` when it is damaged."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


@contextmanager
def open_safetensors(path: Path) -> Iterator[OpenFile]:
    """Open a safetensors file; any error inside the `with` block becomes a `DataError` that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{path} is damaged ({reason}); make the folder again") from error
