"""Experts that are stored stacked, taken apart into the linears that they are.

transformers keeps the experts of a block as `gate_up_proj` [experts, 2 inner, hidden] and `down_proj` [experts, hidden,
inner]. Here each is a linear of its own whose weight is a view into the stack: what is written to it, is in the stack.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mopcompress.errors import DataError
from mopcompress.models.modules import Linear

_LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
_STACKS = {"gate_up_proj", "down_proj"}


@dataclass(frozen=True)
class Expert:
    """One expert: down(act(gate x) * up x)."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


Unstacked = dict[str, tuple[nn.Module, list[Expert]]]
"""The name of each module of stacked experts inside a block, the module, and its experts."""


def unstacked(block: nn.Module) -> Unstacked:
    """The stacked experts of a block. Raises `DataError` for a stack of weights of another layout."""
    found: Unstacked = {}
    for name, module in block.named_modules():
        stacks = {key for key, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
        if stacks == _STACKS and all(getattr(module, key, None) == value for key, value in _LAYOUT.items()):
            found[name] = (module, _experts(module))
        elif stacks and not isinstance(module, nn.Conv1d):
            raise DataError(
                f"{type(module).__name__} at {name} holds stacked weights {sorted(stacks)} in a layout that is not "
                "known here, and would stay dense; use a model whose experts are plain linears, or stacked as Mixtral's"
            )
    return found


@contextmanager
def expert_by_expert(experts: Unstacked) -> Iterator[None]:
    """Inside, these modules call the linears of their experts, one expert after the other, so that hooks see them."""
    call_one_by_one(experts)
    try:
        yield
    finally:
        for module, _ in experts.values():
            del module.forward


def call_one_by_one(experts: Unstacked) -> None:
    """Let these modules call the linears of their experts from now on, in place."""
    for module, every in experts.values():
        module.forward = partial(_forward, module, every)


def named_linears(block: nn.Module, experts: Unstacked, prefix: str) -> dict[Linear, str]:
    """All linears of a block with their dotted names, those of its stacked experts too."""
    names: dict[Linear, str] = {
        linear: f"{prefix}.{name}" for name, linear in block.named_modules() if isinstance(linear, Linear)
    }
    for name, (_, every) in experts.items():
        for number, expert in enumerate(every):
            names |= {linear: f"{prefix}.{name}.{number}.{part}" for part, linear in vars(expert).items()}
    return names


def _forward(module: Any, experts: list[Expert], hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the module computes: each token's experts, by their weights; `chosen` [tokens, top] may name none."""
    result = torch.zeros_like(hidden)
    for number, expert in enumerate(experts):
        token, place = torch.where(chosen == number)
        if not len(token):
            continue
        inputs = hidden[token]
        inner = module._apply_gate(torch.cat([expert.gate_proj(inputs), expert.up_proj(inputs)], -1))
        result.index_add_(0, token, (expert.down_proj(inner) * weights[token, place, None]).to(result))
    return result


def _experts(module: Any) -> list[Expert]:
    gates, ups = module.gate_up_proj.data.chunk(2, dim=1)
    stacks = zip(gates, ups, module.down_proj.data, strict=True)
    return [Expert(*(_linear(weight) for weight in stack)) for stack in stacks]


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
