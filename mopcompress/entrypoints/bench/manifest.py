"""The manifest of a bench, `run.json`: the inputs of a run, and whether a folder can be continued with a recipe."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopcompress.errors import DataError, RecipeError
from mopcompress.recipe import Recipe, recipe_from_dict, recipe_to_dict
from mopcompress.recipe.arms import revision_of
from mopcompress.recipe.recipe import with_present_names
from mopcompress.recipe.run_spec import CELLS, NOTHING, stored_names_of_fields
from mopcompress.results import Cell, check_comparable, read_rows
from mopcompress.storage import artifacts
from mopcompress.storage.artifacts import differences

FILE = "run.json"
GRID_FIELDS = stored_names_of_fields(NOTHING, CELLS)
"""Stored names of the fields of `run:` that may differ when a folder is continued."""
EARLIER_DEFAULTS = {"clip_percentile": 100.0, "gate_clipping": "together"}
"""Values that runs had before these fields existed. Committed results are of such runs, and can be continued."""


def write_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Write `run.json` atomically."""
    artifacts.write_atomically(folder / FILE, json.dumps(manifest, indent=1) + "\n")


def check_settings(recipe: Recipe, folder: Path) -> None:
    """Raise `RecipeError`, with the fields that differ, when `folder` was made by a recipe with other settings.

    The fields of the grid may differ.
    """
    path = folder / FILE
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        _require_equal(folder, _settings(_stored_recipe(stored, path)), _settings(recipe_to_dict(recipe)))


def continue_manifest(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return `manifest` with the start, the seconds and the commands of earlier runs in the folder, if there are any.

    Raises `RecipeError`, with the fields that differ, when the folder was made with other settings than `manifest`,
    the grid apart, or when it holds rows without a manifest.
    """
    path = folder / FILE
    if not path.exists():
        if (folder / "rows.jsonl").exists():
            raise RecipeError(
                f"{folder} holds rows and no {FILE}: their settings are unknown; use another --output-dir"
            )
        return manifest
    stored = json.loads(path.read_text(encoding="utf-8"))
    _require_equal(folder, _identity(stored | {"recipe": _stored_recipe(stored, path)}), _identity(manifest))
    run = {name: stored[name] for name in ("command", "commit", "dirty", "versions")}
    earlier_runs = [*stored.get("earlier", []), run]
    sentences = [
        f"Rows of this run were also made by: {run['command'] or 'Python'} (commit {run['commit']}"
        f"{', with uncommitted changes' if run['dirty'] else ''})."
        for run in earlier_runs
    ]
    return manifest | {
        "started": stored["started"],
        "seconds": stored["seconds"],
        "earlier": earlier_runs,
        "protocol": [*manifest["protocol"], *dict.fromkeys(sentences)],
    }


def check_rows(folder: Path, cells: Sequence[Cell]) -> None:
    """Raise `DataError` when rows of `folder` cannot be compared with each other, or with those still missing."""
    path = folder / "rows.jsonl"
    rows = read_rows(path)
    check_comparable(rows, path)
    missing_arms = {cell.arm for cell in {*cells} - {row.cell for row in rows}}
    for row in rows:
        if row.arm in missing_arms and row.revision != revision_of(row.arm):
            raise DataError(
                f"{path}: {row.arm} has changed since (revision {row.revision}, now {revision_of(row.arm)}), so that "
                "its other cells would be of another arm; use another --output-dir"
            )


def _stored_recipe(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a manifest's recipe, with values for the fields that did not exist when it was written."""
    recipe = copy.deepcopy(manifest["recipe"])
    groups = [group for stage in recipe.values() for group in stage.values() if isinstance(group, dict)]
    for modifier in (group["PromptRecoveryModifier"] for group in groups if "PromptRecoveryModifier" in group):
        for name, value in EARLIER_DEFAULTS.items():
            modifier.setdefault(name, value)
    return recipe_to_dict(recipe_from_dict(recipe, f"recipe in {path}"))


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return everything that the rows of a folder must have in common."""
    return {
        **_settings(manifest["recipe"]),
        "model": manifest["model"]["sha256"],
        "data": manifest["data"]["sha256"],
        "scored tokens": manifest["data"]["scored_sha256"],
        "calibration": manifest["calibration"]["sha256"],
        "plain text": (manifest["data"].get("text") or {}).get("sha256"),
        "training text": (manifest["data"].get("train_text") or {}).get("sha256"),
        "teacher": manifest.get("teacher"),  # missing in the first runs
    }


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "run": {name: value for name, value in recipe["run"].items() if name not in GRID_FIELDS}}


def _require_equal(folder: Path, stored: dict[str, Any], present: dict[str, Any]) -> None:
    changes = differences(with_present_names(stored), with_present_names(present))
    if changes:
        raise RecipeError(
            f"{folder} was made with other settings: {'; '.join(changes)}; use those settings, or another --output-dir"
        )
