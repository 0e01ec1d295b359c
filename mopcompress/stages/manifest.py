"""The manifest of a bench: what a run is made of, and whether a folder can go on with it."""

import json
from pathlib import Path
from typing import Any

from mopcompress import artifact
from mopcompress.errors import RecipeError
from mopcompress.recipe import Recipe

FILE = "run.json"
GRID = ("ratios", "methods", "bits", "arms", "seeds", "output_dir", "max_fallback")  # may differ when a run goes on


def write_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Write `run.json`, whole."""
    artifact.write_whole(folder / FILE, json.dumps(manifest, indent=1) + "\n")


def continued(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The manifest with the start and the seconds of the run that the folder holds already, if it does.

    Raises `RecipeError` naming what differs, the grid apart, when the folder was made with other settings.
    """
    path = folder / FILE
    if not path.exists():
        return manifest
    before = json.loads(path.read_text(encoding="utf-8"))
    differences = _differences(_identity(before), _identity(manifest))
    if differences:
        raise RecipeError(
            f"{folder} was made with other settings: {'; '.join(differences)}; "
            "use those settings, or another --output-dir"
        )
    return manifest | {"started": before["started"], "seconds": before["seconds"]}


def protocol(recipe: Recipe) -> list[str]:
    """What a reader must know of how the arms are compared."""
    recovery = recipe.recovery
    return [
        "Every arm is scored on the same response tokens of the same test rows, each given the instruction alone and "
        "the response before it.",
        f"Trained arms share rows, order of rows, steps ({recovery.steps} of {recovery.batch_size} rows), starting "
        "prompts and learning rate of prompts; single has as many prompt tokens in one group as mop has in all its "
        "experts.",
        "The gate of mop is pre-trained on the training rows' task labels, which single does not see; it reads "
        "instruction tokens alone. Trained parameters count the gate.",
        "Learning rates are the recipe's for both arms: they were not swept for this run.",
        "Embeddings and head are not compressed; sparsity is counted over the compressed linears of the blocks.",
    ]


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    recipe = {name: part for name, part in manifest["recipe"].items() if name != "run"}
    run = {name: value for name, value in manifest["recipe"]["run"].items() if name not in GRID}
    return {
        "recipe": recipe,
        **{f"run.{name}": value for name, value in run.items()},
        "model": manifest["model"]["sha256"],
        "data": manifest["data"]["sha256"],
        "scored tokens": manifest["data"]["scored_sha256"],
        "calibration": manifest["calibration"]["sha256"],
    }


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
