"""Compressions of a tiny model into a folder, which a test can stop anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from compression_cases import CALIBRATION_TOKENS
from factories import on_progress

from mopcompress.compress import checkpoint
from mopcompress.entrypoints.compress import compress_into
from mopcompress.entrypoints.inputs import CalibrationSet
from mopcompress.models.quantization_grid import read_grid
from mopcompress.recipe import GPTQModifier, Recipe, SparseGPTModifier
from mopcompress.storage import artifacts

METADATA = {"source": "here", "sha256": "of these tokens"}
CALIBRATION = CalibrationSet(CALIBRATION_TOKENS, METADATA)
PRUNE = SparseGPTModifier(sparsity=0.5, block_size=8)
ROUND = GPTQModifier.model_validate(
    {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 8}}}}
)
MACHINE_FIELDS = ("compress_seconds", "peak_bytes", "files", "recipe", "base")  # these differ from run to run


class KilledError(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def compress_folder(
    source: Path,
    target: Path,
    recipe: Recipe,
    *,
    modifiers: Any = (PRUNE, ROUND),
    calibration: CalibrationSet = CALIBRATION,
    messages: list[str] | None = None,
) -> dict[str, Any]:
    """Compress `source` into `target`; progress is added to `messages`."""

    def note(what: str, _done: int, _total: int) -> None:
        if messages is not None:
            messages.append(what)

    return compress_into(target, source, list(modifiers), calibration, recipe, progress=on_progress(note))


def folder_contents(folder: Path) -> tuple[Any, ...]:
    """Return all contents of a compressed folder that do not depend on the machine's speed."""
    rows = [json.loads(line) for line in (folder / "layers.jsonl").read_text().splitlines()]
    metadata = artifacts.read_manifest(folder)
    assert metadata is not None
    metadata = {name: value for name, value in metadata.items() if name not in MACHINE_FIELDS}
    others = {"layers.jsonl", "manifest.json", "grid.safetensors"}  # the order of a grid's metadata is not fixed
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in others}
    grid = read_grid(folder)
    scales = {} if grid is None else {name: scale.tolist() for name, scale in grid.scales.items()}
    return [row | {"seconds": 0} for row in rows], metadata, files, scales


def stop_at(monkeypatch: pytest.MonkeyPatch, function: str, count: int) -> None:
    """Make the `count`-th call of a function of the checkpoint end everything, before it does its work."""
    original, calls = getattr(checkpoint, function), []

    def act(*arguments: object) -> object:
        calls.append(function)
        if len(calls) == count:
            raise KilledError
        return original(*arguments)

    monkeypatch.setattr(checkpoint, function, act)
