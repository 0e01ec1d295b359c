"""Layers and tiny models to compress, with calibration tokens and options for every method."""

from collections.abc import Sequence

import pytest
import torch
from tiny_models import random_tokens
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mopcompress.compress.plan import MethodConfig
from mopcompress.models.language_model import LanguageModel

TIGHT = {"rtol": 1e-6, "atol": 1e-6}  # of comparisons in float64

CALIBRATION_TOKENS = random_tokens(6, 20)
METHOD_OPTIONS = {
    "magnitude": {"sparsity": 0.4},
    "wanda": {"sparsity": 0.4},
    "sparsegpt": {"sparsity": 0.4, "block_size": 8},
    "alps": {"sparsity": 0.4},
    "gptq": {"bits": 3, "group_size": 8},
}


def random_layer(
    rows: int = 6, size: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return a weight [rows, size], and inputs [5 * size, size] that are correlated and unevenly large."""
    seeded = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=seeded, dtype=dtype) / size**0.5
    loudness = 0.2 + torch.rand(size, generator=seeded, dtype=dtype)
    inputs = torch.randn(5 * size, size, generator=seeded, dtype=dtype) @ mixing * loudness
    return torch.randn(rows, size, generator=seeded, dtype=dtype), inputs


def gram_of(inputs: Tensor) -> Tensor:
    """Return the mean of x xᵀ over the tokens."""
    return inputs.T @ inputs / len(inputs)


def method_configs(method: str = "sparsegpt", **changes: object) -> list[MethodConfig]:
    """Return a list with one method, to compress a model with or to add others to."""
    return [MethodConfig(**{"method": method, "options": dict(METHOD_OPTIONS[method])} | changes)]


def repair_config(rank: int = 4, **changes: object) -> MethodConfig:
    return MethodConfig(**{"method": "eora", "options": {"rank": rank}} | changes)


def linears(model: LanguageModel) -> dict[str, nn.Module]:
    """Return all linears of the blocks by name, in the order in which they run (in these families)."""
    return {
        f"{model.blocks_prefix()}.{name}": linear
        for name, linear in model.blocks.named_modules()
        if isinstance(linear, nn.Linear | Conv1D)
    }


def weight_of(linear: nn.Module) -> Tensor:
    """Return the weight as [out, in]."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


class InputReachedError(Exception):
    """Ends a forward pass."""


def linear_inputs(model: LanguageModel, linear: nn.Module, tokens: Tensor = CALIBRATION_TOKENS) -> Tensor:
    """Run the whole network, as it is now, on the tokens and return the inputs [tokens, in] of a linear."""
    inputs: list[Tensor] = []

    def stop(_module: nn.Module, arguments: Sequence[Tensor]) -> None:
        inputs.append(arguments[0])
        raise InputReachedError

    handle = linear.register_forward_pre_hook(stop)
    with pytest.raises(InputReachedError):
        model.network(input_ids=tokens)
    handle.remove()
    return inputs[0].flatten(0, 1)


class RoutedLinears(nn.Module):
    """Two linears: each token goes to one of them, by the sign of its first feature."""

    def __init__(self, size):
        super().__init__()
        self.up, self.down = (nn.Linear(size, size, bias=False) for _ in range(2))

    def forward(self, hidden):
        flat, result = hidden.flatten(0, -2), torch.empty_like(hidden).flatten(0, -2)
        for linear, taken in ((self.up, flat[:, 0] > 0), (self.down, flat[:, 0] <= 0)):
            if bool(taken.any()):
                result[taken] = linear(flat[taken])
        return result.view_as(hidden)
