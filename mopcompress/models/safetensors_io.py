"""Tensors in safetensors files by their place: read without mapping a file into memory, and overwritten in place.

The safetensors package maps whole files and writes whole files. A model larger than memory needs neither: a compressed
model has the names, shapes and dtypes of its source, so it is a copy of the source's files with other bytes here and
there.
"""

import json
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

_PIECE = 2**24  # bytes read at a time
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
    """Where a tensor lies: the file's name, and its first byte there."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def tensor_locations(folder: Path) -> dict[str, TensorLocation]:
    """All tensors of a folder's weight files. Raises `DataError` when a file is damaged or of a kind not known here."""
    found: dict[str, TensorLocation] = {}
    for path in weight_files(folder):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                place = TensorLocation(path.name, 8 + size + begin, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
                if place.bytes != end - begin or 8 + size + end > path.stat().st_size:
                    raise ValueError(f"{name} is cut off")
                found[name] = place
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"model {folder} cannot be loaded: {path.name} is no whole safetensors file ({error}); "
                "get the model again"
            ) from error
    return found


def read(folder: Path, place: TensorLocation) -> Tensor:
    """The tensor, in memory of its own."""
    count, at = place.bytes, place.offset
    raw = np.fromfile(folder / place.file, dtype=np.uint8, count=count, offset=at)
    if raw.size != count:
        raise StorageError(f"{folder / place.file} became shorter while it was read; get the model again")
    return torch.from_numpy(raw).view(place.dtype).view(place.shape)


def read_rows(folder: Path, place: TensorLocation, rows: Sequence[int]) -> Tensor:
    """The tensor in fp32 with only these rows filled: memory that nothing was written to does not count."""
    row = TensorLocation(place.file, place.offset, place.shape[1:], place.dtype)
    tensor = torch.empty(place.shape)
    with (folder / place.file).open("rb") as file:
        for index in rows:
            file.seek(place.offset + index * row.bytes)
            tensor[index] = torch.frombuffer(bytearray(file.read(row.bytes)), dtype=place.dtype).view(row.shape)
    return tensor


def overwrite(folder: Path, place: TensorLocation, tensor: Tensor) -> str:
    """Put `tensor` in its place, re-open the file and compare; returns the `digest`.

    Raises `StorageError` when it is not there as given.
    """
    raw: Any = tensor.detach().to("cpu", place.dtype).contiguous().view(-1).view(torch.uint8).numpy()
    try:
        with (folder / place.file).open("r+b") as file:
            file.seek(place.offset)
            file.write(raw)
    except OSError as error:
        raise StorageError(f"writing {folder / place.file} failed: {error}; free some space and run again") from error
    there = tensor_hash(folder, place)
    if there != sha256(raw).hexdigest():
        raise StorageError(f"{folder / place.file}: a tensor is not there as it was written; run again on another disk")
    return there


def tensor_hash(folder: Path, place: TensorLocation) -> str:
    """SHA-256 of a tensor's bytes, hexadecimal."""
    seen, left = sha256(), place.bytes
    with (folder / place.file).open("rb") as file:
        file.seek(place.offset)
        while piece := file.read(min(left, _PIECE)):
            seen.update(piece)
            left -= len(piece)
    return seen.hexdigest()
