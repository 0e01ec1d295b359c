"""`recover`: a compressed folder and data in, a small adapter folder out."""

import functools
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from mopcompress import artifact
from mopcompress.errors import UsageError
from mopcompress.models.checkpoint import check_output, load_model, resolve_model, weights_hash
from mopcompress.models.language_model import LanguageModel
from mopcompress.recipe import PromptRecoveryModifier, Recipe, resolved
from mopcompress.recipe.arms import NONE, TRAINED
from mopcompress.recover.adapter import AdapterConfig, trained_parameters
from mopcompress.recover.arms import ARMS
from mopcompress.recover.distillation import Distillation
from mopcompress.recover.folder import adapter_bytes, save_adapter
from mopcompress.recover.recovered import Recovered
from mopcompress.recover.standing import Keeping, TrainRow
from mopcompress.recover.start import DenseWeights, Material, Start
from mopcompress.recover.train import Training, fit
from mopcompress.recover.workers import Workers, joined
from mopcompress.stages.documents import load_documents
from mopcompress.stages.kept_states import config_digest, digest, kept
from mopcompress.stages.progress import Progress, silent
from mopcompress.stages.provenance import choose_device, provenance
from mopcompress.stages.sweep import check_validation, sweep_rate, told
from mopcompress.stages.teacher import dense_weights, named_teacher, taught_by
from mopcompress.stages.unfinished_training import unfinished_training
from mopcompress.states import CachedStates

TRAINING = torch.float16  # of states that nothing is scored on


def recover(recipe: Recipe, target: Path, *, seed: int, progress: Progress = silent) -> dict[str, Any]:
    """Train the recipe's recovery on its model, publish the adapter as `target`, and return the manifest."""
    base = resolve_model(recipe.run.model, progress=lambda line: progress(line, 0, 0))
    check_output(target, base)
    device, size = choose_device(recipe.run.device), recipe.run.batch_size
    with joined(device) as workers:
        tell = progress if workers.first else silent
        model = load_model(base, device=device)
        documents = load_documents(recipe.run, model.tokenizer)
        layer, sha256 = first_layer(recipe.recovery.arm, recipe.recovery.layer, model), weights_hash(base)
        modifier, sweep, recovered = recipe.recovery, None, None
        teacher, dense = named_teacher(modifier), dense_weights(modifier, base, model)
        if modifier.sweeps:
            check_validation(len(documents.validation), recipe.run.data)
        with workers.first_alone():
            states = cache_states(model, sha256, documents.train, layer, size, "training rows", tell, dtype=TRAINING)
        taught = None if dense else taught_by(modifier, base, model, documents.train, size, tell)
        train = functools.partial(train_arm, model, states, documents.tasks, dense=dense)
        if modifier.sweeps:
            with workers.first_alone():
                validation = cache_states(model, sha256, documents.validation, layer, size, "validation rows", tell)

            def tried(one: PromptRecoveryModifier) -> Recovered:
                return train(one, sha256, seed, tell, taught, workers=workers)

            sweep, recovered = sweep_rate(modifier, model, validation, tried, batch_size=size)
            tell(told(sweep), 0, 0)
            modifier = modifier.at_rate(sweep.learning_rate)
        facts = {
            "learning_rate": modifier.rate,
            "sweep": asdict(sweep) if sweep else None,
            "base": {"folder": str(base), "sha256": sha256},
            "teacher": teacher,
            "data": documents.facts,
            "recipe": resolved(recipe),
            "seed": seed,
            "processes": workers.count,
            **provenance(model.device),
        }
        with _kept(target, facts, tell) if workers.first else nullcontext() as keeping:
            if recovered is None:
                recovered = train(modifier, sha256, seed, tell, taught, keeping=keeping, workers=workers)
            return publish_adapter(recovered, target, facts) if workers.first else facts


def _kept(target: Path, facts: dict[str, Any], progress: Progress) -> AbstractContextManager[Keeping]:
    """The training so far that is to become `target`, if it was of the same model, data, settings and machine."""
    recipe = facts["recipe"]
    run = {name: setting for name, setting in recipe["run"].items() if name not in ("model", "output_dir")}
    same = ("data", "teacher", "seed", "learning_rate", "processes", "versions", "commit", "device", "threads")
    job = {name: facts[name] for name in same} | {"model": facts["base"]["sha256"], "recipe": recipe | {"run": run}}
    return unfinished_training(target, job, lambda line: progress(line, 0, 0))


