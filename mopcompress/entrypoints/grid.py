"""What each setting of a bench runs. No torch: a plan can be told before it loads."""

from mopcompress.errors import RecipeError, UsageError
from mopcompress.grid import DENSE, Setting, compressed_settings
from mopcompress.recipe import GPTQModifier, Recipe
from mopcompress.recipe.pruning_modifiers import Pruning


def settings_of(recipe: Recipe) -> list[Setting]:
    """The dense model, then what the run's grid asks for.

    Raises `RecipeError` when a modifier has no one share of weights to remove, `UsageError` when the grid is empty.
    """
    if recipe.run.joint and recipe.run.bits and "structured" in recipe.run.methods:
        raise RecipeError("run.joint: structured pruning is measured alone; leave joint or the method structured out")
    if recipe.repair and "structured" in recipe.run.methods:
        raise RecipeError("LowRankRepairModifier: structured pruning makes no repair; leave one of them out")
    if recipe.run.computed_arms and "structured" in recipe.run.methods:
        raise RecipeError(
            f"run.arms: {recipe.run.computed_arms[0]} compares with the dense model's linears, and structured pruning "
            "makes narrower ones; leave one of them out"
        )
    for method in recipe.run.methods:
        modifier = recipe.modifier_for(method)
        if isinstance(modifier, Pruning) and isinstance(modifier.sparsity, tuple):
            raise RecipeError(
                f"{type(modifier).__name__}.sparsity: a bench compares shares of the whole model, found a list; "
                "write one number, or prune and evaluate that model alone"
            )
    compressed = compressed_settings(recipe.run.model_dump())
    if not compressed:
        raise UsageError("the grid is empty: nothing would be compressed; give --ratios or --bits")
    return [DENSE, *compressed]


def modifiers_of(recipe: Recipe, setting: Setting) -> list[Pruning | GPTQModifier]:
    """What compresses the model of a setting, in order; nothing for the dense model."""
    found: list[Pruning | GPTQModifier] = []
    if setting != DENSE and setting.pruning and setting.ratio is not None:
        pruning = recipe.modifier_for(setting.pruning)
        assert not isinstance(pruning, GPTQModifier)  # no `method` of a run
        found.append(pruning.with_sparsity(setting.ratio))
    if setting.bits:
        rounding = recipe.modifier_for("gptq")
        assert isinstance(rounding, GPTQModifier)
        found.append(rounding.with_bits(setting.bits, recipe.run.group_size))
    return found
