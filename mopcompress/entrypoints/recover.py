"""`recover`: from a compressed folder and data to a small adapter folder."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mopcompress.entrypoints.from_recipe import first_layer
from mopcompress.entrypoints.inputs import SplitStates, load_dataset_for
from mopcompress.entrypoints.lr_sweep import check_validation
from mopcompress.entrypoints.teacher import build_distillation, load_dense_weights, teacher_hash
from mopcompress.entrypoints.train_adapter import TrainingSetup, log_expert_count, train_with_sweep
from mopcompress.environment import choose_device, provenance
from mopcompress.models.model_loading import check_output, open_model, resolve_model
from mopcompress.progress import Progress, silent
from mopcompress.recipe import Recipe, recipe_to_dict
from mopcompress.recover.adapter import TrainedAdapter, trained_parameters
from mopcompress.recover.checkpoint import CheckpointFolder, resumable_training
from mopcompress.recover.distributed import Workers, join_workers
from mopcompress.recover.save_and_load import adapter_bytes, save_adapter
from mopcompress.storage import artifacts


def recover(recipe: Recipe, target: Path, *, seed: int, progress: Progress = silent) -> dict[str, Any]:
    """Train the recipe's adapter on its model, publish it as `target`, and return the manifest.

    Processes that a launcher started train together; the first one alone writes and reports.
    """
    check_output(target, resolve_model(recipe.run.model, progress=progress.message))
    device = choose_device(recipe.run.device)
    with join_workers(device) as workers:
        return _recover(recipe, target, seed, workers, progress if workers.is_main else silent)


def _recover(recipe: Recipe, target: Path, seed: int, workers: Workers, progress: Progress) -> dict[str, Any]:
    modifier, batch_size = recipe.recovery, recipe.run.eval_batch_size
    base = open_model(recipe.run.model, device=choose_device(recipe.run.device))
    dataset = load_dataset_for(base.model, recipe.run)
    layer = first_layer(modifier.arm, modifier.layer, base.model)
    log_expert_count([modifier], dataset.tasks, progress)
    teacher, dense_weights = teacher_hash(modifier), load_dense_weights(modifier, base)
    check_validation(dataset, recipe.run.data, [modifier])
    states = SplitStates(base, dataset, batch_size, progress)
    with workers.main_first():
        states.train(layer)
    # hidden states of a teacher are not cached, so with them every process runs it, all at the same time
    with nullcontext() if modifier.squarehead else workers.main_first():
        trains = modifier.rate is not None  # an arm with a closed form needs weights of the dense model, no outputs
        distillation = build_distillation(modifier, base, dataset.train, batch_size, progress) if trains else None
    metadata = {
        "learning_rate": modifier.rate,
        "sweep": None,
        "base": {"folder": str(base.folder), "sha256": base.sha256},
        "teacher": teacher,
        "data": dataset.facts,
        "recipe": recipe_to_dict(recipe),
        "seed": seed,
        "processes": workers.count,
        **provenance(base.model.device),
    }
    with _resumable(target, metadata, progress) if workers.is_main else nullcontext() as checkpoints:
        setup = TrainingSetup(
            states=states,
            seed=seed,
            progress=progress,
            dense_weights=dense_weights,
            distillation=distillation,
            checkpoints=checkpoints,
            workers=workers,
        )
        trained, sweep = train_with_sweep(modifier, setup)
        if sweep:
            metadata |= {"learning_rate": sweep.learning_rate, "sweep": asdict(sweep)}
        return publish_adapter(trained, target, metadata) if workers.is_main else metadata


def _resumable(target: Path, metadata: dict[str, Any], progress: Progress) -> AbstractContextManager[CheckpointFolder]:
    """Return the training that is to become `target`; it is resumed with equal inputs, settings, code and machine."""
    recipe = metadata["recipe"]
    run = {name: value for name, value in recipe["run"].items() if name not in ("model", "output_dir")}
    equal = ("data", "teacher", "seed", "learning_rate", "processes", "versions", "commit", "device", "threads")
    job = {name: metadata[name] for name in equal}
    job |= {"model": metadata["base"]["sha256"], "recipe": recipe | {"run": run}}
    return resumable_training(target, job, progress.message)


def publish_adapter(trained: TrainedAdapter, target: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Write an adapter folder, and return its manifest: what training measured, and `metadata`."""
    manifest = {
        "kind": "adapter",
        "arm": trained.config.arm,
        "trained_parameters": trained_parameters(trained.adapter),
        "train_steps": len(trained.rows),
        "train_seconds": trained.seconds,
        "final_nats": trained.rows[-1].nll if trained.rows else None,
        **metadata,
    }
    with artifacts.publish(target, manifest) as scratch:
        save_adapter(trained.adapter, trained.config, scratch)
        manifest["adapter_bytes"] = adapter_bytes(scratch)
    return manifest
