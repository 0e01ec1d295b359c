"""Tensors in memory-mapped files."""

import os
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mopcompress.errors import StorageError


def map_file(path: Path, rows: int, columns: int, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    """Return a file as a tensor. Writing to the tensor writes to the file, which is made if need be."""
    flat = torch.from_file(str(path), shared=True, size=rows * columns, dtype=dtype)
    return flat.view(rows, columns)


def map_anonymous(rows: int, columns: int, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    """Return a tensor in a file that has no name and ends with the process.

    Raises `StorageError` when there is no room for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "states", rows * columns * dtype.itemsize
        try:
            reserve(path, size)
        except OSError as error:
            raise StorageError(
                f"{size} bytes of hidden states find no room in {folder}: {error.strerror}; free some, or set TMPDIR"
            ) from error
        # the mapping outlives the file's name: nothing is left behind, whatever happens
        return map_file(path, rows, columns, dtype)


def reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes and allocate them all. Raises `OSError` when the disk is too full.

    Without that, a full disk would end the process in the middle of writing to a mapping.
    """
    with path.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)  # on systems without that call (macOS) the length alone
