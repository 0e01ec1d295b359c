"""Adapters that change what single modules of the network compute, each through a small module of its own.

PEFT has such layers too, but puts them into the network for good, under other names, and cannot mask an update. Here
the network stays as it is outside of `active`; what PEFT can hold is written in its format (`peft_format`).
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mopcompress.evaluation.hidden_states import ApplyAdapter, InstructionStates
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import replaced_modules


@runtime_checkable  # so that the test run can check it
class ModulePatch(Protocol):
    """A `torch.nn.Module` with the trained parameters of one changed module."""

    def forward(self, module: nn.Module, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """What the changed module gives for `hidden`; gradients reach the change, and `module` stays as it is."""
        ...

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """The parameters, as `module` stores them, with which it gives the same by itself."""
        ...


class PatchedModules(nn.Module):
    """One change a module, by the module's dotted name, all from block `layer` up."""

    def __init__(self, layer: int, changes: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layer = layer
        # torch takes no dots in the names of a ModuleDict
        self.changes = nn.ModuleDict({name.replace(".", "/"): change for name, change in changes.items()})

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Inside it the changes are in force, the same for every example."""
        network = model.network
        changed = {name: _PatchedModule(network.get_submodule(name), change) for name, change in self.by_name().items()}
        return replaced_modules(network, changed)

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Merge the changes into copies of what they change, which then cost what the bare modules do."""
        network = model.network
        with torch.no_grad():
            settled = {
                name: _merged_copy(network.get_submodule(name), change) for name, change in self.by_name().items()
            }
        return lambda _instructions: replaced_modules(network, settled)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter; there is no gate."""
        return {"adapter": list(self.parameters()), "gate": []}

    def by_name(self) -> dict[str, ModulePatch]:
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


class _PatchedModule(nn.Module):
    """Stands in a module's place."""

    def __init__(self, module: nn.Module, change: ModulePatch) -> None:
        super().__init__()
        self.module, self.change = module, change

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change.forward(self.module, hidden)


def _merged_copy(module: nn.Module, change: ModulePatch) -> nn.Module:
    """A copy of a module with parameters of its own, if its parameters are all there is to it."""
    if module._forward_hooks or module._forward_pre_hooks:
        return _PatchedModule(module, change)
    view = copy.copy(module)
    view._parameters = dict(module._parameters)
    for name, value in change.merged(module).items():
        view._parameters[name] = nn.Parameter(value, requires_grad=False)
    return view
