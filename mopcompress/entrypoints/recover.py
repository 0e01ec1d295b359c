"""`recover`: a compressed folder and data in, a small adapter folder out."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mopcompress.entrypoints.from_recipe import first_layer
from mopcompress.entrypoints.inputs import load_dataset_for
from mopcompress.entrypoints.lr_sweep import (
    Train,
    check_validation,
    describe_sweep,
    read_trials,
    sweep_rate,
    write_trials,
)
from mopcompress.entrypoints.teacher import build_distillation, dense_weights, teacher_hash
from mopcompress.entrypoints.train_adapter import log_expert_count, train_adapter
from mopcompress.environment import choose_device, provenance
from mopcompress.evaluation.hidden_states import HiddenStateDataset
from mopcompress.evaluation.state_cache import TRAINING_DTYPE, load_or_compute_states
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.model_loading import check_output, load_model, resolve_model, weights_hash
from mopcompress.progress import Progress, silent
from mopcompress.recipe import PromptRecoveryModifier, Recipe, recipe_to_dict
from mopcompress.recover.adapter import AdapterInputs, TrainedAdapter, trained_parameters
from mopcompress.recover.checkpoint import CheckpointFolder, resumable_training
from mopcompress.recover.distributed import Workers, join_workers
from mopcompress.recover.save_and_load import adapter_bytes, save_adapter
from mopcompress.results import Sweep
from mopcompress.storage import artifacts


def recover(recipe: Recipe, target: Path, *, seed: int, progress: Progress = silent) -> dict[str, Any]:
    """Train the recipe's recovery on its model, publish the adapter as `target`, and return the manifest."""
    base = resolve_model(recipe.run.model, progress=progress.message)
    check_output(target, base)
    device, size = choose_device(recipe.run.device), recipe.run.eval_batch_size
    with join_workers(device) as workers:
        tell = progress if workers.is_main else silent
        model = load_model(base, device=device)
        documents = load_dataset_for(model, recipe.run)
        layer, sha256 = first_layer(recipe.recovery.arm, recipe.recovery.layer, model), weights_hash(base)
        modifier, recovered = recipe.recovery, None
        log_expert_count([modifier], documents.tasks, tell)
        teacher, dense = teacher_hash(modifier), dense_weights(modifier, base, model)
        check_validation(documents, recipe.run.data, [modifier])
        with workers.main_first():
            states = load_or_compute_states(
                model, sha256, documents.train, layer, size, "training rows", tell, dtype=TRAINING_DTYPE
            )
        # hidden states are not kept: with them every process runs the teacher, all at once
        with nullcontext() if modifier.squarehead else workers.main_first():
            taught = None if dense else build_distillation(modifier, base, model, documents.train, size, tell)
        facts = {
            "learning_rate": modifier.rate,
            "sweep": None,
            "base": {"folder": str(base), "sha256": sha256},
            "teacher": teacher,
            "data": documents.facts,
            "recipe": recipe_to_dict(recipe),
            "seed": seed,
            "processes": workers.count,
            **provenance(model.device),
        }
        with _kept(target, facts, tell) if workers.is_main else nullcontext() as checkpoints:
            train = partial(
                train_adapter,
                material=AdapterInputs(model, states, documents.tasks, dense),
                base_sha256=sha256,
                seed=seed,
                progress=tell,
                distillation=taught,
                checkpoints=checkpoints,
                workers=workers,
            )
            if modifier.sweeps:
                with workers.main_first():
                    rows = load_or_compute_states(
                        model, sha256, documents.validation, layer, size, "validation rows", tell
                    )
                sweep, recovered = _swept(
                    modifier, model, rows, train, batch_size=size, checkpoints=checkpoints, workers=workers
                )
                tell.message(describe_sweep(sweep))
                modifier = modifier.at_rate(sweep.learning_rate)
                facts |= {"learning_rate": modifier.rate, "sweep": asdict(sweep)}
            recovered = recovered or train(modifier)
            return publish_adapter(recovered, target, facts) if workers.is_main else facts


def _swept(
    modifier: PromptRecoveryModifier,
    model: LanguageModel,
    validation: HiddenStateDataset,
    train: Train,
    *,
    batch_size: int,
    checkpoints: CheckpointFolder | None,
    workers: Workers,
) -> tuple[Sweep, TrainedAdapter | None]:
    """The rate that all processes found, which one of them keeps; the training too, where a trial was as long."""
    return sweep_rate(
        modifier,
        model,
        validation,
        train,
        batch_size=batch_size,
        known=workers.same_for_all(read_trials(checkpoints.folder) if checkpoints else {}),
        keep=partial(write_trials, folder=checkpoints.folder) if checkpoints else lambda trials: None,
        agreed=workers.same_for_all,
    )


def _kept(target: Path, facts: dict[str, Any], progress: Progress) -> AbstractContextManager[CheckpointFolder]:
    """The training so far that is to become `target`, if it was of the same model, data, settings and machine."""
    recipe = facts["recipe"]
    run = {name: setting for name, setting in recipe["run"].items() if name not in ("model", "output_dir")}
    same = ("data", "teacher", "seed", "learning_rate", "processes", "versions", "commit", "device", "threads")
    job = {name: facts[name] for name in same} | {"model": facts["base"]["sha256"], "recipe": recipe | {"run": run}}
    return resumable_training(target, job, progress.message)


def publish_adapter(recovered: TrainedAdapter, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write an adapter folder; returns its manifest."""
    manifest = {
        "kind": "adapter",
        "arm": recovered.config.arm,
        "trained_parameters": trained_parameters(recovered.adapter),
        "train_steps": len(recovered.rows),
        "train_seconds": recovered.seconds,
        "final_nats": recovered.rows[-1].nll if recovered.rows else None,
        **facts,
    }
    with artifacts.publish(target, manifest) as scratch:
        save_adapter(recovered.adapter, recovered.config, scratch)
        manifest["adapter_bytes"] = adapter_bytes(scratch)
    return manifest
