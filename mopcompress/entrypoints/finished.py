"""A finished output that the same command is asked for again."""

from pathlib import Path
from typing import Any

from mopcompress.data.dataset import load_dataset
from mopcompress.entrypoints.inputs import calibration_tokens
from mopcompress.entrypoints.teacher import teacher_hash
from mopcompress.errors import OutputError
from mopcompress.models.model_loading import load_tokenizer, resolve_model, weights_hash
from mopcompress.progress import Progress
from mopcompress.recipe import Recipe
from mopcompress.storage import artifacts


def verify_finished(target: Path, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """The manifest of `target`, whose recipe is known to be the same, after a look at all else it came from.

    Raises `DataError` when a file of it changed, `OutputError` when the model or the data are others by now.
    """
    artifacts.verify(target)
    manifest = artifacts.read_manifest(target) or {}
    base = resolve_model(recipe.run.model, progress=progress.message)
    now: dict[str, Any] = {"model": weights_hash(base)}
    before = {"model": manifest["base"]["sha256"]}
    if "teacher" in manifest:
        now["teacher"], before["teacher"] = teacher_hash(recipe.recovery), manifest["teacher"]
    if "data" in manifest:
        facts = load_dataset(recipe.run, load_tokenizer(base)).facts
        for what, field in (("data", "sha256"), ("training text", "train_text")):
            now[what], before[what] = facts.get(field), manifest["data"].get(field)
    if "calibration" in manifest and recipe.run.calibration != "self":  # the model's own text is the model's
        _, calibration = calibration_tokens(recipe.run, base, now["model"], progress)
        now["calibration"], before["calibration"] = calibration["sha256"], manifest["calibration"]["sha256"]
    for what in now:
        if now[what] != before[what]:
            raise OutputError(
                f"output {target} was made from another {what} ({before[what]}, now {now[what]}); "
                "remove it or name another --output-dir"
            )
    progress.message(f"done already: {target}")
    return manifest
