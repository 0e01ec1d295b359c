"""A check that the model, the teacher and the data of a finished output are still those that it was made from."""

from pathlib import Path
from typing import Any

from mopcompress.data.dataset import load_dataset
from mopcompress.entrypoints.inputs import load_calibration
from mopcompress.entrypoints.teacher import teacher_hash
from mopcompress.errors import OutputError
from mopcompress.models.model_loading import load_tokenizer, resolve_model, weights_hash
from mopcompress.progress import Progress
from mopcompress.recipe import Recipe
from mopcompress.storage import artifacts


def verify_finished(target: Path, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Return the manifest of `target`, which the same recipe made, after a check of its files and its inputs.

    Raises `DataError` when a file of it changed, `OutputError` when the model, the teacher or the data changed.
    """
    artifacts.verify(target)
    manifest = artifacts.read_manifest(target) or {}
    base = resolve_model(recipe.run.model, progress=progress.message)
    present: dict[str, Any] = {"model": weights_hash(base)}
    recorded = {"model": manifest["base"]["sha256"]}
    if "teacher" in manifest:
        present["teacher"], recorded["teacher"] = teacher_hash(recipe.recovery), manifest["teacher"]
    if "data" in manifest:
        metadata = load_dataset(recipe.run, load_tokenizer(base)).facts
        for name, key in (("data", "sha256"), ("training text", "train_text")):
            present[name], recorded[name] = metadata.get(key), manifest["data"].get(key)
    if "calibration" in manifest and recipe.run.calibration != "self":  # the model's own text follows from the model
        calibration = load_calibration(recipe.run, base, present["model"], progress)
        present["calibration"] = calibration.metadata["sha256"]
        recorded["calibration"] = manifest["calibration"]["sha256"]
    for name in present:
        if present[name] != recorded[name]:
            raise OutputError(
                f"output {target} was made from another {name} ({recorded[name]}, now {present[name]}); "
                "remove it or name another --output-dir"
            )
    progress.message(f"done already: {target}")
    return manifest
