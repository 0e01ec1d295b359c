"""Stacked experts of a mixture-of-experts block, taken apart into linears.

transformers stores the experts of a block as `gate_up_proj` [experts, 2 inner, hidden] and `down_proj` [experts,
hidden, inner]. Here each matrix is a linear of its own whose weight is a view into the stack, so writing to the linear
changes the stack.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mopcompress.errors import DataError
from mopcompress.models.families import EXPERT_LAYOUT, EXPERT_STACKS
from mopcompress.models.modules import Linear


@dataclass(frozen=True)
class Expert:
    """One expert: down(act(gate x) * up x)."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


StackedExperts = dict[str, tuple[nn.Module, list[Expert]]]
"""The modules of stacked experts of a block by their name inside it, each with its experts."""


def unstack_experts(block: nn.Module) -> StackedExperts:
    """Return the stacked experts of a block. Raises `DataError` for stacked weights in another layout."""
    stacked: StackedExperts = {}
    for name, module in block.named_modules():
        stacks = {key for key, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
        if stacks == EXPERT_STACKS and all(getattr(module, key, None) == value for key, value in EXPERT_LAYOUT.items()):
            stacked[name] = (module, _split_stacks(module))
        elif stacks and not isinstance(module, nn.Conv1d):
            raise DataError(
                f"{type(module).__name__} at {name} holds stacked weights {sorted(stacks)} in a layout that is not "
                "known here, so they would stay dense; use a model whose experts are plain linears, or stacked as "
                "Mixtral's are"
            )
    return stacked


@contextmanager
def expert_by_expert(experts: StackedExperts) -> Iterator[None]:
    """Let these modules call the linears of their experts, one expert after another, so that hooks see the calls."""
    call_experts_separately(experts)
    try:
        yield
    finally:
        for module, _ in experts.values():
            del module.forward


def call_experts_separately(experts: StackedExperts) -> None:
    """Let these modules call the linears of their experts from now on, in place."""
    for module, module_experts in experts.values():
        module.forward = partial(_forward, module, module_experts)


def named_linears(block: nn.Module, experts: StackedExperts, prefix: str) -> dict[Linear, str]:
    """Return the dotted names of all linears of a block, those of its stacked experts included."""
    names: dict[Linear, str] = {
        linear: f"{prefix}.{name}" for name, linear in block.named_modules() if isinstance(linear, Linear)
    }
    for name, (_, module_experts) in experts.items():
        for number, expert in enumerate(module_experts):
            names |= {linear: f"{prefix}.{name}.{number}.{part}" for part, linear in vars(expert).items()}
    return names


def _forward(module: Any, experts: list[Expert], hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Compute the module's output: the weighted sum of each token's experts.

    `chosen` [tokens, top] holds the numbers of the experts; a number beyond the last expert stands for none.
    """
    result = torch.zeros_like(hidden)
    for number, expert in enumerate(experts):
        token, rank = torch.where(chosen == number)
        if not len(token):
            continue
        inputs = hidden[token]
        inner = module._apply_gate(torch.cat([expert.gate_proj(inputs), expert.up_proj(inputs)], -1))
        result.index_add_(0, token, (expert.down_proj(inner) * weights[token, rank, None]).to(result))
    return result


def _split_stacks(module: Any) -> list[Expert]:
    gates, ups = module.gate_up_proj.data.chunk(2, dim=1)
    stacks = zip(gates, ups, module.down_proj.data, strict=True)
    return [Expert(*(_linear(weight) for weight in stack)) for stack in stacks]


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
