"""`--set KEY=VALUE`: one field of a recipe, given on the command line.

A key is `part.field`, such as `recovery.top_k`; a value is YAML, checked as it would be in a recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from pydantic import ValidationError

from mopcompress.errors import UsageError
from mopcompress.recipe.field_types import Spec
from mopcompress.recipe.gptq_modifier import GPTQModifier
from mopcompress.recipe.pruning_modifiers import PRUNING_MODIFIERS
from mopcompress.recipe.recovery_modifier import PromptRecoveryModifier
from mopcompress.recipe.repair_modifier import LowRankRepairModifier
from mopcompress.recipe.run_spec import RunSpec
from mopcompress.recipe.validation_errors import (
    Fault,
    dotted_path,
    field_name,
    join_lines,
    list_faults,
    nearest_name,
    own_fields,
    short_repr,
)
from mopcompress.recipe.yaml_loader import read_value

Kind = TypeVar("Kind", bound=Spec)
Fields = Mapping[str, object]  # by the names that the user typed
Settings = Mapping[str, Fields]  # by part

NO_SETTINGS: Settings = MappingProxyType({})
PARTS: dict[str, tuple[type[Spec], ...]] = {
    "run": (RunSpec,),
    "recovery": (PromptRecoveryModifier,),
    "pruning": PRUNING_MODIFIERS,
    "quantization": (GPTQModifier,),
    "repair": (LowRankRepairModifier,),
}


def parse_settings(words: Sequence[str], parts: Sequence[str]) -> Settings:
    """Return the values of `part.field=value` words by part and field; a command uses `parts` of a recipe.

    Raises `UsageError` for a word without a key or a value, and for a field that is given twice.
    """
    settings: dict[str, dict[str, object]] = {}
    for word in words:
        key, sign, text = word.partition("=")
        part, _, field = key.strip().partition(".")
        if not sign:
            raise UsageError(f"--set {short_repr(word)}: no value; write --set {key or 'KEY'}=VALUE")
        if part not in parts or not field:
            raise _unknown_key(key.strip(), parts)
        fields = settings.setdefault(part, {})
        if _present(part, field) in {_present(part, name) for name in fields}:
            raise UsageError(f"--set {part}.{field}: given twice; give it once")
        try:
            fields[field] = read_value(text)
        except ValueError as error:
            raise UsageError(f"--set {part}.{field}: {short_repr(text)} is not a YAML value ({error})") from error
    return settings


def replace_fields(
    kind: type[Kind],
    present: Fields,
    flags: Fields,
    settings: Fields,
    part: str,
    flag_names: Mapping[str, str] = MappingProxyType({}),
) -> Kind:
    """Return `present` with other values, checked; a flag that is None was not given.

    `flag_names` has the flags that are not called as their fields. Raises `UsageError` naming the flag or the setting
    of each impossible value, and for a field that both give.
    """
    given = {name: flag for name, flag in flags.items() if flag is not None}
    check_given_once(kind, given, settings, part, flag_names)
    changes = {**given, **settings}
    replaced = {field_name(kind, name) for name in changes}
    try:
        return kind.model_validate({name: old for name, old in present.items() if name not in replaced} | changes)
    except ValidationError as error:
        raise UsageError(
            join_lines(_described(fault, given, settings, part, flag_names) for fault in list_faults(error, kind))
        ) from error


def check_given_once(
    kind: type[Spec],
    flags: Fields,
    settings: Fields,
    part: str,
    flag_names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raise `UsageError` when a flag and a setting give the same field of `kind`."""
    by_field = {field_name(kind, name): name for name in settings}
    for name, flag in flags.items():
        twin = by_field.get(field_name(kind, name))
        if flag is not None and twin is not None:
            shown = flag_names.get(name, name).replace("_", "-")
            raise UsageError(f"--{shown}: given twice, by --set {part}.{twin} too; give it once")


def check_fields_exist(kinds: Sequence[type[Spec]], fields: Fields, part: str) -> None:
    """Raise `UsageError` for a field that none of these kinds of modifiers has."""
    for name in fields:
        if not any(fields_of(kind, {name: None}) for kind in kinds):
            names = [known for kind in kinds for known in own_fields(kind)]
            raise UsageError(Fault((name,), "no such field", hint=nearest_name(name, names)).in_setting(part))


def fields_of(kind: type[Spec], fields: Fields) -> Fields:
    """Return the part of `fields` that modifier class `kind` defines, stored names included."""
    return {name: setting for name, setting in fields.items() if field_name(kind, name) in kind.model_fields}


def _described(fault: Fault, flags: Fields, settings: Fields, part: str, flag_names: Mapping[str, str]) -> str:
    """Name the flag or the setting that a fault came from; one that came from neither is of what was changed."""
    if not flags or (fault.path and fault.path[0] in settings):
        return fault.in_setting(part)
    field = next((name for name in reversed(fault.path) if name in flags or name in flag_names), next(iter(flags)))
    return replace(fault, path=(flag_names.get(str(field), field),)).in_flags()


def _present(part: str, field: str) -> str:
    """Return the field's present name in whichever kind of modifier has it."""
    return next((name for kind in PARTS[part] if (name := field_name(kind, field)) != field), field)


def _unknown_key(key: str, parts: Sequence[str]) -> UsageError:
    part, _, field = key.partition(".")
    keys = " or ".join(f"{name}.FIELD" for name in parts)
    if part in PARTS and field:
        return UsageError(f"--set {dotted_path((key,))}: has no effect here; a key is {keys}")
    if field:
        hint = nearest_name(part, parts)
        hint = repr(f"{hint[1:-1]}.{field}") if hint else None
    else:
        named = [f"{name}.{known}" for name in parts for kind in PARTS[name] for known in own_fields(kind)]
        ends = [name for name in named if name.rpartition(".")[2] in {_present(name, part) for name in parts}]
        hint = repr(ends[0]) if ends else nearest_name(part, named)
    return UsageError(f"--set {dotted_path((key,))}: a key is {keys}{f'; did you mean {hint}?' if hint else ''}")
