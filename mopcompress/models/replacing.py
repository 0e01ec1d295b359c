"""Other modules in the place of a network's own, for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def replacing(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
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
