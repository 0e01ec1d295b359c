"""The grid of a bench by name: setting x arm x seed, from the `run:` part of a recipe.

The command that fills a grid and the report that counts what is missing both read it here, so they cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mopcompress.errors import RecipeError, UsageError
from mopcompress.recipe import GPTQModifier, Recipe
from mopcompress.recipe.arms import ARM_DEFAULTS
from mopcompress.recipe.pruning_modifiers import Pruning
from mopcompress.results import Cell, setting_name

QUANTIZER = "gptq"


@dataclass(frozen=True)
class CompressionSetting:
    """One way to compress; `method` joins pruning and quantization with a plus when it is both."""

    method: str
    ratio: float | None  # fraction of weights to remove
    bits: int | None

    @property
    def name(self) -> str:
        """The name that rows and reports use."""
        return setting_name(self.method, self.ratio, self.bits)

    @property
    def pruning(self) -> str | None:
        """The method that removes weights."""
        return None if self.ratio is None else self.method.partition("+")[0]


DENSE = CompressionSetting("dense", 0.0, None)


def compressed_settings(run: Mapping[str, Any]) -> list[CompressionSetting]:
    """Return the settings method by method, ratio by ratio, and then those of the bit widths.

    In a joint run, every bit width is applied to every pruned model instead.
    """
    pruned = [
        CompressionSetting(method, ratio, None)
        for method in run.get("methods") or ()
        for ratio in filter(None, run.get("ratios") or ())
    ]
    widths = list(run.get("bits") or ())
    if run.get("joint") and pruned and widths:
        return [
            CompressionSetting(f"{setting.method}+{QUANTIZER}", setting.ratio, bits)
            for setting in pruned
            for bits in widths
        ]
    return pruned + [CompressionSetting(QUANTIZER, None, bits) for bits in widths]


def is_seeded(arm: str) -> bool:
    """Return True when a seed makes a difference to an arm: it takes training steps, or its name is unknown."""
    return arm != "none" and (arm not in ARM_DEFAULTS or ARM_DEFAULTS[arm].learning_rate is not None)


def cells_of(run: Mapping[str, Any], setting: CompressionSetting) -> list[Cell]:
    """Return the cells of a setting: one per arm and seed, and one with seed 0 for an arm without randomness.

    The dense model has arms of its own, and `none` in any case.
    """
    named = ("none", *(run.get("dense_arms") or ())) if setting == DENSE else run.get("arms") or ()
    arms = tuple(dict.fromkeys(named))
    fixed = [arm for arm in arms if not is_seeded(arm)]
    seeded = [Cell(setting.name, arm, seed) for seed in run.get("seeds") or () for arm in arms if arm not in fixed]
    return [Cell(setting.name, arm, 0) for arm in fixed] + seeded


def settings_of(recipe: Recipe) -> list[CompressionSetting]:
    """Return the dense model's setting, and then those of the run's grid.

    Raises `RecipeError` when methods and settings do not go together, `UsageError` when the grid is empty.
    """
    if recipe.run.prune_then_quantize and recipe.run.bits and "structured" in recipe.run.methods:
        raise RecipeError(
            "run.prune_then_quantize: structured pruning is measured alone; leave it or the method structured out"
        )
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
    compressed = compressed_settings(recipe.run.model_dump(by_alias=True))
    if not compressed:
        raise UsageError("the grid is empty: nothing would be compressed; give --ratios or --bits")
    return [DENSE, *compressed]


def modifiers_of(recipe: Recipe, setting: CompressionSetting) -> list[Pruning | GPTQModifier]:
    """Return the modifiers that compress the model of a setting, in order; none for the dense model."""
    modifiers: list[Pruning | GPTQModifier] = []
    if setting != DENSE and setting.pruning and setting.ratio is not None:
        pruning = recipe.modifier_for(setting.pruning)
        assert not isinstance(pruning, GPTQModifier)  # no `method` of a run
        modifiers.append(pruning.with_sparsity(setting.ratio))
    if setting.bits:
        quantizer = recipe.modifier_for(QUANTIZER)
        assert isinstance(quantizer, GPTQModifier)
        modifiers.append(quantizer.with_bits(setting.bits, recipe.run.group_size))
    return modifiers
