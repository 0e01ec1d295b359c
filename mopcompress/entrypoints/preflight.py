"""What a command is about to do: checked as far as is cheap, and told, before torch loads."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopcompress.data.sources import local_path
from mopcompress.entrypoints.bench.manifest import check_settings
from mopcompress.entrypoints.finished import read_finished
from mopcompress.entrypoints.shape_checks import check_not_repaired, check_shapes, shapes_on_disk
from mopcompress.errors import InputNotFoundError, OutputError
from mopcompress.grid import cells_of, modifiers_of, settings_of
from mopcompress.models.weight_files import weight_files
from mopcompress.recipe import GPTQModifier, Recipe, RunSpec, recipe_to_dict
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recipe.pruning_modifiers import Pruning
from mopcompress.recipe.recipe import with_present_names
from mopcompress.recipe.run_spec import BENCH, CELLS, NOTHING, stored_names_of_fields
from mopcompress.results import read_rows, read_sweeps, sweep_name
from mopcompress.storage.artifacts import differences
from mopcompress.storage.cache import cache_folder

IRRELEVANT_FIELDS = stored_names_of_fields(NOTHING, CELLS, BENCH)
"""Stored names of the fields of `run:` that do not change the folders of prune, quantize and recover."""


def check_inputs(run: RunSpec, *, data: bool, calibration: bool) -> None:
    """Raise `InputNotFoundError` when the model, the data or the calibration text is a path where nothing is."""
    check_model(run.model)
    if (data or (calibration and run.calibration == "data")) and run.data != "skills":
        local_path(run.data)
    for text in (run.eval_text, run.train_text):
        if data and text is not None:
            local_path(text)
    if calibration and run.calibration not in {"self", "data"}:
        local_path(run.calibration)


def check_recipe_shapes(recipe: Recipe, modifiers: Sequence[Pruning | GPTQModifier]) -> None:
    """Raise `RecipeError` when groups, structures or ranks do not fit the model, as far as its files here tell.

    Raises `DataError` for a model that cannot be compressed again.
    """
    folder = model_facts(recipe.run.model)["folder"]
    if folder is not None:
        check_not_repaired(Path(folder))
        check_shapes(shapes_on_disk(Path(folder)), modifiers, recipe.repair)


def check_grid(recipe: Recipe) -> None:
    """The same for every setting of a bench."""
    for setting in settings_of(recipe):
        check_recipe_shapes(recipe, modifiers_of(recipe, setting))


def check_model(name: str) -> None:
    """Raise `InputNotFoundError` when the model is a path where none is."""
    folder = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if is_path and name != "smollm2" and not folder.exists():
        raise InputNotFoundError(f"model {name}: no such folder; name a Hugging Face folder, a hub id or smollm2")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise InputNotFoundError(f"model {folder}: no config.json there; name a Hugging Face folder")


def check_creatable(target: Path) -> None:
    """Raise `OutputError` when no folder can be made at `target`, hours before it would be."""
    try:
        there = next(path for path in (target, *target.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, or a loop of links
        raise _not_creatable(target, error.strerror) from error
    if not there.is_dir():
        raise _not_creatable(target, f"{there} is a file")
    if not os.access(there, os.W_OK):
        raise _not_creatable(target, os.strerror(errno.EACCES))


def completed_by_same_recipe(target: Path, recipe: Recipe, resume: str) -> bool:
    """Return True when the same recipe, model and grid apart, finished `target`; False when there is work to do.

    Raises `OutputError` when `target` cannot be made or holds something else, and as `read_finished` does.
    """
    check_creatable(target)
    manifest = read_finished(target, resume, resumable=True)
    if manifest is None:
        return False
    stored, asked = _relevant_settings(manifest.get("recipe", {})), _relevant_settings(recipe_to_dict(recipe))
    changes = differences(with_present_names(stored), with_present_names(asked))
    if changes:
        raise OutputError(
            f"output {target} was made with other settings ({'; '.join(changes)}); "
            "remove it or name another --output-dir"
        )
    return True


def check_bench_folder(folder: Path, recipe: Recipe, resume: str) -> None:
    """Whether `bench` may begin or go on in `folder`; `bench` itself also compares model and data."""
    check_creatable(folder)
    if resume == "required" and not (folder / "run.json").exists():
        raise InputNotFoundError(f"--resume required: no run.json in {folder}; name the folder of a run, or use auto")
    if resume == "never" and folder.exists() and any(folder.iterdir()):
        raise OutputError(f"output {folder} is not empty and --resume is never; remove it or name another")
    check_settings(recipe, folder)


def model_facts(name: str) -> dict[str, Any]:
    """The model's name, and where it is and how big, as far as this machine knows without asking the network."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and name == "smollm2":
        folder = next(iter(sorted(cache_folder().glob("models/SmolLM2-*"))), folder)
    size = sum(path.stat().st_size for path in weight_files(folder)) if folder.is_dir() else None
    return {"name": name, "folder": str(folder) if folder.is_dir() else None, "bytes": size}


def bench_facts(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The grid: settings, cells in all and finished, training steps (of sweeps the least) and bytes still to come."""
    settings = settings_of(recipe)
    cells = {cell for setting in settings for cell in cells_of(recipe.run.model_dump(by_alias=True), setting)}
    done = {row.cell for row in read_rows(folder / "rows.jsonl")} & cells
    stepping = {arm for arm, settings in ARM_DEFAULTS.items() if settings.learning_rate is not None}
    trained = [cell for cell in cells - done if cell.arm in stepping]
    sweeps = read_sweeps(folder / "sweeps")
    unswept = {(cell.setting, cell.arm) for cell in trained if sweep_name(cell.setting, cell.arm) not in sweeps}
    swept_first = [recipe.recovery.with_arm(arm).least_steps - recipe.recovery.steps for _, arm in unswept]
    size = model_facts(recipe.run.model)["bytes"]
    return {
        "settings": [setting.name for setting in settings],
        "cells": len(cells),
        "cells_done": len(done),
        "steps": recipe.recovery.steps * len(trained) + sum(swept_first),
        "disk_bytes": None if size is None else size * (len(settings) - 1),
    }


def _relevant_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a stored recipe without the fields that change no folder, and without the model, compared by its hash."""
    run = {name: value for name, value in recipe.get("run", {}).items() if name not in (*IRRELEVANT_FIELDS, "model")}
    return {**recipe, "run": run}


def _not_creatable(target: Path, reason: str | None) -> OutputError:
    return OutputError(f"output {target} cannot be created: {reason}; name another --output-dir")
