"""One arm of a recipe on one model: where it acts, what it is, and its training."""

import time
from collections.abc import Sequence

from mopcompress.errors import UsageError
from mopcompress.models.language_model import LanguageModel
from mopcompress.progress import Progress
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recipe.arms import NONE, TRAINED
from mopcompress.recover.adapter import AdapterConfig
from mopcompress.recover.checkpoint import UnfinishedTraining
from mopcompress.recover.distillation import Distillation
from mopcompress.recover.distributed import Workers
from mopcompress.recover.recovered import Recovered
from mopcompress.recover.registry import ARMS
from mopcompress.recover.standing import TrainRow
from mopcompress.recover.start import Material, Start
from mopcompress.recover.training import Training, fit


def train_arm(
    modifier: PromptRecoveryModifier,
    material: Material,
    base_sha256: str,
    *,
    seed: int,
    progress: Progress,
    distillation: Distillation | None = None,
    unfinished: UnfinishedTraining | None = None,
    workers: Workers | None = None,
) -> Recovered:
    """Begin and train one arm on cached states; go on with what `unfinished` kept.

    Raises `UsageError` when more experts are to act than there are.
    """
    start = time.perf_counter()
    config = adapter_config(modifier, material.model, material.tasks, base_sha256)
    if modifier.rate is None:
        progress(f"{modifier.arm} has a closed form: no steps, and no learning rate to give or to sweep", 0, 0)
    adapter = ARMS[modifier.arm].begin(config, material, start_of(modifier, seed))
    seconds, what = time.perf_counter() - start, f"training {modifier.arm}, seed {seed}"
    rows: list[TrainRow] = []
    if modifier.rate is not None:
        rows = fit(
            adapter,
            material.model,
            material.states,
            training_of(modifier, modifier.rate, seed),
            distillation=distillation,
            progress=lambda row: progress(what, row.step, row.steps),
            keeping=unfinished.at(modifier.rate, modifier.steps) if unfinished else None,
            workers=workers,
        )
    for group in adapter.learned().values():
        for parameter in group:
            parameter.requires_grad_(False)
    return Recovered(adapter, config, rows, seconds + sum(row.seconds for row in rows))


def start_of(modifier: PromptRecoveryModifier, seed: int) -> Start:
    """How the recipe's arm begins."""
    return Start(
        gate_pretraining_steps=modifier.gate_pretraining_steps,
        gate_temper=modifier.gate_temper,
        log_opening=modifier.log_opening,
        seed=seed,
    )


def training_of(modifier: PromptRecoveryModifier, learning_rate: float, seed: int) -> Training:
    """How the recipe's arm is trained."""
    return Training(
        steps=modifier.steps,
        batch_size=modifier.batch_size,
        learning_rate=learning_rate,
        gate_learning_rate=modifier.gate_learning_rate,
        warmup_fraction=modifier.warmup_fraction,
        clip_norm=modifier.clip_norm,
        clip_percentile=modifier.clip_percentile,
        gate_apart=modifier.gate_clipping == "apart",
        seed=seed,
        accumulate=modifier.accumulate,
    )


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


def tell_of_experts(modifiers: Sequence[PromptRecoveryModifier], tasks: tuple[str, ...], progress: Progress) -> None:
    """Say so where experts are not one a task: when the rows name none, or the recipe wants another number."""
    counted = [one for one in modifiers if "gate_labels" in TRAINED[one.arm].own or TRAINED[one.arm].needs_tasks]
    others = [one.experts for one in counted if one.experts not in (None, len(tasks)) and one.gate_labels == "tasks"]
    if others and tasks:
        progress(
            f"{others[0]} experts are not one for each of the {len(tasks)} tasks: k-means finds their domains in the "
            "states of the instructions",
            0,
            0,
        )
    found = [one for one in counted if one.experts is None]
    if found and not tasks:
        count = found[0].count_experts(tasks)
        progress(
            f"the rows name no tasks: {count} experts, whose domains k-means finds in the states of the instructions; "
            "--experts asks for another number, a column task for one a task",
            0,
            0,
        )


def first_layer(arm: str, layer: int | None, model: LanguageModel) -> int:
    """The first block that the arm changes: the paper's tenth of 32 layers, in proportion; 0 for arms at the input.

    Raises `UsageError` when the model has no such block.
    """
    blocks, settings = len(model.blocks), TRAINED.get(arm, NONE)
    alone = layer is None and blocks == 1  # there is no middle
    if settings.at_input or (settings.whole and (layer == 0 or alone)):
        return 0
    if blocks == 1:
        raise UsageError(f"arm {arm}: it acts above a first block, and the model has one in all; take one at the input")
    if layer is None:
        return max(1, round(10 / 32 * blocks))
    if not 0 < layer < blocks:
        raise UsageError(f"--layer: {layer} is not 1 to {blocks - 1}, and the model has {blocks} blocks")
    return layer
