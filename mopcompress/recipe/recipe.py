"""A recipe: stages of modifier groups, in the grammar of SparseML and llm-compressor, and our `run:`.

sparsity_stage:                   # any <name>_stage
  run_type: oneshot               # or train
  sparsity_modifiers:             # any <name>_modifiers; a stage may have several groups
    SparseGPTModifier:            # in order
      sparsity: 0.5
run:
  ratios: [0.5, 0.85, 0.95]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from mopcompress.errors import RecipeError
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.gptq_modifier import GPTQModifier
from mopcompress.recipe.pruning_modifiers import PRUNING_MODIFIERS, Pruning
from mopcompress.recipe.recovery_modifier import PromptRecoveryModifier
from mopcompress.recipe.repair_modifier import LowRankRepairModifier
from mopcompress.recipe.run_spec import RunSpec, check_flags
from mopcompress.recipe.stages import MODIFIERS, Group, Stage, check_order, read_stage, unknown_key
from mopcompress.recipe.validation_errors import Fault, field_name, join_lines, list_faults
from mopcompress.recipe.yaml_loader import PlainDumper, read_document

FOREIGN = ("args", "metadata", "version")  # of other tools, at the top: they change nothing here
NO_FLAGS: Mapping[str, object] = MappingProxyType({})

Kind = TypeVar("Kind", bound=Spec)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    stages: tuple[Stage, ...]
    run: RunSpec

    def modifiers(self, *kinds: type[Kind]) -> tuple[Kind, ...]:
        """Return the modifiers of these kinds, in the order of the recipe; `Spec` is every kind."""
        modifiers = (modifier for stage in self.stages for group in stage.groups for modifier in group.modifiers)
        return tuple(modifier for modifier in modifiers if isinstance(modifier, kinds))

    def modifier_for(self, method: str) -> Pruning | GPTQModifier:
        """Return the recipe's first modifier of this method, else one with our defaults."""
        modifiers = (modifier for modifier in self.modifiers(Spec) if isinstance(modifier, Pruning | GPTQModifier))
        return next((modifier for modifier in modifiers if modifier.method == method), DEFAULTS[method])

    @property
    def repair(self) -> LowRankRepairModifier | None:
        """The recipe's low-rank repair of what it compresses, if it has one."""
        return next(iter(self.modifiers(LowRankRepairModifier)), None)

    @property
    def recovery(self) -> PromptRecoveryModifier:
        """The recipe's first prompt recovery, else the default one."""
        return next(iter(self.modifiers(PromptRecoveryModifier)), PromptRecoveryModifier())


DEFAULTS: dict[str, Pruning | GPTQModifier] = {
    **{kind.method: kind.model_validate({kind.share_field: kind.default_share}) for kind in PRUNING_MODIFIERS},
    "gptq": GPTQModifier.model_validate({"scheme": "W4A16", "match_dense": 1.0}).with_bits(4, 64),
}
DEFAULT_STAGES = (
    Stage("sparsity_stage", "oneshot", (Group("sparsity_modifiers", (DEFAULTS["sparsegpt"],)),)),
    Stage("recovery_stage", "train", (Group("recovery_modifiers", (PromptRecoveryModifier(),)),)),
)


def load_recipe(
    path: Path | None, flags: Mapping[str, object] = NO_FLAGS, settings: Mapping[str, object] = NO_FLAGS
) -> Recipe:
    """Read a recipe and check all of it, before anything slow happens.

    A grid that neither `run:` nor `flags` nor `settings` gives is what the recipe's own modifiers ask for.

    Args:
        path: A YAML, JSON or Markdown file; None is the default recipe, `recipes/default.yaml`.
        flags: Fields of `run:` (see `RunSpec`) that win over the file, as a command line gives them: text is read as
            the number or the list that belongs there, and None means not given.
        settings: Fields of `run:` that win over the file, as `--set` gives them: of the type that a recipe has, so that
            None is a value.

    Returns:
        The recipe: checked, frozen, and with every default filled in.

    Raises:
        InputNotFoundError: The file cannot be read.
        RecipeError: The file is no recipe, or a field of it is wrong. All faults are named, one line each.
        UsageError: A flag or a setting is wrong, or both give the same field. All faults are named, one line each.

    Example:
        >>> from mopcompress import load_recipe
        >>> recipe = load_recipe(None, {"ratios": "0.5,0.85", "device": "cpu"})
        >>> recipe.run.ratios
        (0.5, 0.85)
        >>> recipe.recovery.arm
        'mop'
    """
    if path is None:
        return Recipe(DEFAULT_STAGES, RunSpec.model_validate(check_flags(flags, settings)))
    return recipe_from_dict(read_document(path), str(path), flags, settings)


