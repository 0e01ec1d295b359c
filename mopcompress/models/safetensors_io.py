"""Single tensors of safetensors files: read without mapping a file into memory, and overwritten in place.

The safetensors package maps whole files and writes whole files. A model larger than memory needs neither: a compressed
model has the names, shapes and dtypes of its source, so it is a copy of the source's files with some bytes replaced.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopcompress.errors import DataError, StorageError
from mopcompress.models.weight_files import weight_files

_CHUNK = 2**24  # bytes read at a time
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorLocation:
    """The location of a tensor: its file's name, and its first byte in that file."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def tensor_locations(folder: Path) -> dict[str, TensorLocation]:
    """Return the locations of all tensors of a folder's weight files, by name.

    Raises `DataError` when a file is damaged or has a dtype that is not known here.
    """
    locations: dict[str, TensorLocation] = {}
    for path in weight_files(folder):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                location = TensorLocation(path.name, 8 + size + begin, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
                if location.bytes != end - begin or 8 + size + end > path.stat().st_size:
                    raise ValueError(f"{name} is cut off")
                locations[name] = location
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"model {folder} cannot be loaded: {path.name} is no whole safetensors file ({error}); "
                "get the model again"
            ) from error
    return locations


def read_tensor(folder: Path, location: TensorLocation) -> Tensor:
    """Read a tensor into memory of its own. Raises `StorageError` when the file has become shorter."""
    raw = np.fromfile(folder / location.file, dtype=np.uint8, count=location.bytes, offset=location.offset)
    if raw.size != location.bytes:
        raise StorageError(f"{folder / location.file} became shorter while it was read; get the model again")
    return torch.from_numpy(raw).view(location.dtype).view(location.shape)


def read_rows(folder: Path, location: TensorLocation, rows: Sequence[int]) -> Tensor:
    """Return the tensor in fp32 with only these rows filled: memory that was never written takes no space."""
    row = TensorLocation(location.file, location.offset, location.shape[1:], location.dtype)
    tensor = torch.empty(location.shape)
    with (folder / location.file).open("rb") as file:
        for index in rows:
            file.seek(location.offset + index * row.bytes)
            tensor[index] = torch.frombuffer(bytearray(file.read(row.bytes)), dtype=location.dtype).view(row.shape)
    return tensor


def overwrite(folder: Path, location: TensorLocation, tensor: Tensor) -> str:
    """Write `tensor` at its location, read the file again, compare, and return the `stored_hash`.

    Raises `StorageError` when writing fails or the file holds other bytes afterwards.
    """
    path = folder / location.file
    raw: Any = tensor.detach().to("cpu", location.dtype).contiguous().view(-1).view(torch.uint8).numpy()
    try:
        with path.open("r+b") as file:
            file.seek(location.offset)
            file.write(raw)
    except OSError as error:
        raise StorageError(f"writing {path} failed: {error}; free some space and run again") from error
    digest = stored_hash(folder, location)
    if digest != sha256(raw).hexdigest():
        raise StorageError(f"{path} does not hold a tensor as it was written; run again on another disk")
    return digest


def stored_hash(folder: Path, location: TensorLocation) -> str:
    """Return the SHA-256 of a tensor's bytes in its file, hexadecimal."""
    digest, remaining = sha256(), location.bytes
    with (folder / location.file).open("rb") as file:
        file.seek(location.offset)
        while chunk := file.read(min(remaining, _CHUNK)):
            digest.update(chunk)
            remaining -= len(chunk)
    return digest.hexdigest()


def tensor_crc32(tensor: Tensor, start: int = 0) -> int:
    """Return the CRC-32 of a tensor's bytes in memory, continued from the checksum `start`."""
    raw: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return zlib.crc32(raw, start)
