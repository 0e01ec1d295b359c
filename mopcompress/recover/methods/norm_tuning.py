"""Training of the norms alone: the cheapest of the strong rivals (PERP, Zimmer et al., 2023, arXiv 2312.15230)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mopcompress.errors import DataError
from mopcompress.models.language_model import LanguageModel
from mopcompress.recover.adapter import AdapterConfig, AdapterInit, AdapterInputs
from mopcompress.recover.methods.module_patches import PatchedModules


class TrainedNorm(nn.Module):
    """Trained parameters that replace a norm's own; they begin as copies of them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.own = nn.ParameterDict(
            {name: nn.Parameter(parameter.clone()) for name, parameter in module.named_parameters()}
        )

    def forward(self, module: nn.Module, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return functional_call(module, self.merged(module), (hidden,))

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the trained parameters."""
        return dict(self.own)


def build(model: LanguageModel, config: AdapterConfig) -> PatchedModules:
    """Return copies of the norms of the blocks from `layer` up, those of queries and keys too, and of the last norm.

    Biases are trained with the weights. Raises `DataError` when the family's norms have no parameters.
    """
    norms = norms_from_layer(model, config.layer)
    if not norms:
        raise DataError(f"the norms of {type(model.network).__name__} have no weights to train; use another arm")
    return PatchedModules(config.layer, {name: TrainedNorm(norm) for name, norm in norms.items()}).to(model.device)


def initialize(config: AdapterConfig, inputs: AdapterInputs, init: AdapterInit) -> PatchedModules:
    """Return the norms as they are, whatever the seed."""
    return build(inputs.model, config)


def norms_from_layer(model: LanguageModel, layer: int) -> dict[str, nn.Module]:
    """Return the norms with parameters of block `layer` and of all that runs after it, by dotted name."""
    blocks = f"{model.blocks_prefix()}."
    decoder = f"{model.blocks_prefix().rpartition('.')[0]}."  # leaves out norms of other parts, such as an image tower

    def runs_from_layer(name: str) -> bool:
        if name.startswith(blocks):
            return int(name.removeprefix(blocks).partition(".")[0]) >= layer
        return name.startswith(decoder) and "embed" not in name  # BLOOM has a norm between embeddings and blocks

    return {
        name: module
        for name, module in model.network.named_modules()
        if type(module).__name__.endswith("Norm") and dict(module.named_parameters()) and runs_from_layer(name)
    }
