"""The training of one adapter, with the sweep of its learning rate, for `recover` and for each cell of `bench`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mopcompress.entrypoints.from_recipe import adapter_config, adapter_init, first_layer, training_config
from mopcompress.entrypoints.inputs import SplitStates
from mopcompress.entrypoints.lr_sweep import describe_sweep, sweep_rate, write_sweep
from mopcompress.progress import Progress
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import AdapterInputs, DenseWeights, TrainedAdapter, TrainRow
from mopcompress.recover.checkpoint import CheckpointFolder
from mopcompress.recover.distillation import Distillation
from mopcompress.recover.distributed import Workers
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.training import fit
from mopcompress.results import Sweep, read_sweeps


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """All that the training of an adapter needs besides the settings of its arm."""

    states: SplitStates  # of the compressed model
    seed: int
    progress: Progress
    dense_weights: DenseWeights | None = None  # for arms with a closed form
    distillation: Distillation | None = None
    checkpoints: CheckpointFolder | None = None  # None: nothing is saved, as in all processes but the first
    workers: Workers = field(default_factory=Workers)


def train_with_sweep(
    modifier: PromptRecoveryModifier, setup: TrainingSetup, *, sweep_file: Path | None = None
) -> tuple[TrainedAdapter, Sweep | None]:
    """Train one arm, at the learning rate of a sweep when its settings ask for one; return the sweep too.

    The best trial of a sweep is the training itself when it is as long. A sweep in `sweep_file` is read instead of
    repeated; a new one is written there before the training starts.
    """
    if not modifier.sweeps:
        return train_adapter(modifier, setup), None
    trained = None
    sweep = read_sweeps(sweep_file.parent).get(sweep_file.stem) if sweep_file else None
    if sweep is None:
        model = setup.states.base.model
        with setup.workers.main_first():
            validation = setup.states.validation(first_layer(modifier.arm, modifier.layer, model))
        sweep, trained = sweep_rate(
            modifier,
            model,
            validation,
            partial(train_adapter, setup=setup),
            batch_size=setup.states.batch_size,
            folder=setup.checkpoints.folder if setup.checkpoints else None,
            workers=setup.workers,
        )
        setup.progress.message(describe_sweep(sweep))
        if sweep_file:
            write_sweep(sweep, sweep_file)
    return trained or train_adapter(modifier.at_rate(sweep.learning_rate), setup), sweep


def train_adapter(modifier: PromptRecoveryModifier, setup: TrainingSetup) -> TrainedAdapter:
    """Initialize and train one arm on cached states; an interrupted training is resumed from its checkpoint.

    Raises `UsageError` when more experts are to act than there are.
    """
    model, tasks, seed = setup.states.base.model, setup.states.dataset.tasks, setup.seed
    config = adapter_config(modifier, model, tasks, setup.states.base.sha256)
    inputs = AdapterInputs(model, setup.states.train(config.layer), tasks, setup.dense_weights)
    start = time.perf_counter()
    if modifier.rate is None:
        setup.progress.message(f"{modifier.arm} has a closed form: no steps, and no learning rate to give or to sweep")
    adapter = RECOVERY_METHODS[modifier.arm].initialize(config, inputs, adapter_init(modifier, seed))
    seconds, label = time.perf_counter() - start, f"training {modifier.arm}, seed {seed}"
    rows: list[TrainRow] = []
    if modifier.rate is not None:
        rows = fit(
            adapter,
            model,
            inputs.states,
            training_config(modifier, modifier.rate, seed),
            distillation=setup.distillation,
            progress=lambda row: setup.progress.update(label, row.step, row.steps),
            checkpoint=setup.checkpoints.for_run(modifier.rate, modifier.steps) if setup.checkpoints else None,
            workers=setup.workers,
        )
    for group in adapter.parameter_groups().values():
        for parameter in group:
            parameter.requires_grad_(False)
    return TrainedAdapter(adapter, config, rows, seconds + sum(row.seconds for row in rows))


def log_expert_count(modifiers: Sequence[PromptRecoveryModifier], tasks: tuple[str, ...], progress: Progress) -> None:
    """Report a number of experts other than one per task: the rows name no tasks, or the recipe asks for it."""
    with_experts = [modifier for modifier in modifiers if _has_experts(modifier.arm)]
    counts = [modifier.experts for modifier in with_experts if modifier.gate_labels == "tasks"]
    other_counts = [count for count in counts if count not in (None, len(tasks))]
    if other_counts and tasks:
        progress.message(
            f"{other_counts[0]} experts are not one for each of the {len(tasks)} tasks: k-means finds their domains in "
            "the states of the instructions"
        )
    unspecified = [modifier for modifier in with_experts if modifier.experts is None]
    if unspecified and not tasks:
        count = unspecified[0].count_experts(tasks)
        progress.message(
            f"the rows name no tasks: {count} experts, whose domains k-means finds in the states of the instructions; "
            "recovery.experts asks for another number, a column task for one per task"
        )


def _has_experts(arm: str) -> bool:
    defaults = ARM_DEFAULTS[arm]
    return "gate_labels" in defaults.relevant_fields or defaults.needs_tasks
