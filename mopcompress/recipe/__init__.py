"""Recipes: what to do, as checked data. Nothing here loads torch."""

from mopcompress.recipe.gptq_modifier import GPTQModifier
from mopcompress.recipe.pruning_modifiers import (
    ALPSModifier,
    MagnitudePruningModifier,
    SparseGPTModifier,
    StructuredPruningModifier,
    WandaPruningModifier,
)
from mopcompress.recipe.recipe import Recipe, dump_recipe, load_recipe, recipe_from_dict, recipe_to_dict
from mopcompress.recipe.recovery_modifier import PromptRecoveryModifier
from mopcompress.recipe.repair_modifier import LowRankRepairModifier
from mopcompress.recipe.run_spec import RunSpec

__all__ = [
    "ALPSModifier",
    "GPTQModifier",
    "LowRankRepairModifier",
    "MagnitudePruningModifier",
    "PromptRecoveryModifier",
    "Recipe",
    "RunSpec",
    "SparseGPTModifier",
    "StructuredPruningModifier",
    "WandaPruningModifier",
    "dump_recipe",
    "load_recipe",
    "recipe_from_dict",
    "recipe_to_dict",
]