def train_arm(
    model: LanguageModel,
    states: CachedStates,
    tasks: tuple[str, ...],
    modifier: PromptRecoveryModifier,
    base_sha256: str,
    seed: int,
    progress: Progress,
    distillation: Distillation | None = None,
    *,
    dense: DenseWeights | None = None,
    keeping: Keeping | None = None,
    workers: Workers | None = None,
) -> Recovered:
    """Begin and train one arm on cached states; go on with what `keeping` kept. `dense` is for arms that repair.

    Raises `UsageError` when more experts are to act than there are.
    """
    start = time.perf_counter()
    config = adapter_config(modifier, model, tasks, base_sha256)
    if modifier.rate is None:
        progress(f"{modifier.arm} has a closed form: no steps, and no learning rate to give or to sweep", 0, 0)
    adapter = ARMS[modifier.arm].begin(
        config,
        Material(model, states, tasks, dense),
        Start(
            gate_pretraining_steps=modifier.gate_pretraining_steps,
            gate_temper=modifier.gate_temper,
            log_opening=modifier.log_opening,
            seed=seed,
        ),
    )
    what = f"training {modifier.arm}, seed {seed}"
    rows: list[TrainRow] = []
    if modifier.rate is not None:
        training = Training(
            steps=modifier.steps,
            batch_size=modifier.batch_size,
            learning_rate=modifier.rate,
            gate_learning_rate=modifier.gate_learning_rate,
            warmup_fraction=modifier.warmup_fraction,
            clip_norm=modifier.clip_norm,
            seed=seed,
            accumulate=modifier.accumulate,
        )
        rows = fit(
            adapter,
            model,
            states,
            training,
            distillation=distillation,
            progress=lambda row: progress(what, row.step, row.steps),
            keeping=keeping,
            workers=workers,
        )
    for group in adapter.learned().values():
        for parameter in group:
            parameter.requires_grad_(False)
    return Recovered(adapter, config, rows, time.perf_counter() - start)


def adapter_config(
    modifier: PromptRecoveryModifier, model: LanguageModel, tasks: tuple[str, ...], base_sha256: str
) -> AdapterConfig:
    """What the recipe asks for, on this model and data.

    Raises `UsageError` when the model has no such block, or when more experts are to act than there are.
    """
    return AdapterConfig(
        arm=modifier.arm,
        experts=modifier.count_experts(tasks),
        prompts_per_expert=modifier.prompts_per_expert,
        layer=first_layer(modifier.arm, modifier.layer, model),
        hidden_size=model.hidden_size,
        base_sha256=base_sha256,
        tasks=modifier.domains(tasks),
        gate_reading=modifier.gate_reading,
        shared_expert=modifier.shared_expert,
        top_k=modifier.top_k,
        deep=modifier.deep,
        rank=modifier.rank,
        targets=modifier.adapter_targets,
    )


def publish_adapter(recovered: Recovered, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write an adapter folder; returns its manifest."""
    manifest = {
        "kind": "adapter",
        "arm": recovered.config.arm,
        "trained_parameters": trained_parameters(recovered.adapter),
        "train_steps": len(recovered.rows),
        "train_seconds": recovered.seconds,
        "final_nats": recovered.rows[-1].nats if recovered.rows else None,
        **facts,
    }
    with artifact.publish(target, manifest) as scratch:
        save_adapter(recovered.adapter, recovered.config, scratch)
        manifest["adapter_bytes"] = adapter_bytes(scratch)
    return manifest


def first_layer(arm: str, layer: int | None, model: LanguageModel) -> int:
    """The first block that the arm changes: the paper's tenth of 32 layers, in proportion; 0 for arms at the input.

    Raises `UsageError` when the model has no such block.
    """
    blocks, settings = len(model.blocks), TRAINED.get(arm, NONE)
    if settings.at_input or (settings.whole and layer == 0):
        return 0
    if layer is None:
        return max(1, round(10 / 32 * blocks))
    if not 0 < layer < blocks:
        raise UsageError(f"--layer: {layer} is not 1 to {blocks - 1}, and the model has {blocks} blocks")
    return layer


def cache_states(
    model: LanguageModel,
    base_sha256: str,
    documents: tuple[Any, ...],
    layer: int,
    batch_size: int,
    which: str,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
) -> CachedStates:
    """The states that enter `layer` for every document: those kept from another run, or computed and kept."""
    what = f"lower blocks, once for all arms: {which}"
    facts = {
        "kind": "states that enter a block",
        "model": base_sha256,
        "config": config_digest(model.network.config),
        "layer": layer,
        "documents": digest(documents),
        "dtype": str(dtype).removeprefix("torch."),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with torch.inference_mode():
        return CachedStates(
            model,
            documents,
            layer,
            batch_size=batch_size,
            progress=lambda done: progress(what, done, len(documents)),
            store=functools.partial(kept, facts=facts, dtype=dtype),
        )
