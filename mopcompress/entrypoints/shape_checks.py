"""Checks that groups, N:M structures and ranks fit the shapes of their linears, before any work."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mopcompress.errors import DataError, RecipeError
from mopcompress.models.families import NETWORK_NAMES, TRANSPOSED
from mopcompress.models.targets import matching_names
from mopcompress.models.weight_files import REPAIR, weight_files
from mopcompress.recipe import GPTQModifier, LowRankRepairModifier
from mopcompress.recipe.pruning_modifiers import Pruning, StructuredPruningModifier

GROUP_SIZES = (32, 64, 128)

Shapes = Mapping[str, tuple[int, int]]  # (out, in) of each linear of the blocks, by name


def check_shapes(
    shapes: Shapes, modifiers: Sequence[Pruning | GPTQModifier], repair: LowRankRepairModifier | None = None
) -> None:
    """Raise `RecipeError`, with what would fit, when a group, a structure or a rank does not fit a linear."""
    compressed: set[str] = set()
    for modifier in modifiers:
        if isinstance(modifier, StructuredPruningModifier):
            continue  # has neither
        targets = _select_targets(shapes, modifier.targets, modifier.ignore)
        compressed |= targets
        sizes = {name: size for name, (_, size) in shapes.items() if name in targets}
        group = modifier.group_size if isinstance(modifier, GPTQModifier) else None
        if group and (misfits := _describe_misfits(sizes, group)):
            fitting = [str(size) for size in GROUP_SIZES if not _describe_misfits(sizes, size)]
            size = " or ".join(fitting) if fitting else "-1 (one scale for a whole row)"
            raise RecipeError(
                f"group_size {group} does not divide the {misfits}; choose {size}, or ignore those linears"
            )
        if modifier.pattern and (misfits := _describe_misfits(sizes, modifier.pattern[1])):
            structure = f"mask_structure {modifier.mask_structure}"
            raise RecipeError(f"{structure} does not divide the {misfits}; choose another, or ignore those linears")
    if repair:
        targets = _select_targets(shapes, repair.targets, repair.ignore) & compressed
        sides = {name: min(shape) for name, shape in shapes.items() if name in targets}
        least = min(sides, key=lambda name: sides[name], default=None)
        if least and sides[least] < repair.rank:
            raise RecipeError(
                f"rank {repair.rank} is more than the {sides[least]} of {least}, whose shape is {shapes[least]}; "
                "choose a smaller one, or ignore such linears"
            )


def check_not_repaired(folder: Path) -> None:
    """Raise `DataError` for a model with a repair, which fits its weights only as they are."""
    if (folder / REPAIR).exists():
        raise DataError(
            f"model {folder} has a low-rank repair ({REPAIR}) of its weights as they are; compress the model that it "
            "was made of, in one recipe with the repair last"
        )


def shapes_on_disk(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the shapes of the blocks' linears, as far as the headers of the weight files have them.

    Mixtures of experts are left out: files hold experts one by one, networks may not.
    """
    try:
        transposed = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") in TRANSPOSED
        shapes: dict[str, tuple[int, int]] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    shape = file.get_slice(name).get_shape()
                    match = NETWORK_NAMES.fullmatch(name)
                    if match and len(shape) == 2 and "expert" not in name:
                        rows, columns = reversed(shape) if transposed else shape
                        shapes[name.removesuffix(".weight")] = (rows, columns)
    except (OSError, ValueError, AttributeError, SafetensorError):
        return {}  # loading says what is wrong with the folder
    return shapes


def _select_targets(shapes: Shapes, targets: Sequence[str], ignore: Sequence[str]) -> set[str]:
    names = [*shapes]
    ignored = {name for pattern in ignore for name in matching_names(names, pattern)}
    return {name for pattern in targets for name in matching_names(names, pattern)} - ignored


def _describe_misfits(sizes: Mapping[str, int], divisor: int) -> str:
    """Name the linears whose number of inputs is no multiple of `divisor`; "" when there are none."""
    wrong = [name for name, size in sizes.items() if size % divisor]
    if not wrong:
        return ""
    more = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{sizes[wrong[0]]} inputs of {wrong[0]}{more}"
