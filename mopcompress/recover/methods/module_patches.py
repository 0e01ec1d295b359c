"""Adapters that change the computation of single modules of the network, each through a small module of its own.

PEFT has such layers too, but puts them into the network for good, under other names, and cannot mask an update. Here
the network stays as it is outside of `active`. Adapters that PEFT has are exported in its format (`peft_export`).
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
    """A `torch.nn.Module` with the trained parameters of one patched module."""

    def forward(self, module: nn.Module, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Return the patched module's output for `hidden`; gradients reach the patch, and `module` stays as it is."""
        ...

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """Return parameters, as `module` stores them, with which it gives the patched output by itself."""
        ...


class PatchedModules(nn.Module):
    """One patch per module, by the module's dotted name, all from block `layer` up."""

    def __init__(self, layer: int, patches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layer = layer
        # torch takes no dots in the names of a ModuleDict
        self.patches = nn.ModuleDict({name.replace(".", "/"): patch for name, patch in patches.items()})

    def active(self, model: LanguageModel, instructions: InstructionStates) -> AbstractContextManager[None]:
        """Apply the patches inside the `with` block, the same for every example."""
        network = model.network
        patched = {
            name: _PatchedModule(network.get_submodule(name), patch) for name, patch in self.patches_by_name().items()
        }
        return replaced_modules(network, patched)

    def compile_for_inference(self, model: LanguageModel) -> ApplyAdapter:
        """Merge the patches into copies of the patched modules, which then cost as much as the bare modules."""
        network = model.network
        with torch.no_grad():
            merged = {
                name: _merged_copy(network.get_submodule(name), patch) for name, patch in self.patches_by_name().items()
            }
        return lambda _instructions: replaced_modules(network, merged)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return every parameter; there is no gate."""
        return {"adapter": list(self.parameters()), "gate": []}

    def patches_by_name(self) -> dict[str, ModulePatch]:
        """Return the patches by the dotted names of the patched modules."""
        return {name.replace("/", "."): patch for name, patch in self.patches.items()}  # type: ignore[misc]

    @torch.no_grad()
    def merged(self, model: LanguageModel) -> dict[str, Tensor]:
        """Return the network's new parameters by dotted name; with them it needs no adapter."""
        return {
            f"{name}.{parameter}": value
            for name, patch in self.patches_by_name().items()
            for parameter, value in patch.merged(model.network.get_submodule(name)).items()
        }


class _PatchedModule(nn.Module):
    """A module's replacement, which runs the module through its patch."""

    def __init__(self, module: nn.Module, patch: ModulePatch) -> None:
        super().__init__()
        self.module, self.patch = module, patch

    def forward(self, hidden: Tensor) -> Tensor:
        return self.patch.forward(self.module, hidden)


def _merged_copy(module: nn.Module, patch: ModulePatch) -> nn.Module:
    """Return a copy of a module with merged parameters; a module with hooks computes more, and is patched instead."""
    if module._forward_hooks or module._forward_pre_hooks:
        return _PatchedModule(module, patch)
    merged = copy.copy(module)
    merged._parameters = dict(module._parameters)
    for name, value in patch.merged(module).items():
        merged._parameters[name] = nn.Parameter(value, requires_grad=False)
    return merged
