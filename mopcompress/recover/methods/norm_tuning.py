"""Norms alone are trained: the cheapest of strong rivals (PERP, Zimmer et al., 2023, arXiv 2312.15230)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods.module_patches import PatchedModules


class TrainedNorm(nn.Module):
    """Parameters of its own for a module: at first, copies of the module's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.own = nn.ParameterDict({name: nn.Parameter(one.clone()) for name, one in module.named_parameters()})

    def forward(self, module: nn.Module, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return functional_call(module, self.merged(module), (hidden,))

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """These parameters."""
        return dict(self.own)


def build(model: LanguageModel, config: AdapterConfig) -> PatchedModules:
    """The norms of the blocks from `layer` up, those of queries and keys too, and the last, with their biases.

    Raises `DataError` when the family's norms have no parameters.
    """
    norms = norms_from_layer(model, config.layer)
    if not norms:
        raise DataError(f"the norms of {type(model.network).__name__} have no weights to train; use another arm")
    return PatchedModules(config.layer, {name: TrainedNorm(norm) for name, norm in norms.items()}).to(model.device)


def initialize(config: AdapterConfig, material: AdapterInputs, start: AdapterInit) -> PatchedModules:
    """Norms as they are, whatever the seed."""
    return build(material.model, config)


def norms_from_layer(model: LanguageModel, layer: int) -> dict[str, nn.Module]:
    """The norms that block `layer` and all that comes after run, by dotted name."""
    blocks = f"{model.blocks_prefix()}."
    decoder = f"{model.blocks_prefix().rpartition('.')[0]}."  # not the norms of a tower for images beside it

    def comes_after(name: str) -> bool:
        if name.startswith(blocks):
            return int(name.removeprefix(blocks).partition(".")[0]) >= layer
        return name.startswith(decoder) and "embed" not in name  # BLOOM has a norm between embeddings and blocks

    return {
        name: module
        for name, module in model.network.named_modules()
        if type(module).__name__.endswith("Norm") and dict(module.named_parameters()) and comes_after(name)
    }
