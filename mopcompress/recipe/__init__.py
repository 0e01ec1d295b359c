"""Recipes: what to do, as checked data. Nothing here loads torch."""

from mopcompress.recipe.gptq import GPTQModifier
from mopcompress.recipe.grammar import Recipe, dump_recipe, load_recipe, recipe_of, resolved
from mopcompress.recipe.modifiers import (
    ALPSModifier,
    MagnitudePruningModifier,
    SparseGPTModifier,
    StructuredPruningModifier,
    WandaPruningModifier,
)
from mopcompress.recipe.repair import LowRankRepairModifier
from mopcompress.recipe.run import RunSpec
from mopcompress.recipe.stage import Group, Stage
from mopcompress.recipe.training import ConstantPruningModifier, PromptRecoveryModifier

__all__ = [
    "ALPSModifier",
    "ConstantPruningModifier",
    "GPTQModifier",
    "Group",
    "LowRankRepairModifier",
    "MagnitudePruningModifier",
    "PromptRecoveryModifier",
    "Recipe",
    "RunSpec",
    "SparseGPTModifier",
    "Stage",
    "StructuredPruningModifier",
    "WandaPruningModifier",
    "dump_recipe",
    "load_recipe",
    "recipe_of",
    "resolved",
]
