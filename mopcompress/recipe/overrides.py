"""What one command takes from a recipe: the modifiers that it runs, with its flags put in.

A flag that is None was not given. All functions raise `UsageError` naming a flag whose value is impossible.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import ValidationError

from mopcompress.errors import RecipeError, UsageError
from mopcompress.recipe.arms import arms_using
from mopcompress.recipe.field_types import Spec, parse_structure
from mopcompress.recipe.gptq_modifier import GPTQModifier
from mopcompress.recipe.pruning_modifiers import Pruning, StructuredPruningModifier, replace_checked
from mopcompress.recipe.recipe import DEFAULT_STAGES, DEFAULTS, Recipe
from mopcompress.recipe.recovery_modifier import PromptRecoveryModifier
from mopcompress.recipe.repair_modifier import LowRankRepairModifier
from mopcompress.recipe.run_spec import OURS, PRUNING_METHODS
from mopcompress.recipe.stages import Group, Stage
from mopcompress.recipe.validation_errors import Fault, faults_of, lines, nearest

Kind = TypeVar("Kind", bound=Spec)

FLAG_OF = {  # fields that have another name on the command line
    "final_sparsity": "sparsity",
    "mlp_sparsity": "sparsity",
    "mask_structure": "pattern",
    "num_bits": "bits",
    "train_batch_size": "rows_per_step",
}
NEEDS = {  # fields that say nothing unless one of others is set
    "teacher": ("distill", "squarehead"),
    "distill_temperature": ("distill",),
    "sweep_steps": ("sweep",),
}
REPAIR_FLAG_OF = {"rank": "repair_rank"}  # recovery has a `--rank` of its own


def pruning_recipe(
    recipe: Recipe,
    *,
    method: str | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    head_sparsity: float | None = None,
    repair_rank: int | None = None,
) -> Recipe:
    """The recipe's pruning modifiers alone, in order; `method` picks one (ALPS without a recipe), flags go into each.

    The recipe's repair belongs to them unless it rounds, too: then it is of both, and `quantization_recipe` has it.

    Raises `RecipeError` when the recipe compresses, but not by pruning.
    """
    if method is not None and method not in PRUNING_METHODS:
        known = ", ".join(PRUNING_METHODS)
        raise UsageError(Fault(("method",), f"not one of {known}", method, nearest(method, PRUNING_METHODS)).in_flags())
    chosen: Sequence[Spec] = [one for one in recipe.modifiers(Spec) if isinstance(one, Pruning)]
    if method is not None:
        chosen = [recipe.modifier_for(method)]
    elif recipe.stages is DEFAULT_STAGES:  # no recipe was given, and a bench's default is SparseGPT, as the paper's
        chosen = [_default(recipe, "alps")]
    elif not chosen:
        _refuse_if_it_compresses(recipe, "pruning modifier, such as SparseGPTModifier")
        chosen = [_default(recipe, "alps")]
    pruning = [one for one in chosen if isinstance(one, Pruning)]
    given = [_pruned(one, sparsity, pattern, head_sparsity) for one in pruning]
    return _oneshot(recipe, given, None if recipe.modifiers(GPTQModifier) else recipe.repair, repair_rank)


def quantization_recipe(
    recipe: Recipe, *, bits: int | None = None, group_size: int | None = None, repair_rank: int | None = None
) -> Recipe:
    """The recipe's compressing modifiers, in order, the flags in its GPTQ ones; 4 bits in groups of 64 without any.

    `group_size` -1 is one scale for a whole row. Raises `RecipeError` when the recipe compresses, but without GPTQ.
    """
    if not recipe.modifiers(GPTQModifier):
        _refuse_if_it_compresses(recipe, "GPTQModifier")
        chosen: Sequence[Pruning | GPTQModifier] = [_default(recipe, "gptq")]
    else:
        chosen = [one for one in recipe.modifiers(Spec) if isinstance(one, Pruning | GPTQModifier)]
    return _oneshot(recipe, [_quantized(one, bits, group_size) for one in chosen], recipe.repair, repair_rank)


def recovery_recipe(recipe: Recipe, flags: Mapping[str, object]) -> Recipe:
    """The recipe's prompt recovery alone; `flags` are fields of `PromptRecoveryModifier`.

    A flag that would change nothing is refused, too.
    """
    modifier = _recovery_with(recipe, flags)
    for name, given in flags.items():
        heard = arms_using(name)
        idle = given is None or given == PromptRecoveryModifier.model_fields[name].default
        flag = FLAG_OF.get(name, name).replace("_", "-")
        if not idle and modifier.arm not in heard:
            raise UsageError(f"--{flag}: says nothing to {modifier.arm}, only to {', '.join(heard)}; leave it out")
        needed = NEEDS.get(name, ()) if modifier.rate is not None else ()
        if not idle and needed and not any(getattr(modifier, other) for other in needed):
            others = " or ".join(f"--{other.replace('_', '-')}" for other in needed)
            raise UsageError(f"--{flag}: says nothing without {others}; add one, or leave it out")
    return replace(recipe, stages=(_recovery_stage(modifier),))


def override_recovery(recipe: Recipe, flags: Mapping[str, object]) -> Recipe:
    """The whole recipe with these fields in its prompt recovery; the same recipe when no flag was given.

    A flag that no arm of the grid hears is not refused: the grid may grow, and then its settings must be the same.
    """
    if all(flag is None for flag in flags.values()):
        return recipe
    kept = []
    for stage in recipe.stages:
        groups = [
            Group(group.name, tuple(one for one in group.modifiers if not isinstance(one, PromptRecoveryModifier)))
            for group in stage.groups
        ]
        kept.append(replace(stage, groups=tuple(group for group in groups if group.modifiers)))
    others = [stage for stage in kept if stage.groups and stage.name != "recovery_stage"]
    return replace(recipe, stages=(*others, _recovery_stage(_recovery_with(recipe, flags))))


def _default(recipe: Recipe, method: str) -> Pruning | GPTQModifier:
    """Our best, or what every library has: SparseGPT for ALPS, and none that matches the dense model."""
    if recipe.run.backend == OURS:
        return DEFAULTS[method]
    known = DEFAULTS["sparsegpt" if method == "alps" else method]
    return replace_checked(known, match_dense=0.0)


def _pruned(modifier: Pruning, sparsity: float | None, pattern: str | None, head_sparsity: float | None) -> Pruning:
    if isinstance(modifier, StructuredPruningModifier):
        if pattern is not None:
            raise UsageError(f"--pattern: {pattern!r} is of single weights, and structured removes whole channels")
        return _with(modifier, {"mlp_sparsity": sparsity, "head_sparsity": head_sparsity})
    if head_sparsity is not None:
        raise UsageError(f"--head-sparsity: {modifier.method} removes no heads; use --method structured")
    structure = parse_structure(pattern) if pattern else None
    share = structure[0] / structure[1] if structure and sparsity is None else sparsity
    return _with(modifier, {"mask_structure": pattern, modifier.share_field: share})


def _quantized(modifier: Pruning | GPTQModifier, bits: int | None, group_size: int | None) -> Spec:
    if not isinstance(modifier, GPTQModifier) or (bits is None and group_size is None):
        return modifier
    size = modifier.group_size if group_size is None else group_size
    whole_row = size in {None, -1}
    weights = {
        "num_bits": modifier.bits if bits is None else bits,
        "group_size": None if whole_row else size,
        "strategy": "channel" if whole_row else "group",
    }
    return _with(modifier, {"config_groups": {"group_0": {"targets": modifier.targets, "weights": weights}}})


def _with(modifier: Kind, changes: Mapping[str, object], flag_of: Mapping[str, str] = FLAG_OF) -> Kind:
    """A checked copy whose faults are told as faults of flags."""
    kind = type(modifier)
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return kind.model_validate(modifier.model_dump() | given)
    except ValidationError as error:
        faults = [replace(found, path=(_flag(found, flag_of),)) for found in faults_of(error, kind)]
        raise UsageError(lines(found.in_flags() for found in faults)) from error


def _flag(found: Fault, flag_of: Mapping[str, str]) -> str:
    field = str(found.path[-1])
    return flag_of.get(field, field)


def _oneshot(
    recipe: Recipe, modifiers: Sequence[Spec], repair: LowRankRepairModifier | None, rank: int | None
) -> Recipe:
    if rank is not None:
        repair = _with(repair or LowRankRepairModifier(rank=1), {"rank": rank}, REPAIR_FLAG_OF)
    if repair:
        _check_repairable(recipe, modifiers)
        modifiers = [*modifiers, repair]
    # a stage each: a group cannot hold two modifiers of one name
    stages = [
        Stage(f"compression_{number}_stage", "oneshot", (Group("compression_modifiers", (one,)),))
        for number, one in enumerate(modifiers, start=1)
    ]
    return replace(recipe, stages=tuple(stages))


def _check_repairable(recipe: Recipe, modifiers: Sequence[Spec]) -> None:
    if any(isinstance(one, StructuredPruningModifier) for one in modifiers):
        raise UsageError("--repair-rank: structured refits what it keeps, and makes no repair; use another --method")
    if recipe.run.backend != OURS:
        raise UsageError(f"--repair-rank: {recipe.run.backend} makes no repair; leave it or --backend out")


def _recovery_with(recipe: Recipe, flags: Mapping[str, object]) -> PromptRecoveryModifier:
    """A rate for all arms takes the place of those that the recipe gives to some."""
    rates: dict[str, object] = {} if flags.get("learning_rate") is None else {"learning_rates": {}}
    return _with(recipe.recovery, {**rates, **flags})


def _recovery_stage(modifier: PromptRecoveryModifier) -> Stage:
    return Stage("recovery_stage", "train", (Group("recovery_modifiers", (modifier,)),))


def _refuse_if_it_compresses(recipe: Recipe, wanted: str) -> None:
    """A recipe that only says where to run gets the default modifier; one that compresses otherwise is a mistake."""
    compressing = [one for one in recipe.modifiers(Spec) if isinstance(one, Pruning | GPTQModifier)]
    if compressing and recipe.stages != DEFAULT_STAGES:
        names = ", ".join(type(one).__name__ for one in compressing)
        raise RecipeError(f"the recipe has {names}, but no {wanted}; add one, or leave --recipe out")
