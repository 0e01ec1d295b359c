"""Initial contents of a bench's `run.json`: its inputs, and the comparison protocol in words."""

from collections.abc import Iterator, Sequence
from typing import Any

from mopcompress.data.dataset import EncodedDataset
from mopcompress.entrypoints.teacher import teacher_hash
from mopcompress.environment import now
from mopcompress.recipe import PromptRecoveryModifier, Recipe, recipe_to_dict


def new_manifest(
    recipe: Recipe, model: dict[str, Any], dataset: EncodedDataset, calibration: dict[str, Any]
) -> dict[str, Any]:
    """Return the manifest of a run that starts now, without machine and command."""
    return {
        "recipe": recipe_to_dict(recipe),
        "model": model,
        "data": dataset.facts,
        "calibration": calibration,
        "teacher": teacher_hash(recipe.recovery),
        "protocol": protocol(recipe, dataset.tasks),
        "started": now(),
        "finished": None,
        "seconds": None,
    }


def protocol(recipe: Recipe, tasks: Sequence[str]) -> list[str]:
    """Return what a reader of the results must know about the comparison of arms, one sentence per entry."""
    recovery, repair = recipe.recovery, recipe.repair
    labels = "clusters of the training instructions"
    if recovery.with_arm("mop").domains(tuple(tasks)):
        labels = "the training rows' task labels, which single does not see"
    return [
        "Every arm is scored on the same response tokens of the same test rows, each given the instruction alone and "
        "the response before it.",
        f"Trained arms share rows, their order, and steps ({recovery.steps} of {recovery.train_batch_size} rows). "
        "single begins with the prompts of mop, all in one group.",
        f"The gate of mop is pre-trained on {labels}; it reads instruction tokens alone. Trained parameters count the "
        "gate.",
        _rates(recovery),
        *_losses(recovery),
        *(
            ["Prompts of single and mop are deep; the budget of their rivals is that of a mop that is not."]
            if recovery.per_layer_prompts
            else []
        ),
        *(
            f"{arm} is computed from the dense model's weights and all training rows; it takes no steps."
            for arm in recipe.run.computed_arms
        ),
        "Embeddings and head are not compressed; sparsity is counted over the compressed linears of the blocks.",
        *([f"Every compressed model has a low-rank repair of rank {repair.rank} beside it."] if repair else []),
    ]


def _losses(recovery: PromptRecoveryModifier) -> Iterator[str]:
    teacher = "the dense model" if recovery.teacher is None else recovery.teacher
    if recovery.distill:
        yield (
            f"{recovery.distill:g} of every trained arm's loss follows the distributions of {teacher} at temperature "
            f"{recovery.distill_temperature:g}."
        )
    if recovery.squarehead:
        yield (
            f"A loss of weight {recovery.squarehead:g} draws the hidden states of every trained arm to those of "
            f"{teacher}."
        )


def _rates(recovery: PromptRecoveryModifier) -> str:
    if recovery.sweep:
        short = recovery.sweep_steps not in (None, recovery.steps)
        length = f"{recovery.sweep_steps} steps, fewer than the training has, " if short else "as many steps as all "
        return (
            "Each arm's learning rate was chosen for each setting on validation rows, never on test rows, among three "
            f"rates, and more past an edge that is best, trained for {length}with the first seed; "
            "run.json has them with their losses. The gate's rate was not swept."
        )
    if recovery.learning_rates:
        rates = ", ".join(f"{arm} {rate:g}" for arm, rate in recovery.learning_rates.items())
        return f"Learning rates are the recipe's ({rates}): they were not swept for this run."
    if recovery.learning_rate is not None:
        return f"All arms have one learning rate, the recipe's {recovery.learning_rate:g}: it was not swept."
    return "Each arm has the learning rate that is its own by default: it was not swept for this run."
