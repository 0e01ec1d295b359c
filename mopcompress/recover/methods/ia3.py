"""(IA)^3 (Liu et al., 2022, arXiv 2205.05638): keys, values and the inner activations of the MLP, each scaled.

As PEFT has it: the outputs of the key and value projections, biases included, and the inputs of the MLP's last linear.
In families with queries, keys and values in one linear, all of its outputs are scaled, as PEFT does.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mopcompress.models.families import KEYS_AND_VALUES, MLP_READERS
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import Linear, weight_of
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods.module_patches import PatchedModules
from mopcompress.recover.methods.target_linears import first_present, linears_from_layer


class IA3Scale(nn.Module):
    """A factor for each output of a linear, or for each input."""

    def __init__(self, linear: Linear, *, scales_inputs: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(weight_of(linear).shape[1 if scales_inputs else 0]))
        self.scales_inputs = scales_inputs

    def forward(self, module: Linear, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return module(hidden * self.scale) if self.scales_inputs else module(hidden) * self.scale

    def merged(self, module: Linear) -> dict[str, Tensor]:
        """Return the weight with scaled columns, or weight and bias with scaled rows: zeros stay."""
        weight = weight_of(module) * (self.scale if self.scales_inputs else self.scale[:, None])
        merged = {"weight": weight.T.contiguous() if isinstance(module, Conv1D) else weight}
        return merged if self.scales_inputs or module.bias is None else merged | {"bias": module.bias * self.scale}


def build(model: LanguageModel, config: AdapterConfig) -> PatchedModules:
    """Return scales of 1 for keys, values and MLPs. Raises `DataError` when the family has no such linears."""
    patches: dict[str, nn.Module] = {}
    for choices, scales_inputs in ((KEYS_AND_VALUES, False), (MLP_READERS, True)):
        linears = linears_from_layer(model, config.layer, first_present(model, choices))
        patches |= {name: IA3Scale(linear, scales_inputs=scales_inputs) for name, linear in linears.items()}
    return PatchedModules(config.layer, patches).to(model.device)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> PatchedModules:
    """Return scales of 1, whatever the seed."""
    return build(inputs.model, config)
