"""The linears of a network, however they are stored: a weight is [out, in]."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def weight_of(linear: Linear) -> Tensor:
    """The weight as [out, in]; GPT-2's Conv1D stores it transposed."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def set_weight(linear: Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear another weight [out, in] and bias, in place."""
    stored = weight.T if isinstance(linear, Conv1D) else weight
    linear.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)


@contextmanager
def replaced_modules(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside it `modules` stand at these dotted names, in every view too; afterwards, whatever happens, the old ones.

    Raises `AttributeError` for a name that is not there, with nothing changed.
    """
    places = {name: network.get_submodule(name.rpartition(".")[0]) for name in modules}
    own = {name: network.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            places[name]._modules[name.rpartition(".")[2]] = module
        yield
    finally:
        for name, module in own.items():
            places[name]._modules[name.rpartition(".")[2]] = module
