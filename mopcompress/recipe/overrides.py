"""The recipe of one command, from a file, its flags and its `--set` values.

A flag that is None was not given; `settings` are the fields of `--set`, by part of the recipe. All functions raise
`UsageError` naming the flag or setting whose value is impossible.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mopcompress.errors import RecipeError, UsageError
from mopcompress.recipe.arms import arms_using
from mopcompress.recipe.compression_overrides import Compressing, prune_with, repair_with, round_with
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.gptq_modifier import GPTQModifier
from mopcompress.recipe.pruning_modifiers import Pruning, replace_checked
from mopcompress.recipe.recipe import DEFAULT_STAGES, DEFAULTS, Recipe, recipe_from_dict, recipe_to_dict
from mopcompress.recipe.recovery_modifier import PromptRecoveryModifier
from mopcompress.recipe.repair_modifier import LowRankRepairModifier
from mopcompress.recipe.run_spec import NO_FIELDS, OURS, PRUNING_METHODS
from mopcompress.recipe.settings import (
    NO_SETTINGS,
    Fields,
    Settings,
    replace_fields,
)
from mopcompress.recipe.stages import Group, Stage
from mopcompress.recipe.validation_errors import Fault, field_name, nearest_name

GRID_FIELDS: dict[str, dict[str, str]] = {  # what a bench sets itself: field -> what sets it
    "pruning": dict.fromkeys(("sparsity", "final_sparsity", "mlp_sparsity"), "--ratios"),
    "quantization": dict.fromkeys(("scheme", "config_groups"), "--bits and --set run.group_size"),
    "recovery": {"arm": "--arms"},
}
DEPENDENT_FIELDS = {  # fields without effect unless one of others is set
    "teacher": ("distill", "squarehead"),
    "distill_temperature": ("distill",),
    "sweep_steps": ("sweep",),
}


def pruning_recipe(
    recipe: Recipe,
    *,
    method: str | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    repair_rank: int | None = None,
    settings: Settings = NO_SETTINGS,
) -> Recipe:
    """Return the recipe's pruning modifiers alone, in order; `method` picks one (ALPS without a recipe).

    The recipe's repair belongs to them unless the recipe rounds too: then `quantization_recipe` has it.
    Raises `RecipeError` when the recipe compresses, but not by pruning.
    """
    if method is not None and method not in PRUNING_METHODS:
        names = ", ".join(PRUNING_METHODS)
        raise UsageError(
            Fault(("method",), f"not one of {names}", method, nearest_name(method, PRUNING_METHODS)).in_flags()
        )
    modifiers: list[Compressing] = [
        modifier for modifier in compressing_modifiers(recipe) if isinstance(modifier, Pruning)
    ]
    if method is not None:
        modifiers = [recipe.modifier_for(method)]
    elif recipe.stages is DEFAULT_STAGES:  # no recipe was given, and a bench's default is SparseGPT, as the paper's
        modifiers = [_default(recipe, "alps")]
    elif not modifiers:
        _refuse_if_it_compresses(recipe, "pruning modifier, such as SparseGPTModifier")
        modifiers = [_default(recipe, "alps")]
    modifiers = prune_with(modifiers, settings, sparsity, pattern)
    repair = None if recipe.modifiers(GPTQModifier) else recipe.repair
    return _oneshot(recipe, modifiers, repair_with(recipe, repair, modifiers, settings, repair_rank))


def quantization_recipe(
    recipe: Recipe,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    repair_rank: int | None = None,
    settings: Settings = NO_SETTINGS,
) -> Recipe:
    """Return the recipe's compressing modifiers, in order; 4 bits in groups of 64 without any.

    The flags go into the GPTQ modifiers; `group_size` -1 is one scale per row. Raises `RecipeError` when the recipe
    compresses, but without GPTQ.
    """
    modifiers = compressing_modifiers(recipe)
    if not recipe.modifiers(GPTQModifier):
        _refuse_if_it_compresses(recipe, "GPTQModifier")
        modifiers = [_default(recipe, "gptq")]
    modifiers = round_with(prune_with(modifiers, settings), settings, bits, group_size)
    return _oneshot(recipe, modifiers, repair_with(recipe, recipe.repair, modifiers, settings, repair_rank))


def bench_recipe(recipe: Recipe, flags: Fields = NO_FIELDS, settings: Settings = NO_SETTINGS) -> Recipe:
    """Return the whole recipe; `flags` are fields of its recovery, and settings go into every part that they name."""
    _refuse_grid_fields(settings)
    return override_recovery(_override_compression(recipe, settings), flags, settings.get("recovery", NO_FIELDS))


def recovery_recipe(recipe: Recipe, flags: Fields, settings: Fields = NO_FIELDS) -> Recipe:
    """Return `recipe` with its recovery stage alone, with `flags` and `settings` applied.

    Raises `UsageError` for a field that has no effect on its arm.
    """
    modifier = _recovery_with(recipe, flags, settings)
    shown = {name: f"--{name.replace('_', '-')}" for name in flags} | {
        name: f"--set recovery.{name}" for name in settings
    }
    for typed, given in {**flags, **settings}.items():
        name = field_name(PromptRecoveryModifier, typed)
        if given is None or given == PromptRecoveryModifier.model_fields[name].default:
            continue
        arms = arms_using(name)
        if modifier.arm not in arms:
            raise UsageError(
                f"{shown[typed]}: has no effect on {modifier.arm}, only on {', '.join(arms)}; leave it out"
            )
        needed = DEPENDENT_FIELDS.get(name, ()) if modifier.rate is not None else ()
        if needed and not any(getattr(modifier, other) for other in needed):
            others = " or ".join(needed)
            raise UsageError(f"{shown[typed]}: has no effect without {others}; set one, or leave it out")
    return replace(recipe, stages=(_recovery_stage(modifier),))


def override_recovery(recipe: Recipe, flags: Fields, settings: Fields = NO_FIELDS) -> Recipe:
    """Return the whole recipe with other fields in its prompt recovery; the same recipe when none is given.

    A field that no arm of the grid uses is accepted: the grid may grow, and then its settings must be the same.
    """
    if not settings and all(flag is None for flag in flags.values()):
        return recipe
    others = [stage for stage in _stages_without(recipe, PromptRecoveryModifier) if stage.name != "recovery_stage"]
    return replace(recipe, stages=(*others, _recovery_stage(_recovery_with(recipe, flags, settings))))


def compressing_modifiers(recipe: Recipe) -> list[Compressing]:
    """Return the modifiers that prune or round, in order."""
    return [modifier for modifier in recipe.modifiers(Spec) if isinstance(modifier, Compressing)]


def _override_compression(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with other fields in the modifiers that a bench takes for its grid, default ones among them."""
    fields = {part: settings.get(part, NO_FIELDS) for part in ("pruning", "quantization", "repair")}
    if not any(fields.values()):
        return recipe
    modifiers = compressing_modifiers(recipe)
    methods = [
        *recipe.run.methods * bool(fields["pruning"]),
        *["gptq"] * bool(fields["quantization"] and recipe.run.bits),
    ]
    absent = [method for method in methods if method not in {modifier.method for modifier in modifiers}]
    modifiers = sorted(
        [*modifiers, *map(recipe.modifier_for, absent)], key=lambda modifier: isinstance(modifier, GPTQModifier)
    )
    modifiers = round_with(prune_with(modifiers, settings), settings)
    compression = _oneshot(recipe, modifiers, repair_with(recipe, recipe.repair, modifiers, settings))
    others = _stages_without(recipe, Compressing, LowRankRepairModifier)
    changed = replace(recipe, stages=(*compression.stages, *others))
    recipe_from_dict(recipe_to_dict(changed), "the recipe with --set")  # a report or a resumed run reads it again
    return changed


