"""Flags and `--set` values over pruning, quantization and repair modifiers.

A flag that is None was not given. All functions raise `UsageError` naming the flag or setting whose value is
impossible.
"""

from collections.abc import Sequence

from mopcompress.errors import UsageError
from mopcompress.recipe.field_types import parse_structure
from mopcompress.recipe.gptq_modifier import GPTQModifier
from mopcompress.recipe.pruning_modifiers import Pruning, StructuredPruningModifier
from mopcompress.recipe.recipe import Recipe
from mopcompress.recipe.repair_modifier import LowRankRepairModifier
from mopcompress.recipe.run_spec import NO_FIELDS, OURS
from mopcompress.recipe.settings import (
    Fields,
    Settings,
    check_fields_exist,
    fields_of,
    replace_fields,
)

Compressing = Pruning | GPTQModifier

PRUNE_FLAGS = {"final_sparsity": "sparsity", "mlp_sparsity": "sparsity", "mask_structure": "pattern"}
QUANTIZE_FLAGS = {"num_bits": "bits", "group_size": "group_size"}
REPAIR_FLAGS = {"rank": "repair_rank"}  # recovery has a `--rank` of its own


def prune_with(
    modifiers: Sequence[Compressing], settings: Settings, sparsity: float | None = None, pattern: str | None = None
) -> list[Compressing]:
    """Return the modifiers in order, pruning ones with these values; a setting goes into all that have its field."""
    fields = settings.get("pruning", NO_FIELDS)
    kinds = [type(modifier) for modifier in modifiers if isinstance(modifier, Pruning)]
    if fields and not kinds:
        raise UsageError(f"--set pruning.{next(iter(fields))}: nothing is pruned here; leave it out")
    check_fields_exist(kinds, fields, "pruning")
    return [
        _pruned(modifier, fields_of(type(modifier), fields), sparsity, pattern)
        if isinstance(modifier, Pruning)
        else modifier
        for modifier in modifiers
    ]


def _pruned(modifier: Pruning, fields: Fields, sparsity: float | None, pattern: str | None) -> Pruning:
    if isinstance(modifier, StructuredPruningModifier) and pattern is not None:
        raise UsageError(f"--pattern: {pattern!r} is of single weights, and structured removes whole channels")
    flags: dict[str, object] = {modifier.share_field: sparsity}
    if not isinstance(modifier, StructuredPruningModifier):
        flags["mask_structure"] = pattern
        structure = parse_structure(str(fields.get("mask_structure", pattern)))
        if structure and sparsity is None and modifier.share_field not in fields:
            flags[modifier.share_field] = structure[0] / structure[1]
    return replace_fields(type(modifier), modifier.model_dump(), flags, fields, "pruning", PRUNE_FLAGS)


def round_with(
    modifiers: Sequence[Compressing], settings: Settings, bits: int | None = None, group_size: int | None = None
) -> list[Compressing]:
    """Return the modifiers in order, those that round with these values."""
    fields = settings.get("quantization", NO_FIELDS)
    if fields and not any(isinstance(modifier, GPTQModifier) for modifier in modifiers):
        raise UsageError(f"--set quantization.{next(iter(fields))}: nothing is rounded here; leave it out")
    return [
        _rounded(modifier, fields, bits, group_size) if isinstance(modifier, GPTQModifier) else modifier
        for modifier in modifiers
    ]


def _rounded(modifier: GPTQModifier, fields: Fields, bits: int | None, group_size: int | None) -> GPTQModifier:
    present, flags = modifier.model_dump(), {}
    if bits is not None or group_size is not None:
        size = modifier.group_size if group_size is None else group_size
        whole_row = size in {None, -1}
        weights = {
            "num_bits": modifier.bits if bits is None else bits,
            "group_size": None if whole_row else size,
            "strategy": "channel" if whole_row else "group",
        }
        flags = {"config_groups": {"group_0": {"targets": modifier.targets, "weights": weights}}}
    if "scheme" in fields:  # it spells out the groups
        if flags:
            raise UsageError("--set quantization.scheme: says what --bits and --group-size say; leave it or them out")
        present = {name: old for name, old in present.items() if name != "config_groups"} | {
            "targets": modifier.targets
        }
    return replace_fields(GPTQModifier, present, flags, fields, "quantization", QUANTIZE_FLAGS)


def repair_with(
    recipe: Recipe,
    repair: LowRankRepairModifier | None,
    modifiers: Sequence[Compressing],
    settings: Settings,
    rank: int | None = None,
) -> LowRankRepairModifier | None:
    fields = settings.get("repair", NO_FIELDS)
    if fields or rank is not None:
        present = repair.model_dump() if repair else {}
        repair = replace_fields(LowRankRepairModifier, present, {"rank": rank}, fields, "repair", REPAIR_FLAGS)
    if repair:
        cause = f"--set repair.{next(iter(fields))}" if fields else "--repair-rank"
        if any(isinstance(modifier, StructuredPruningModifier) for modifier in modifiers):
            raise UsageError(f"{cause}: structured refits what it keeps, and makes no repair; use another --method")
        if recipe.run.backend != OURS:
            raise UsageError(f"{cause}: {recipe.run.backend} makes no repair; leave it or --backend out")
    return repair
