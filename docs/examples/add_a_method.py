"""Add a recovery method of your own: train a bias for every linear that writes to the residual stream.

Run it with `python docs/examples/add_a_method.py MODEL OUTPUT_FOLDER`. A method that
stays goes into a file of `mopcompress/recover/methods/`, with a line in
`recover/registry.py` and in `recipe/arms.py`; see CONTRIBUTING.md.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from mopcompress import bench, load_recipe
from mopcompress.models.language_model import LanguageModel
from mopcompress.models.modules import weight_of
from mopcompress.recipe.arms import ARM_DEFAULTS, ArmDefaults
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs, RecoveryMethod
from mopcompress.recover.methods.module_patches import PatchedModules
from mopcompress.recover.methods.target_linears import writers_from_layer
from mopcompress.recover.registry import RECOVERY_METHODS


class Bias(nn.Module):
    """A trained vector that is added to a linear's outputs; it begins at zero."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(len(weight_of(linear))))

    def forward(self, module: nn.Module, hidden: Tensor) -> Tensor:
        return module(hidden) + self.bias

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the bias with which the linear gives the same by itself."""
        return {"bias": self.bias if module.bias is None else module.bias + self.bias}


def build(model: LanguageModel, config: AdapterConfig) -> PatchedModules:
    """Return an adapter for the blocks from `config.layer` up; its values are loaded or trained later."""
    linears = writers_from_layer(model, config.layer)
    return PatchedModules(config.layer, {name: Bias(linear) for name, linear in linears.items()}).to(model.device)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> PatchedModules:
    """Return the adapter before its first step: the frozen model exactly."""
    return build(inputs.model, config)


RECOVERY_METHODS["biases"] = RecoveryMethod(build, initialize)
ARM_DEFAULTS["biases"] = ArmDefaults(
    summary="trained biases", learning_rate=1e-2, relevant_fields=frozenset({"layer"}), whole=True
)

model, folder = sys.argv[1:]
settings = {"model": model, "ratios": (0.5,), "methods": ("wanda",), "arms": ("none", "norms", "biases")}
settings |= {"train_rows": 24, "validation_rows": 8, "test_rows": 12, "max_length": 256}
settings |= {"num_calibration_samples": 4, "max_seq_length": 64}
for row in bench(load_recipe(None, settings), Path(folder)):
    print(f"{row.setting:>12}  {row.arm:<8} perplexity {row.perplexity:10.2f}  trained {row.trained_parameters:>8}")
