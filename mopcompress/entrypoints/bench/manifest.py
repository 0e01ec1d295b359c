"""The manifest of a bench: what a run is made of, and whether a folder can go on with it."""

import copy
import json
from pathlib import Path
from typing import Any

from mopcompress.errors import RecipeError
from mopcompress.recipe import Recipe, recipe_from_dict, recipe_to_dict
from mopcompress.recipe.recipe import with_present_names
from mopcompress.recipe.run_spec import CELLS, NOTHING, stored_names_of_fields
from mopcompress.storage import artifacts
from mopcompress.storage.artifacts import differences

FILE = "run.json"
GRID_FIELDS = stored_names_of_fields(NOTHING, CELLS)  # of `run:`: they may differ when a run goes on
BEFORE = {"clip_percentile": 100.0, "gate_clipping": "together"}  # what was done before these could be asked for


def write_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Write `run.json`, whole."""
    artifacts.write_atomically(folder / FILE, json.dumps(manifest, indent=1) + "\n")


def check_settings(recipe: Recipe, folder: Path) -> None:
    """Raise `RecipeError` naming what differs, the grid apart, when `folder` was made by another recipe."""
    path = folder / FILE
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        _refuse(folder, _settings(_as_of_now(before, path)), _settings(recipe_to_dict(recipe)))


def continue_manifest(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The manifest, with what came before when the folder holds a run already: its start, seconds and invocations.

    Raises `RecipeError` naming what differs, the grid apart, when the folder was made with other settings, or when it
    holds rows and nothing says of which settings.
    """
    path = folder / FILE
    if not path.exists():
        if (folder / "rows.jsonl").exists():
            raise RecipeError(
                f"{folder} holds rows and no {FILE}: their settings are unknown; use another --output-dir"
            )
        return manifest
    before = json.loads(path.read_text(encoding="utf-8"))
    _refuse(folder, _identity(before | {"recipe": _as_of_now(before, path)}), _identity(manifest))
    earlier = [*before.get("earlier", []), {name: before[name] for name in ("command", "commit", "dirty", "versions")}]
    told = [
        f"Rows of this run were also made by: {one['command'] or 'Python'} (commit {one['commit']}"
        f"{', with uncommitted changes' if one['dirty'] else ''})."
        for one in earlier
    ]
    return manifest | {
        "started": before["started"],
        "seconds": before["seconds"],
        "earlier": earlier,
        "protocol": [*manifest["protocol"], *dict.fromkeys(told)],
    }


def _as_of_now(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recorded recipe with the fields that it had not yet, at what was done without them."""
    recipe = copy.deepcopy(manifest["recipe"])
    groups = [group for stage in recipe.values() for group in stage.values() if isinstance(group, dict)]
    for modifier in (group["PromptRecoveryModifier"] for group in groups if "PromptRecoveryModifier" in group):
        for name, value in BEFORE.items():
            modifier.setdefault(name, value)
    return recipe_to_dict(recipe_from_dict(recipe, f"recipe in {path}"))


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        **_settings(manifest["recipe"]),
        "model": manifest["model"]["sha256"],
        "data": manifest["data"]["sha256"],
        "scored tokens": manifest["data"]["scored_sha256"],
        "calibration": manifest["calibration"]["sha256"],
        "plain text": (manifest["data"].get("text") or {}).get("sha256"),
        "training text": (manifest["data"].get("train_text") or {}).get("sha256"),
        "teacher": manifest.get("teacher"),  # runs of before it was noted have none
    }


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    return {**recipe, "run": {name: value for name, value in recipe["run"].items() if name not in GRID_FIELDS}}


def _refuse(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    changes = differences(with_present_names(stored), with_present_names(asked))
    if changes:
        raise RecipeError(
            f"{folder} was made with other settings: {'; '.join(changes)}; use those settings, or another --output-dir"
        )
