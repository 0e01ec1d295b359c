"""`verify`: a check that a finished folder has not changed since it was finished."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from mopcompress.errors import DataError, InputNotFoundError
from mopcompress.formats import FORMATS
from mopcompress.formats.model_reader import open_model, open_safetensors, tensor_hash
from mopcompress.formats.weight_format import linear_on_grid
from mopcompress.models.meta_model import load_meta_model
from mopcompress.models.repair import read_repairs
from mopcompress.progress import Progress, silent
from mopcompress.storage import artifacts


def verify(folder: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Compare every file with its hash and decode every tensor; returns what was checked.

    The tensors of an export must equal those of its source. Those of a compressed model must be finite, and on their
    grid if they have one. Raises `DataError` at the first difference, `InputNotFoundError` without a folder.
    """
    if not folder.is_dir():
        raise InputNotFoundError(f"{folder}: no such folder; name the output of a command")
    progress.message("comparing files with their hashes")
    artifacts.verify(folder)
    manifest = artifacts.read_manifest(folder) or {}
    summary = {"folder": str(folder), "kind": manifest.get("kind"), "files": len(manifest["files"])}
    if (folder / "config.json").exists():
        return summary | {"tensors": _check_model(folder, manifest.get("tensors"), progress)}
    return summary | {"tensors": sum(_check_file(path) for path in sorted(folder.rglob("*.safetensors")))}


def _check_model(folder: Path, expected: dict[str, str] | None, progress: Progress) -> int:
    try:
        AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{folder / 'config.json'} cannot be loaded: {reason}; make the folder again") from error
    stored = open_model(folder)
    grid = None
    if stored.format == "dense" and stored.grid:  # the other formats decode from their grid, so are on it
        grid = FORMATS["sparse"].fit(stored.grid, load_meta_model(folder))
    names: set[str] = set()
    for number, path in enumerate(stored.files):
        progress.update("decoding tensors", number, len(stored.files))
        for name, tensor in stored.tensors(path):
            if expected is not None and expected.get(name) != tensor_hash(tensor):
                raise DataError(f"{path}: {name} is not what was exported; make the folder again")
            _check_finite(path, name, tensor)
            module = linear_on_grid(name, grid)
            if grid is not None and module is not None:
                grid.codes(module, tensor)
            names.add(name)
    missing = sorted((expected or {}).keys() - names)
    if missing:
        raise DataError(f"{folder} holds no {missing[0]}; make the folder again")
    return len(names) + 2 * len(read_repairs(folder))


def _check_file(path: Path) -> int:
    with open_safetensors(path) as file:
        names = sorted(file.keys())
        for name in names:
            _check_finite(path, name, file.get_tensor(name))
    return len(names)


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{path}: {name} holds NaN or infinite numbers; make the folder again")
