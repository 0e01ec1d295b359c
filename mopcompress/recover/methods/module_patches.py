"""Adapters that change what single modules of the network compute, each through a small module of its own.

PEFT has such layers too, but puts them into the network for good, under other names, and cannot mask an update. Here
the network stays as it is outside of `applied`; what PEFT can hold is written in its format (`peft_format`).
"""

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.errors import DataError
from mopcompress.evaluation.hidden_states import Applied, Instructions
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear
from mopcompress.models.replacing import replacing
from mopcompress.models.resizing import ATTENTIONS, MLPS
from mopcompress.models.targets import ALL, meant

MLP_READERS = (("down_proj",), ("fc2",), ("mlp.c_proj",), ("dense_4h_to_h",))  # read the neurons of an MLP
ATTENTION_READERS = {name for first, _ in ATTENTIONS for name in first} | {"c_attn", "query_key_value"}  # of the stream
WRITERS = {last for _, last in (*MLPS, *ATTENTIONS)}  # what they give is added to the residual stream


@runtime_checkable  # so that the test run can check it
class Change(Protocol):
    """A `torch.nn.Module` with the trained parameters of one changed module."""

    def forward(self, module: nn.Module, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """What the changed module gives for `hidden`; gradients reach the change, and `module` stays as it is."""
        ...

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters, as `module` stores them, with which it gives the same by itself."""
        ...


class Changes(nn.Module):
    """One change a module, by the module's dotted name, all from block `layer` up."""

    def __init__(self, layer: int, changes: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layer = layer
        # torch takes no dots in the names of a ModuleDict
        self.changes = nn.ModuleDict({name.replace(".", "/"): change for name, change in changes.items()})

    def applied(self, model: LanguageModel, instructions: Instructions) -> AbstractContextManager[None]:
        """Inside it the changes are in force, the same for every example."""
        network = model.network
        changed = {name: _Changed(network.get_submodule(name), change) for name, change in self.by_name().items()}
        return replacing(network, changed)

    def compiled(self, model: LanguageModel) -> Applied:
        """Merge the changes into copies of what they change, which then cost what the bare modules do."""
        network = model.network
        with torch.no_grad():
            settled = {name: _settled(network.get_submodule(name), change) for name, change in self.by_name().items()}
        return lambda _instructions: replacing(network, settled)

    def learned(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter; there is no gate."""
        return {"adapter": list(self.parameters()), "gate": []}

    def by_name(self) -> dict[str, Change]:
        """The changes by the dotted names of what they change."""
        return {name.replace("/", "."): change for name, change in self.changes.items()}  # type: ignore[misc]

    @torch.no_grad()
    def merged(self, model: LanguageModel) -> dict[str, Tensor]:
        """New values of the network's parameters, by dotted name, with which it gives the same without an adapter."""
        return {
            f"{name}.{own}": value
            for name, change in self.by_name().items()
            for own, value in change.merged(model.network.get_submodule(name)).items()
        }


class _Changed(nn.Module):
    """Stands in a module's place."""

    def __init__(self, module: nn.Module, change: Change) -> None:
        super().__init__()
        self.module, self.change = module, change

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change.forward(self.module, hidden)


def _settled(module: nn.Module, change: Change) -> nn.Module:
    """A copy of a module with parameters of its own, if its parameters are all there is to it."""
    if module._forward_hooks or module._forward_pre_hooks:
        return _Changed(module, change)
    view = copy.copy(module)
    view._parameters = dict(module._parameters)
    for name, value in change.merged(module).items():
        view._parameters[name] = nn.Parameter(value, requires_grad=False)
    return view


def linears_from(model: LanguageModel, layer: int, targets: Sequence[str]) -> dict[str, Linear]:
    """The linears of block `layer` and those above that some target means, by dotted name.

    A target is the end of a dotted name, as in PEFT (`q_proj`), a pattern `re:...`, or `Linear` for all. Raises
    `DataError` when one means no linear.
    """
    prefix = model.blocks_prefix()
    linears = {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(model.blocks)
        if index >= layer
        for name, module in block.named_modules()
        if isinstance(module, Linear)
    }
    chosen: set[str] = set()
    for target in targets:
        found = meant(list(linears), _pattern(target))
        if not found:
            there = dict.fromkeys(name.removeprefix(f"{prefix}.").partition(".")[2] for name in linears)
            raise DataError(
                f"adapter_targets: no linear of the blocks of {type(model.network).__name__} is {target!r}; there are "
                f"{', '.join(there)}: name some of them"
            )
        chosen |= set(found)
    return {name: linear for name, linear in linears.items() if name in chosen}


def writers_from(model: LanguageModel, layer: int) -> dict[str, Linear]:
    """The linears of those blocks that write to the residual stream. Raises `DataError` when none is known."""
    linears = linears_from(model, layer, ("Linear",))
    found = {name: linear for name, linear in linears.items() if name.rpartition(".")[2] in WRITERS}
    if not found:
        raise DataError(
            f"the blocks of {type(model.network).__name__} have no linear called {', '.join(sorted(WRITERS))}; "
            "use another arm"
        )
    return found


def attention_readers_from(model: LanguageModel, layer: int) -> dict[str, Linear]:
    """The linears of those blocks that make queries, keys and values; none in families where they are called others."""
    linears = linears_from(model, layer, ("Linear",))
    return {name: linear for name, linear in linears.items() if name.rpartition(".")[2] in ATTENTION_READERS}


def mlp_readers_from(model: LanguageModel, layer: int) -> dict[str, Linear]:
    """The linears of those blocks that read the neurons of an MLP; none in blocks where that is no linear."""
    ends = tuple(f".{target}" for targets in MLP_READERS for target in targets)
    return {name: linear for name, linear in linears_from(model, layer, ("Linear",)).items() if name.endswith(ends)}


def first_present(model: LanguageModel, choices: Sequence[Sequence[str]]) -> Sequence[str]:
    """The first choice whose targets all are in the first block. Raises `DataError` when there is none."""
    names = [name for name, module in model.blocks[0].named_modules() if isinstance(module, Linear)]
    for targets in choices:
        if all(meant(names, _pattern(target)) for target in targets):
            return targets
    raise DataError(
        f"the blocks of {type(model.network).__name__} have no linears {', or '.join(map(' and '.join, choices))}, "
        f"only {', '.join(names)}; use another arm, or a family that has them"
    )


def _pattern(target: str) -> str:
    return target if target in ALL or target.startswith("re:") else rf"re:(.*\.)?{re.escape(target)}$"
