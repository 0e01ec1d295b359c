"""Modules of a network: weights of linears as [out, in], hooks for a while, and modules replaced for a while."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def weight_of(linear: Linear) -> Tensor:
    """Return the weight as [out, in]; GPT-2's Conv1D stores it transposed."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def set_weight(linear: Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear another weight [out, in] and bias, in place."""
    stored = weight.T if isinstance(linear, Conv1D) else weight
    linear.weight = nn.Parameter(stored.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)


@contextmanager
def forward_hooks(
    modules: Iterable[nn.Module], hook: Callable[..., Any], *, pre: bool = False, with_kwargs: bool = False
) -> Iterator[list[RemovableHandle]]:
    """Call `hook` after every forward pass of these modules, or before it with `pre`, inside the `with` block only.

    PyTorch gives `hook` (module, inputs, output), or (module, inputs) with `pre`; with `with_kwargs`, the keyword
    arguments follow the inputs. A result other than None replaces the output, or the inputs. Yields the handles, with
    which a hook can be removed before the block ends.
    """
    handles: list[RemovableHandle] = []
    try:
        for module in modules:
            register = module.register_forward_pre_hook if pre else module.register_forward_hook
            handles.append(register(hook, with_kwargs=with_kwargs))
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_modules(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules at these dotted names, in every view too, and put the old ones back at the end.

    Raises `AttributeError` for an unknown name, with nothing changed.
    """
    parents = {name: network.get_submodule(name.rpartition(".")[0]) for name in modules}
    originals = {name: network.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            parents[name]._modules[name.rpartition(".")[2]] = module
        yield
    finally:
        for name, module in originals.items():
            parents[name]._modules[name.rpartition(".")[2]] = module
