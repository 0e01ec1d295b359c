"""Linears of a model by their role, from a block up."""

import re
from collections.abc import Sequence

from mopcompress.errors import DataError
from mopcompress.models.families import ATTENTION_READERS, MLP_READERS, WRITERS
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear
from mopcompress.models.targets import ALL, matching_names


def linears_from_layer(model: LanguageModel, layer: int, targets: Sequence[str]) -> dict[str, Linear]:
    """Return the linears of the blocks from `layer` up that match a target, by dotted name.

    A target is the end of a dotted name, as in PEFT (`q_proj`), a pattern `re:...`, or `Linear` for all. Raises
    `DataError` for a target that matches no linear.
    """
    prefix = model.blocks_prefix()
    linears = {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(model.blocks)
        if index >= layer
        for name, module in block.named_modules()
        if isinstance(module, Linear)
    }
    selected: set[str] = set()
    for target in targets:
        matches = matching_names(list(linears), _pattern(target))
        if not matches:
            names = dict.fromkeys(name.removeprefix(f"{prefix}.").partition(".")[2] for name in linears)
            raise DataError(
                f"adapter_targets: no linear of the blocks of {type(model.network).__name__} is {target!r}; there are "
                f"{', '.join(names)}: name some of them"
            )
        selected |= set(matches)
    return {name: linear for name, linear in linears.items() if name in selected}


def writers_from_layer(model: LanguageModel, layer: int) -> dict[str, Linear]:
    """Return the linears of the blocks from `layer` up that write to the residual stream.

    Raises `DataError` for families whose writers have unknown names.
    """
    linears = linears_from_layer(model, layer, ("Linear",))
    writers = {name: linear for name, linear in linears.items() if name.rpartition(".")[2] in WRITERS}
    if not writers:
        raise DataError(
            f"the blocks of {type(model.network).__name__} have no linear called {', '.join(sorted(WRITERS))}; "
            "use another arm"
        )
    return writers


def attention_readers_from_layer(model: LanguageModel, layer: int) -> dict[str, Linear]:
    """Return the linears of the blocks from `layer` up that make queries, keys and values.

    Empty for families in which they have unknown names.
    """
    linears = linears_from_layer(model, layer, ("Linear",))
    return {name: linear for name, linear in linears.items() if name.rpartition(".")[2] in ATTENTION_READERS}


def mlp_readers_from_layer(model: LanguageModel, layer: int) -> dict[str, Linear]:
    """Return the linears of the blocks from `layer` up that read the neurons of an MLP.

    Blocks in which that is no linear, such as stacked experts, have none.
    """
    ends = tuple(f".{target}" for targets in MLP_READERS for target in targets)
    return {
        name: linear for name, linear in linears_from_layer(model, layer, ("Linear",)).items() if name.endswith(ends)
    }


def first_present(model: LanguageModel, choices: Sequence[Sequence[str]]) -> Sequence[str]:
    """Return the first choice whose targets all match in the first block. Raises `DataError` when none does."""
    names = [name for name, module in model.blocks[0].named_modules() if isinstance(module, Linear)]
    for targets in choices:
        if all(matching_names(names, _pattern(target)) for target in targets):
            return targets
    raise DataError(
        f"the blocks of {type(model.network).__name__} have no linears {', or '.join(map(' and '.join, choices))}, "
        f"only {', '.join(names)}; use another arm, or a family that has them"
    )


def _pattern(target: str) -> str:
    return target if target in ALL or target.startswith("re:") else rf"re:(.*\.)?{re.escape(target)}$"
