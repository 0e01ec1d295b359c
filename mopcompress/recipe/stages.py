"""Stages of a recipe file: a `<name>_stage` map becomes checked modifiers, in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.gptq_modifier import GPTQModifier
from mopcompress.recipe.pruning_modifiers import (
    PRUNING_MODIFIERS,
    MagnitudePruningModifier,
    Pruning,
    StructuredPruningModifier,
)
from mopcompress.recipe.recovery_modifier import ConstantPruningModifier, PromptRecoveryModifier
from mopcompress.recipe.repair_modifier import LowRankRepairModifier, misplaced_repairs
from mopcompress.recipe.unsupported import other_modifier
from mopcompress.recipe.validation_errors import Fault, list_faults, nearest_name

MODIFIERS: dict[str, type[Spec]] = {
    kind.__name__: kind
    for kind in (
        *PRUNING_MODIFIERS,
        ConstantPruningModifier,
        GPTQModifier,
        LowRankRepairModifier,
        PromptRecoveryModifier,
    )
}
AT_ONCE = ("oneshot", "post_train")  # the second: llm-compressor 0.4


@dataclass(frozen=True)
class Group:
    """Modifiers of one `<name>_modifiers` map, in order."""

    name: str
    modifiers: tuple[Spec, ...]


@dataclass(frozen=True)
class Stage:
    """One `<name>_stage`."""

    name: str
    run_type: Literal["oneshot", "train"]
    groups: tuple[Group, ...]


def read_stage(name: str, content: Any, faults: list[Fault]) -> Stage:
    """Return a checked stage; its faults are added to `faults`."""
    if not isinstance(content, dict):
        faults.append(Fault((name,), "not a map with groups of modifiers", content))
        return Stage(name, "oneshot", ())
    groups = []
    for key, inside in content.items():
        if key == "modifiers" or key.endswith("_modifiers"):
            groups.append(_group(name, key, inside, faults))
        elif key in MODIFIERS:
            faults.append(Fault((name, key), "modifiers stand in a group; indent it under sparsity_modifiers:"))
        elif key not in {"run_type", "args"}:
            faults.append(Fault((name, key), "no such field", hint=nearest_name(key, ("run_type", "modifiers"))))
    trains = any(isinstance(modifier, PromptRecoveryModifier) for group in groups for modifier in group.modifiers)
    run_type = content.get("run_type") or ("train" if trains else "oneshot")
    if run_type not in (*AT_ONCE, "train"):
        hint = nearest_name(run_type, ("oneshot", "train"))
        faults.append(Fault((name, "run_type"), "not oneshot or train", run_type, hint))
    if not groups and not MODIFIERS.keys() & content.keys():
        faults.append(Fault((name,), "no modifiers; write <name>_modifiers: with at least one"))
    stage = Stage(name, "train" if run_type == "train" else "oneshot", tuple(groups))
    faults += _misplaced(stage, run_type)
    return stage


def check_order(stages: Sequence[Stage], faults: list[Fault]) -> None:
    """Add a fault for every modifier in a wrong place.

    Pruning comes before rounding, which it would undo, and a threshold for all layers before all else. Structured
    pruning is alone: it makes another model, which a second command may compress. A repair comes last, and a recipe has
    one recovery.
    """
    placed = [
        ((stage.name, group.name, type(modifier).__name__), modifier)
        for stage in stages
        for group in stage.groups
        for modifier in group.modifiers
        if isinstance(modifier, Pruning | GPTQModifier | LowRankRepairModifier)
    ]
    rounded = pruned = None
    for path, modifier in placed:
        if isinstance(modifier, StructuredPruningModifier) and len(placed) > 1:
            what = "makes a smaller model, and compresses it no further; leave it alone here, then compress its folder"
            faults.append(Fault(path, what))
        if rounded and isinstance(modifier, Pruning):
            what = f"would change weights that the GPTQModifier of {rounded} has rounded; put it before that"
            faults.append(Fault(path, what))
        if pruned and isinstance(modifier, MagnitudePruningModifier) and modifier.apply_globally:
            what = f"its threshold is that of the given weights, and {pruned} changes them; put it first"
            faults.append(Fault((*path, "apply_globally"), what))
        rounded = rounded or (path[0] if isinstance(modifier, GPTQModifier) else None)
        pruned = pruned or (path[0] if isinstance(modifier, Pruning) else None)
    faults += misplaced_repairs(placed)
    trained = [
        (stage.name, group.name, type(modifier).__name__)
        for stage in stages
        for group in stage.groups
        for modifier in group.modifiers
        if isinstance(modifier, PromptRecoveryModifier)
    ]
    faults += [Fault(path, f"{trained[0][0]} has one already, and a recipe has one recovery") for path in trained[1:]]


def unknown_key(name: str, content: Any) -> Fault:
    """Return the fault of a name at the top of a recipe that is neither a stage nor ours."""
    if isinstance(content, list) and name.endswith("modifiers"):
        return Fault(
            (name,),
            "a list of modifiers is the form of SparseML before 1.6; write <name>_stage: with <name>_modifiers:",
        )
    if name.endswith(("modifiers", "Modifier")):
        return Fault((name,), "stands outside a stage; indent it under <name>_stage:")
    return Fault(
        (name,), "neither run: nor a <name>_stage:", hint=nearest_name(name, ("run", f"{name.removesuffix('s')}_stage"))
    )


def _misplaced(stage: Stage, run_type: object) -> list[Fault]:
    found = []
    for group in stage.groups:
        for modifier in group.modifiers:
            path = (stage.name, group.name, type(modifier).__name__)
            if run_type == "train" and isinstance(modifier, Pruning | GPTQModifier | LowRankRepairModifier):
                advice = "compresses at once, never while training; put it in a stage with run_type: oneshot"
                found.append(Fault(path, advice))
            if run_type in AT_ONCE and isinstance(modifier, PromptRecoveryModifier):
                found.append(Fault(path, "trains; put it in a stage with run_type: train"))
    return found


def _group(stage: str, name: str, content: Any, faults: list[Fault]) -> Group:
    if not isinstance(content, dict) or not content:
        faults.append(Fault((stage, name), "not a map of modifiers", content))
        return Group(name, ())
    modifiers = []
    for word, fields in content.items():
        kind = MODIFIERS.get(word)
        if kind is None:
            faults.append(other_modifier((stage, name, word), (*MODIFIERS,)))
            continue
        try:
            modifiers.append(kind.model_validate({} if fields is None else fields))
        except ValidationError as error:
            faults += list_faults(error, kind, (stage, name, word))
    return Group(name, tuple(modifiers))