def _refuse_grid_fields(settings: Settings) -> None:
    """Raise `UsageError` for what the grid sets in each of its cells."""
    for part, sources in GRID_FIELDS.items():
        for name in settings.get(part, NO_FIELDS):
            if name in sources:
                raise UsageError(f"--set {part}.{name}: a bench takes it from its grid; give {sources[name]} instead")


def _default(recipe: Recipe, method: str) -> Compressing:
    """Return our best, or what every library has: SparseGPT for ALPS, and none that matches the dense model."""
    if recipe.run.backend == OURS:
        return DEFAULTS[method]
    return replace_checked(DEFAULTS["sparsegpt" if method == "alps" else method], match_dense=0.0)


def _oneshot(recipe: Recipe, modifiers: Sequence[Spec], repair: LowRankRepairModifier | None) -> Recipe:
    """Return the recipe with these modifiers alone, a stage each: a group cannot hold two modifiers of one name."""
    stages = [
        Stage(f"compression_{number}_stage", "oneshot", (Group("compression_modifiers", (modifier,)),))
        for number, modifier in enumerate([*modifiers, *([repair] if repair else [])], start=1)
    ]
    return replace(recipe, stages=tuple(stages))


def _recovery_with(recipe: Recipe, flags: Fields, settings: Fields) -> PromptRecoveryModifier:
    """Return the recovery with these values; a rate for all arms replaces those that the recipe gives to some."""
    present = recipe.recovery.model_dump()
    if flags.get("learning_rate") is not None or settings.get("learning_rate") is not None:
        present["learning_rates"] = {}
    return replace_fields(PromptRecoveryModifier, present, flags, settings, "recovery")


def _recovery_stage(modifier: PromptRecoveryModifier) -> Stage:
    return Stage("recovery_stage", "train", (Group("recovery_modifiers", (modifier,)),))


def _stages_without(recipe: Recipe, *kinds: Any) -> list[Stage]:
    """Return the stages without modifiers of these kinds; what is empty then is left out."""
    stages = []
    for stage in recipe.stages:
        groups = [
            Group(group.name, tuple(modifier for modifier in group.modifiers if not isinstance(modifier, kinds)))
            for group in stage.groups
        ]
        stages.append(replace(stage, groups=tuple(group for group in groups if group.modifiers)))
    return [stage for stage in stages if stage.groups]


def _refuse_if_it_compresses(recipe: Recipe, wanted: str) -> None:
    """Raise `RecipeError` for a recipe that compresses otherwise; one without modifiers gets the default one."""
    compressing = compressing_modifiers(recipe)
    if compressing and recipe.stages != DEFAULT_STAGES:
        names = ", ".join(type(modifier).__name__ for modifier in compressing)
        raise RecipeError(f"the recipe has {names}, but no {wanted}; add one, or leave --recipe out")
