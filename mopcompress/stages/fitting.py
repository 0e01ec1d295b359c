"""Whether groups and N:M structures fit the linears that they go to: known from shapes alone, before any work."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mopcompress.errors import RecipeError
from mopcompress.models.weight_files import weight_files
from mopcompress.recipe import GPTQModifier
from mopcompress.recipe.modifiers import Pruning, StructuredPruningModifier
from mopcompress.targets import meant

# Files of these families name their weights as the network does; others' are looked at when the model is loaded.
SAME_NAMES = re.compile(
    r"(?:model\.layers|model\.decoder\.layers|transformer\.h|gpt_neox\.layers)\.[0-9]+\.(.+)\.weight"
)
GROUP_SIZES = (32, 64, 128)


def check_fit(inputs: Mapping[str, int], modifiers: Sequence[Pruning | GPTQModifier]) -> None:
    """`inputs` are the inputs of each linear of the blocks, by name.

    Raises `RecipeError` saying which linear does not fit, and what does.
    """
    for modifier in modifiers:
        if isinstance(modifier, StructuredPruningModifier):
            continue  # has neither
        ignored = {name for pattern in modifier.ignore for name in meant([*inputs], pattern)}
        aimed = {name for pattern in modifier.targets for name in meant([*inputs], pattern)}
        sizes = {name: size for name, size in inputs.items() if name in aimed - ignored}
        group = modifier.group_size if isinstance(modifier, GPTQModifier) else None
        if group and (found := _misfits(sizes, group)):
            fitting = [str(size) for size in GROUP_SIZES if not _misfits(sizes, size)]
            size = " or ".join(fitting) if fitting else "-1 (one scale for a whole row)"
            raise RecipeError(f"group_size {group} does not divide the {found}; choose {size}, or ignore those linears")
        if modifier.pattern and (found := _misfits(sizes, modifier.pattern[1])):
            structure = f"mask_structure {modifier.mask_structure}"
            raise RecipeError(f"{structure} does not divide the {found}; choose another, or ignore those linears")


def inputs_on_disk(folder: Path) -> dict[str, int]:
    """The inputs of the blocks' linears, from the headers of the weight files; those that can be told without loading.

    Mixtures of experts are left out: files hold experts one by one, networks may not.
    """
    try:
        transposed = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "gpt2"
        found = {}
        for path in weight_files(folder):
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    shape = file.get_slice(name).get_shape()
                    match = SAME_NAMES.fullmatch(name)
                    if match and len(shape) == 2 and "expert" not in name:
                        found[name.removesuffix(".weight")] = shape[0 if transposed else 1]
    except (OSError, ValueError, AttributeError, SafetensorError):
        return {}  # loading says what is wrong with the folder
    return found


def _misfits(sizes: Mapping[str, int], divisor: int) -> str:
    """Words for the linears whose inputs `divisor` does not divide; empty when it divides all."""
    wrong = [name for name, size in sizes.items() if size % divisor]
    if not wrong:
        return ""
    more = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{sizes[wrong[0]]} inputs of {wrong[0]}{more}"
