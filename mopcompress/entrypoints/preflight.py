"""Cheap checks of a command, and the facts of its `--dry-run`: all before torch is loaded."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopcompress.data.sources import local_path
from mopcompress.entrypoints.bench.manifest import check_settings
from mopcompress.entrypoints.resume_policy import read_finished
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
    """Raise `InputNotFoundError` when the model, the data or the calibration text is a path that does not exist."""
    check_model(run.model)
    if (data or (calibration and run.calibration == "data")) and run.data != "skills":
        local_path(run.data)
    for text in (run.eval_text, run.train_text):
        if data and text is not None:
            local_path(text)
    if calibration and run.calibration not in {"self", "data"}:
        local_path(run.calibration)


def check_recipe_shapes(recipe: Recipe, modifiers: Sequence[Pruning | GPTQModifier]) -> None:
    """Raise `RecipeError` when groups, structures or ranks do not fit the model, if its files are on this machine.

    Raises `DataError` for a model that cannot be compressed again.
    """
    folder = model_facts(recipe.run.model)["folder"]
    if folder is not None:
        check_not_repaired(Path(folder))
        check_shapes(shapes_on_disk(Path(folder)), modifiers, recipe.repair)


def check_grid(recipe: Recipe) -> None:
    """Check the shapes for every setting of a bench, as `check_recipe_shapes` does for a recipe."""
    for setting in settings_of(recipe):
        check_recipe_shapes(recipe, modifiers_of(recipe, setting))


def check_model(name: str) -> None:
    """Raise `InputNotFoundError` when the model is a path without a model."""
    folder = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if is_path and name != "smollm2" and not folder.exists():
        raise InputNotFoundError(f"model {name}: no such folder; name a Hugging Face folder, a hub id or smollm2")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise InputNotFoundError(f"model {folder}: no config.json there; name a Hugging Face folder")


def check_creatable(target: Path) -> None:
    """Raise `OutputError` when no folder can be created at `target`, before hours of work go into it."""
    try:
        existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long, or a loop of links
        raise _not_creatable(target, error.strerror) from error
    if not existing.is_dir():
        raise _not_creatable(target, f"{existing} is a file")
    if not os.access(existing, os.W_OK):
        raise _not_creatable(target, os.strerror(errno.EACCES))


def completed_by_same_recipe(target: Path, recipe: Recipe, resume: str) -> bool:
    """Return True when the same recipe, model and grid apart, finished `target`; False when there is work to do.

    Raises `OutputError` when `target` cannot be made or holds something else, and as `read_finished` does.
    """
    check_creatable(target)
    manifest = read_finished(target, resume, resumable=True)
    if manifest is None:
        return False
    stored, present = _relevant_settings(manifest.get("recipe", {})), _relevant_settings(recipe_to_dict(recipe))
    changes = differences(with_present_names(stored), with_present_names(present))
    if changes:
        raise OutputError(
            f"output {target} was made with other settings ({'; '.join(changes)}); "
            "remove it or name another --output-dir"
        )
    return True


def check_bench_folder(folder: Path, recipe: Recipe, resume: str) -> None:
    """Check that `bench` may start or continue in `folder`; `bench` itself also compares model and data.

    Raises `OutputError`, `InputNotFoundError` or `RecipeError`.
    """
    check_creatable(folder)
    if resume == "required" and not (folder / "run.json").exists():
        raise InputNotFoundError(f"--resume required: no run.json in {folder}; name the folder of a run, or use auto")
    if resume == "never" and folder.exists() and any(folder.iterdir()):
        raise OutputError(f"output {folder} is not empty and --resume is never; remove it or name another")
    check_settings(recipe, folder)


def model_facts(name: str) -> dict[str, Any]:
    """Return the model's name, its folder and its size in bytes; None for what is not on this machine."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and name == "smollm2":
        folder = next(iter(sorted(cache_folder().glob("models/SmolLM2-*"))), folder)
    size = sum(path.stat().st_size for path in weight_files(folder)) if folder.is_dir() else None
    return {"name": name, "folder": str(folder) if folder.is_dir() else None, "bytes": size}


def bench_facts(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the settings and cells of a grid, those finished, and the training steps and bytes still to come.

    A sweep counts with the fewest trials that it can have.
    """
    settings = settings_of(recipe)
    cells = {cell for setting in settings for cell in cells_of(recipe.run.model_dump(by_alias=True), setting)}
    finished = {row.cell for row in read_rows(folder / "rows.jsonl")} & cells
    trained_arms = {arm for arm, defaults in ARM_DEFAULTS.items() if defaults.learning_rate is not None}
    to_train = [cell for cell in cells - finished if cell.arm in trained_arms]
    sweeps = read_sweeps(folder / "sweeps")
    unswept = {(cell.setting, cell.arm) for cell in to_train if sweep_name(cell.setting, cell.arm) not in sweeps}
    sweep_steps = [recipe.recovery.with_arm(arm).least_steps - recipe.recovery.steps for _, arm in unswept]
    size = model_facts(recipe.run.model)["bytes"]
    return {
        "settings": [setting.name for setting in settings],
        "cells": len(cells),
        "cells_done": len(finished),
        "steps": recipe.recovery.steps * len(to_train) + sum(sweep_steps),
        "disk_bytes": None if size is None else size * (len(settings) - 1),
    }


def _relevant_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a stored recipe without the fields that change no folder, and without the model, compared by its hash."""
    run = {name: value for name, value in recipe.get("run", {}).items() if name not in (*IRRELEVANT_FIELDS, "model")}
    return {**recipe, "run": run}


def _not_creatable(target: Path, reason: str | None) -> OutputError:
    return OutputError(f"output {target} cannot be created: {reason}; name another --output-dir")