def recipe_from_dict(
    document: Mapping[str, Any],
    name_of_file: str,
    flags: Mapping[str, object] = NO_FLAGS,
    settings: Mapping[str, object] = NO_FLAGS,
) -> Recipe:
    """Check a recipe that a file holds or `recipe_to_dict` gave; fields that are missing get their defaults."""
    faults: list[Fault] = []
    stages, run = [], {}
    for name, content in document.items():
        if name == "run":
            run = _checked_run(content, faults)
        elif name.endswith("_stage"):
            stages.append(read_stage(name, content, faults))
        elif name not in FOREIGN:
            faults.append(unknown_key(name, content))
    check_order(stages, faults)
    if faults:
        raise RecipeError(join_lines(fault.in_recipe(name_of_file) for fault in faults))
    recipe = Recipe(tuple(stages), RunSpec())
    return Recipe(recipe.stages, RunSpec.model_validate(check_flags(flags, settings, _own_grid(recipe) | run)))


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML of plain scalars, maps and lists, which `load_recipe` reads to an equal recipe."""
    return yaml.dump(recipe_to_dict(recipe), Dumper=PlainDumper, sort_keys=False)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with every default written out, under stored names, as data that JSON can hold."""
    stages: dict[str, Any] = {}
    for stage in recipe.stages:
        groups = {
            group.name: {
                type(modifier).__name__: modifier.model_dump(mode="json", by_alias=True) for modifier in group.modifiers
            }
            for group in stage.groups
        }
        stages[stage.name] = {"run_type": stage.run_type, **groups}
    return stages | {"run": recipe.run.model_dump(mode="json", by_alias=True)}


def with_present_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored recipe, or a tree that holds its parts, with the present names of fields: for messages."""
    document = dict(stored)
    for name, content in stored.items():
        if name == "run" and isinstance(content, dict):
            document[name] = _renamed(RunSpec, content)
        elif name.endswith("_stage") and isinstance(content, dict):
            document[name] = {
                key: {word: _renamed(MODIFIERS.get(word), fields) for word, fields in group.items()}
                if isinstance(group, dict)
                else group
                for key, group in content.items()
            }
    return document


def _renamed(kind: type[Spec] | None, fields: Any) -> Any:
    if kind is None or not isinstance(fields, dict):
        return fields
    return {field_name(kind, name): value for name, value in fields.items()}


def _own_grid(recipe: Recipe) -> dict[str, Any]:
    """Return methods, ratios, bits and group size that the stages name; nothing when they do not compress.

    Pruning and rounding in one recipe are measured together. Of several pruning modifiers each is a setting of its own.
    """
    pruning = [modifier for modifier in recipe.modifiers(Spec) if isinstance(modifier, Pruning)]
    shares = [modifier.sparsity for modifier in pruning]
    rounding = recipe.modifiers(GPTQModifier)
    if not pruning and not rounding:
        return {}
    grid: dict[str, Any] = {
        "methods": tuple(dict.fromkeys(modifier.method for modifier in pruning)),
        "ratios": tuple(dict.fromkeys(share for share in shares if isinstance(share, float) and share)),
        "bits": tuple(dict.fromkeys(modifier.bits for modifier in rounding)),
        "prune_then_quantize": bool(pruning and rounding),
    }
    return grid | ({"group_size": rounding[0].group_size} if rounding else {})


def _checked_run(content: Any, faults: list[Fault]) -> dict[str, Any]:
    if not isinstance(content, dict):
        faults.append(Fault(("run",), "not a map of settings", content))
        return {}
    try:
        run = RunSpec.model_validate(content)
    except ValidationError as error:
        faults += list_faults(error, RunSpec, ("run",))
        return {}
    return {name: getattr(run, name) for name in run.model_fields_set}
