"""The grid of a bench: setting x arm x seed. No torch: a plan can be told before it loads."""

from dataclasses import dataclass

from mopcompress.errors import RecipeError
from mopcompress.recipe import GPTQModifier, Recipe
from mopcompress.recipe.modifiers import Pruning
from mopcompress.results import setting_name


@dataclass(frozen=True)
class Setting:
    """One compressed model of the grid; no modifier is the dense model."""

    method: str
    ratio: float | None
    bits: int | None
    modifier: Pruning | GPTQModifier | None

    @property
    def name(self) -> str:
        """As in the rows and the report."""
        return setting_name(self.method, self.ratio, self.bits)

    @property
    def folder(self) -> str:
        """The name as a file name."""
        return self.name.replace(" ", "-").removesuffix("%")


@dataclass(frozen=True)
class Cell:
    """One row to be."""

    setting: str
    arm: str
    seed: int


def settings_of(recipe: Recipe) -> list[Setting]:
    """Dense first, then method by method, ratio by ratio, then bit widths.

    Raises `RecipeError` when a modifier has no one share of weights to remove.
    """
    run = recipe.run
    settings = [Setting("dense", 0.0, None, None)]
    for method in run.methods:
        pruning = recipe.modifier_for(method)
        assert not isinstance(pruning, GPTQModifier)  # no `method` of a run
        if isinstance(pruning.sparsity, tuple):
            raise RecipeError(
                f"{type(pruning).__name__}.sparsity: a bench compares shares of the whole model, found a list; "
                "write one number, or prune and evaluate that model alone"
            )
        settings += [Setting(method, ratio, None, pruning.with_sparsity(ratio)) for ratio in run.ratios]
    for bits in run.bits:
        quantising = recipe.modifier_for("gptq")
        assert isinstance(quantising, GPTQModifier)
        settings.append(Setting("gptq", None, bits, quantising.with_bits(bits, run.group_size)))
    return settings


def cells_of(recipe: Recipe, setting: Setting) -> list[Cell]:
    """`none` does not depend on the seed, and stands under 0; the dense model is scored without prompts only."""
    cells = [Cell(setting.name, "none", 0)] if setting.modifier is None or "none" in recipe.run.arms else []
    if setting.modifier is not None:
        cells += [
            Cell(setting.name, arm, seed) for seed in recipe.run.seeds for arm in recipe.run.arms if arm != "none"
        ]
    return cells
