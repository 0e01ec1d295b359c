"""One arm of a recipe on one model: where it acts, what it is, and its training."""

import time
from collections.abc import Sequence

from mopcompress.entrypoints.from_recipe import adapter_config, adapter_init, training_config
from mopcompress.progress import Progress
from mopcompress.recipe import PromptRecoveryModifier
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recover.adapter import AdapterInputs, TrainedAdapter, TrainRow
from mopcompress.recover.checkpoint import CheckpointFolder
from mopcompress.recover.distillation import Distillation
from mopcompress.recover.distributed import Workers
from mopcompress.recover.registry import RECOVERY_METHODS
from mopcompress.recover.training import fit


def train_adapter(
    modifier: PromptRecoveryModifier,
    material: AdapterInputs,
    base_sha256: str,
    *,
    seed: int,
    progress: Progress,
    distillation: Distillation | None = None,
    checkpoints: CheckpointFolder | None = None,
    workers: Workers | None = None,
) -> TrainedAdapter:
    """Begin and train one arm on cached states; resume from `checkpoints`.

    Raises `UsageError` when more experts are to act than there are.
    """
    start = time.perf_counter()
    config = adapter_config(modifier, material.model, material.tasks, base_sha256)
    if modifier.rate is None:
        progress.message(f"{modifier.arm} has a closed form: no steps, and no learning rate to give or to sweep")
    adapter = RECOVERY_METHODS[modifier.arm].initialize(config, material, adapter_init(modifier, seed))
    seconds, what = time.perf_counter() - start, f"training {modifier.arm}, seed {seed}"
    rows: list[TrainRow] = []
    if modifier.rate is not None:
        rows = fit(
            adapter,
            material.model,
            material.states,
            training_config(modifier, modifier.rate, seed),
            distillation=distillation,
            progress=lambda row: progress.update(what, row.step, row.steps),
            checkpoint=checkpoints.for_run(modifier.rate, modifier.steps) if checkpoints else None,
            workers=workers,
        )
    for group in adapter.parameter_groups().values():
        for parameter in group:
            parameter.requires_grad_(False)
    return TrainedAdapter(adapter, config, rows, seconds + sum(row.seconds for row in rows))


def log_expert_count(modifiers: Sequence[PromptRecoveryModifier], tasks: tuple[str, ...], progress: Progress) -> None:
    """Say so where experts are not one a task: when the rows name none, or the recipe wants another number."""
    counted = [
        one for one in modifiers if "gate_labels" in ARM_DEFAULTS[one.arm].own or ARM_DEFAULTS[one.arm].needs_tasks
    ]
    others = [one.experts for one in counted if one.experts not in (None, len(tasks)) and one.gate_labels == "tasks"]
    if others and tasks:
        progress.message(
            f"{others[0]} experts are not one for each of the {len(tasks)} tasks: k-means finds their domains in the "
            "states of the instructions"
        )
    found = [one for one in counted if one.experts is None]
    if found and not tasks:
        count = found[0].count_experts(tasks)
        progress.message(
            f"the rows name no tasks: {count} experts, whose domains k-means finds in the states of the instructions; "
            "--experts asks for another number, a column task for one a task"
        )
